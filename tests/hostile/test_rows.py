"""Hostile inputs, answered by the command itself: tests.hostile.rows."""

import pytest

from tests.hostile.answers import check, world
from tests.hostile.rows import CASES

__all__ = ["world"]
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title.replace(" ", "_"))
def test_answer(case, world, tmp_path):
    check("rows", case, world, tmp_path)
