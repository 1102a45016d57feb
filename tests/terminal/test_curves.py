"""Learning curves as text."""

import math

import pytest

from fireopd_jax.terminal.curves import curve


def test_curve_places_its_points():
    drawn = curve([(0, 0.0), (5, 0.5), (10, 1.0)], "accuracy", width=11, height=3).splitlines()
    assert drawn == [
        "accuracy",
        "  1 ┤          ●",
        "0.5 ┤     ●",
        "  0 ┤●",
        "    └───────────",
        "     0        10  step",
    ]


def test_curves_share_their_axes_and_are_named():
    drawn = curve({"student": [(0, 0.0), (10, 1.0)], "teacher": [(0, 2.0)]}, "", 11, 3)
    assert drawn.splitlines()[0] == "2 ┤○"
    assert "● student   ○ teacher" in drawn


@pytest.mark.parametrize("points", [[], [(3, math.nan)], [(3, 0.5)], [(1, 2.0), (9, 2.0)]])
def test_curve_bears_few_points(points):
    drawn = curve(points, "loss")
    assert drawn.startswith("loss\n")
    assert drawn.count("●") == sum(not math.isnan(value) for _, value in points)
