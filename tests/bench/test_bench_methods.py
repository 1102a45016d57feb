"""The cost of methods: every figure is there, and the baseline costs itself."""

import json

import pytest

from fireopd_jax.bench.methods import bench_methods
from fireopd_jax.config import UserError

TINY = [
    "smoke",
    "mesh.data=1",
    "data.path=builtin:addition-1",
    "data.max_prompt_tokens=8",
    "rollout.batch_size=8",
    "rollout.max_tokens=8",
    "eval.problems=0",
]


@pytest.mark.slow
def test_every_method_has_its_figures(tmp_path, capsys):
    file = tmp_path / "methods.json"
    bench_methods(TINY, ["gkd"], 2, file)
    opd, gkd = json.loads(file.read_text())["methods"]
    assert (opd["name"], gkd["name"]) == ("opd", "gkd")
    assert opd["score_ratio"] == opd["update_ratio"] == 1
    assert all(each[f"{part}_seconds"] > 0 for each in (opd, gkd) for part in ("score", "update"))
    assert all(min(each["scratch_bytes"].values()) > 0 for each in (opd, gkd))
    assert "gkd" in capsys.readouterr().out


@pytest.mark.slow
def test_a_method_without_a_teacher_is_measured(tmp_path):
    file = tmp_path / "methods.json"
    bench_methods(TINY, ["opsa"], 1, file)
    assert [each["name"] for each in json.loads(file.read_text())["methods"]] == ["opd", "opsa"]


@pytest.mark.parametrize("name", ["trd", "opsd"])
def test_a_method_that_reads_the_responses_is_refused(name):
    with pytest.raises(UserError, match=f"--methods {name}: needs rollout\\."):
        bench_methods(TINY, [name], 1, None)


def test_a_method_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="did you mean"):
        bench_methods(TINY, ["gkdd"], 1, None)
