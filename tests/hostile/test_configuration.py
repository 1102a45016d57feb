"""Hostile inputs, answered by the command itself: tests.hostile.configuration."""

import pytest

from tests.hostile.answers import check, world
from tests.hostile.configuration import CASES

__all__ = ["world"]
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title.replace(" ", "_"))
def test_answer(case, world, tmp_path):
    check("configuration", case, world, tmp_path)
