"""A teacher without log-probabilities: metrics that need them are absent, others present."""

import dataclasses

import jax
import numpy as np
import pyarrow.parquet
import pytest

from fireopd_jax.data.sources import Row
from fireopd_jax.method.diagnostics import of_batch
from fireopd_jax.method.filtering import KeepAll, TeacherQuantile
from fireopd_jax.method.reweighting import Uniform
from fireopd_jax.metrics import results
from fireopd_jax.runs.completions import Texts, on_host, write_completions
from fireopd_jax.training.alarms import Alarms
from fireopd_jax.types import StageContext, Writer
from tests import cases


def make_case():
    scores, mask, teacher = cases.random_case(0)
    rollout = cases.make_rollout(mask, teacher)
    written = np.asarray(rollout.writer).copy()
    written[0] = Writer.REFERENCE
    rollout = dataclasses.replace(rollout, writer=written)
    return scores, dataclasses.replace(scores, teacher=None), rollout


def test_metrics_of_the_teacher_are_absent_and_the_others_are_the_same():
    scores, without, rollout = make_case()
    both = []
    for each in (scores, without):
        batch, keep = cases.assembled(rollout, each, KeepAll(), Uniform(), "seq", 2)
        both.append(results(jax.jit(lambda b, k: of_batch(b, k, 10, ("a", "b")))(batch, keep)))
    gone = both[0].keys() - both[1].keys()
    assert {"distill/reverse_kl", "teacher_logprob", "method/score_kept"} <= gone
    assert not any("teacher_" in name or "log_ratio" in name for name in both[1])
    assert {"method/keep_fraction", "method/keep_fraction_a", "student_entropy"} <= both[1].keys()
    assert both[1] == pytest.approx({k: both[0][k] for k in both[1]}, nan_ok=True)
    assert list(Alarms().check(both[1])) == []


def test_completions_have_no_column_of_the_teacher(tmp_path):
    _, without, rollout = make_case()
    batch, keep = cases.assembled(rollout, without, KeepAll(), Uniform(), "seq", 2)
    rows = [
        Row(({"role": "user", "content": str(i)},), None, None, None, "rows:1") for i in range(7)
    ]
    file = tmp_path / "step.parquet"
    texts = Texts(rows, ("a", "b"), str, lambda ids: [str(i) for i in ids], str)
    write_completions(file, on_host(batch), np.asarray(keep), texts)
    table = pyarrow.parquet.read_table(file)
    assert {"student_logprob", "weight", "kept"} <= set(table.column_names)
    assert not {"teacher_logprob", "teacher_score"} & set(table.column_names)
    writers = {row["row"]: row["writer"] for row in table.to_pylist()}
    assert writers[0] == "reference" and set(writers.values()) == {"reference", "student"}


def test_a_stage_that_needs_the_teacher_says_so():
    _, without, rollout = make_case()
    context = StageContext(rollout.mask, rollout.prompts.teacher, 2)
    with pytest.raises(ValueError, match="teacher's log-probabilities are needed"):
        TeacherQuantile()(without, context)
