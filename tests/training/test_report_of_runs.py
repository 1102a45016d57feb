"""Each run leaves a page on what it has done, however it ends."""

import json
import signal
from unittest import mock

import pyarrow.parquet
import pytest

from fireopd_jax.runtime.signals import Interrupted
from fireopd_jax.training.distill import Distillation
from tests.training import test_training as training
from tests.training.test_training import BASE, MODEL

OWN = [
    *BASE,
    f"teacher.architecture={MODEL}",
    "run.steps=4",
    "run.completions_every=2",
    "eval.problems=4",
    "eval.samples=1",
    "eval.batch_size=8",
]


def run(folder, *settings):
    return training.run(folder, *OWN, *settings)


def test_a_run_ends_with_its_report(tmp_path, capsys):
    folder = tmp_path / "run"
    run(folder)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and '"state":"complete"' in page
    assert f"report: {folder / 'report.html'}" in capsys.readouterr().out
    assert '"steps":4' in page and '"name":"run"' in page


ROUTED = (
    "data.path=[builtin:addition-1, builtin:subtraction-1]",
    "data.teacher_column=domain",
    f"teachers={{addition: {{architecture: {MODEL}}}, subtraction: {{architecture: {MODEL}}}}}",
)


@pytest.mark.parametrize(
    "settings", [(), ("mesh.data=2", "method/gkd", "method.score.micro_batch_size=4"), ROUTED]
)
def test_the_likeliest_words_of_both_models_are_saved_where_asked(settings, tmp_path):
    base = [each for each in OWN if settings != ROUTED or not each.startswith("teacher.")]
    training.run(tmp_path / "run", *base, *settings, "run.completions_topk=3")
    for step in (2, 4):
        file = tmp_path / "run" / "completions" / f"step_{step:06d}.parquet"
        for row in pyarrow.parquet.read_table(file).to_pylist():
            for who in ("student", "teacher"):
                ids, logprobs = row[f"{who}_top_ids"], row[f"{who}_top_logprob"]
                assert len(ids) == len(row["tokens"]) and {len(each) for each in ids} == {3}
                for token, logprob, near, values in zip(
                    row["tokens"], row[f"{who}_logprob"], ids, logprobs, strict=True
                ):
                    assert values == sorted(values, reverse=True)
                    if token in near:
                        assert values[near.index(token)] == pytest.approx(logprob, abs=1e-4)
                    else:
                        assert logprob <= values[-1] + 1e-4
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in metrics]
    assert [line["perf/compilations"] for line in lines if "loss" in line][1:] == [0, 0, 0]


def test_a_stopped_run_has_a_report_of_what_it_has_done(tmp_path, monkeypatch):
    rollout = Distillation.rollout

    def stopped(self, policies, step):
        if step == 2:
            self.session.stop(signal.SIGTERM, None)
        return rollout(self, policies, step)

    monkeypatch.setattr(Distillation, "rollout", stopped)
    with pytest.raises(Interrupted):
        run(tmp_path / "run", "run.steps=9")
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert '"state":"stopped"' in page and '"of_steps":9' in page


def test_a_report_that_cannot_be_written_costs_no_run(tmp_path, capsys):
    folder = tmp_path / "run"
    with mock.patch("fireopd_jax.training.run.write_report", side_effect=OSError("disk\nfull")):
        run(folder)
    assert (folder / "summary.json").exists() and not (folder / "report.html").exists()
    said = capsys.readouterr().out
    assert "warning: no report (OSError: disk full); fireopd report" in said
