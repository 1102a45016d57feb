"""The toy study: more reward to go is more variance; its command, figure and mistakes."""

import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from fireopd_jax import cli
from fireopd_jax.bench.chart import line_chart
from fireopd_jax.bench.toy_study import GAMMAS, bench_toy, read_seeds, variance
from fireopd_jax.config import UserError


@pytest.mark.slow
def test_more_reward_to_go_is_more_variance(tmp_path, capsys):
    figure, file = tmp_path / "toy.svg", tmp_path / "toy.json"
    result = bench_toy(200, (42,), figure, file, teacher_iterations=100)
    none, quarter, half, most, all = result["rows"][0]["late_variance"]
    assert all / none > 5
    assert quarter < half < most < all
    assert json.loads(file.read_text()) == result
    drawn = ElementTree.parse(figure).getroot()
    lines = drawn.findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == len(GAMMAS)
    assert "γ = 0.75" in figure.read_text() and "γ = 0.75" in capsys.readouterr().out


def test_variance_is_that_of_the_micro_batches():
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(8, 3, 2)).astype(np.float32), np.zeros((8, 2), np.float32)
    gaps = [((g - kernel.mean(axis=0)) ** 2).sum() for g in kernel]
    assert float(variance((kernel, bias))) == pytest.approx(np.mean(gaps), rel=1e-5)


def test_a_chart_leaves_out_what_has_no_logarithm():
    text = line_chart(
        {"a<b": [(0.0, 1.0), (1.0, 0.0), (2.0, 100.0), (3.0, float("inf"))]},
        title="t",
        x_label="x",
        y_label="y",
    )
    (line,) = ElementTree.fromstring(text).findall("{http://www.w3.org/2000/svg}polyline")
    assert len(line.attrib["points"].split()) == 2 and "a&lt;b" in text


def test_mistakes_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fireopd", "bench", "toy", "--seeds", "42,x"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert capsys.readouterr().err == (
        "fireopd: --seeds: expected whole numbers such as 42,43, got '42,x'\n"
    )
    with pytest.raises(UserError, match="--iterations"):
        bench_toy(3)
    assert read_seeds("1,2") == (1, 2)
