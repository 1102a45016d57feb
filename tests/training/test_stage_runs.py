"""Runs with stages that need more than scores, such as grades or a history."""

import json

import numpy as np
import pyarrow.parquet
import pytest

from fireopd_jax.config import UserError
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.runs.checkpoints import saved_steps
from fireopd_jax.training.run import train

SMALL = [
    "smoke",
    "mesh.data=1",
    "data.path=builtin:addition-1",
    "data.max_prompt_tokens=8",
    "rollout.batch_size=8",
    "rollout.max_tokens=24",
    "eval.problems=0",
    "run.steps=2",
    "run.completions_every=1",
]


def run(folder, *settings):
    train(load_config([*SMALL, f"run.dir={folder}", *settings]))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == [1, 2]
    assert trained[-1]["perf/compilations"] == 0 and trained[-1]["grad_norm"] > 0
    return trained


def completions(folder, step):
    return pyarrow.parquet.read_table(folder / f"completions/step_{step:06d}.parquet").to_pylist()


def test_a_part_of_the_rows_learns_from_references(tmp_path):
    home = tmp_path / "run"
    lines = run(home, "method/gkd", "rollout.on_policy_fraction=0.5")
    rows = [row for step in (1, 2) for row in completions(home, step)]
    given = [row for row in rows if row["correct"]]  # random models do not add
    assert 3 < len(given) < 13 and all(row["finished"] for row in given)
    assert lines[0]["sampler/logprob_gap"] < 1e-3, "given tokens have no sampler"


@pytest.mark.slow
def test_filters_with_a_memory_and_names_and_a_base_policy_of_its_own(tmp_path):
    home = tmp_path / "run"
    tiny = "{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1,"
    filters = (
        "{kind: all_of, filters: [{kind: special_tokens, strings: ['1', '2'], log_ratio: null},"
        " {kind: teacher_quantile, drop_fraction: 0.3, window: 2}]}"
    )
    lines = run(
        home,
        "method/exopd",
        f"method.filter={filters}",
        f"base.architecture={tiny} head_dim: 8, intermediate_size: 32}}",
        "optim.micro_batch_size=4",
    )
    line = lines[0]
    assert 0 < line["method/token_keep_fraction"] < 1
    by = [
        line[f"method/keep_fraction_by_{kind}"] for kind in ("special_tokens", "teacher_quantile")
    ]
    assert all(0 < share < 1 for share in by)
    assert by[0] * by[1] == pytest.approx(line["method/token_keep_fraction"], rel=1e-5)
    assert lines[0]["grad_noise"] > 0
    assert saved_steps(home / "checkpoints") == [2]
    kept = [row["kept"] for step in (1, 2) for row in completions(home, step)]
    assert 2 <= len(kept) - sum(kept) <= 8
    own = run(tmp_path / "own", "method/exopd", f"method.filter={filters}",
              "optim.micro_batch_size=4")  # fmt: skip
    assert own[0]["loss"] != lines[0]["loss"], "another base policy changes the advantage"


def test_texts_that_are_no_tokens_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"method\.filter\.strings: '' has no tokens"):
        run(tmp_path / "run", "method/opd", "method.filter={kind: special_tokens, strings: ['']}")
    assert not (tmp_path / "run").exists()


def test_graded_groups_are_parted(tmp_path):
    lines = run(tmp_path / "run", "method/uni_opd", "method.score.margin.delta=50")
    assert {"completions/correct", "completions/group_all_correct"} <= set(lines[0])
    assert np.isfinite(lines[0]["distill/margin_gap"])


def test_a_control_that_grades_needs_answers(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{i}"}) + "\n" for i in range(9)))
    with pytest.raises(
        UserError, match=r"no answer to grade by, which method\.score\.margin needs"
    ):
        run(tmp_path / "run", "method/opd", "run.compare=[uni_opd]", "rollout.group_size=4",
            f"data.path={file}", "data.prompt_column=prompt")  # fmt: skip
