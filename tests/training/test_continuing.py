"""Which configurations a run may go on with."""

import dataclasses
import json
from pathlib import Path

import pytest

from fireopd_jax.config import NothingLearnt
from fireopd_jax.recipe.schema import as_tree, load_sections
from fireopd_jax.training.continuing import Continuation
from fireopd_jax.training.guard import Guard

MODEL = {"folder": "gone", "revision": None, "sha256": {}}
RECORD = '{"folder": "%s", "rows": 1, "sha256": ""}'


def changes(before, now, folder, **options):
    return Continuation(folder, **options)(
        as_tree(load_sections(before)), as_tree(load_sections(now))
    )


def test_more_steps_of_a_constant_schedule_are_the_same_run(tmp_path):
    found = changes(["run.steps=2"], ["run.steps=4", "run.keep=3"], tmp_path)
    assert not found.refused and found.extended == 2
    assert found.allowed == ["run.steps was 2, is now 4", "run.keep was 2, is now 3"]


def test_fewer_steps_are_another_run(tmp_path):
    found = changes(["run.steps=4"], ["run.steps=2"], tmp_path)
    assert found.refused == ["run.steps was 4, is now 2"] and found.extended is None


def test_a_run_goes_on_with_another_mesh_unless_rows_are_in_flight(tmp_path):
    before, now = ["mesh.data=8"], ["mesh.data=2", "mesh.fsdp=4"]
    found = changes(before, now, tmp_path)
    assert not found.refused
    assert found.allowed == ["mesh.data was 8, is now 2", "mesh.fsdp was 1, is now 4"]
    flying = ["rollout.overprovision=0.5"]
    found = changes([*before, *flying], [*now, *flying], tmp_path)
    assert len(found.refused) == 1 and "rollout.overprovision" in found.refused[0]
    assert not changes([*before, *flying], [*before, *flying], tmp_path).refused


COSINE = ["optim.schedule=cosine", "optim.learning_rate=1e-3", "optim.final_fraction=0.1"]


def test_more_steps_of_another_schedule_are_refused_unless_asked_for(tmp_path):
    before, now = [*COSINE, "run.steps=100"], [*COSINE, "run.steps=200"]
    found = changes(before, now, tmp_path)
    assert "optim.schedule=cosine ends after 100 steps, at 0.0001" in found.refused[0]
    assert "--extend" in found.refusal("x")
    found = changes(before, now, tmp_path, extend=True)
    assert not found.refused and found.extended == 100
    lines = list(Continuation(tmp_path, True).effects(load_sections(now), 100))
    # Half of a cosine from 1e-3 to 1e-4.
    assert lines[0] == "going on from 100 to 200 steps" and lines[1].endswith("at 0.00055")


@pytest.mark.parametrize("name", ["reopold", "all_of"])
def test_a_stage_that_follows_the_progress_of_the_run_is_named(tmp_path, name):
    filter = {"reopold": "{kind: reopold}", "all_of": "{kind: all_of, filters: [{kind: reopold}]}"}
    method = ["method/reopold", f"method.filter={filter[name]}"]
    found = changes([*method, "run.steps=2"], [*method, "run.steps=4"], tmp_path)
    assert "method.filter changes" in found.refused[0]
    assert not changes(
        [*method, "run.steps=2"], [*method, "run.steps=4"], tmp_path, extend=True
    ).refused


def test_a_window_that_the_run_ended_in_is_not_gone_on_with(tmp_path):
    window = ["method/trd", "rollout.window=4"]
    found = changes([*window, "run.steps=6"], [*window, "run.steps=8"], tmp_path, extend=True)
    assert "within a window" in found.refused[0]
    assert not changes([*window, "run.steps=8"], [*window, "run.steps=12"], tmp_path).refused


def test_other_changes_are_refused_beside_more_steps(tmp_path):
    found = changes(["run.steps=2"], ["run.steps=4", "run.seed=1"], tmp_path)
    assert found.refused == ["run.seed was 0, is now 1"]


def test_rows_and_recorded_models_may_move_and_others_may_not(tmp_path):
    before = ["data.path=a.jsonl", "student.path=s", "teacher.path=t"]
    now = ["data.path=b.jsonl", "student.path=s", "teacher.path=u"]
    assert len(changes(before, now, tmp_path).refused) == 2
    (tmp_path / "data.json").write_text(RECORD % tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "sources.json").write_text(json.dumps({"teacher default": MODEL}))
    found = changes(before, now, tmp_path)
    assert not found.refused and len(found.allowed) == 2
    now[1] = "student.path=v"
    assert changes(before, now, tmp_path).refused == ["student.path was 's', is now 'v'"]


def test_another_built_in_task_is_another_run(tmp_path):
    (tmp_path / "data.json").write_text(RECORD % tmp_path)
    before, now = (["data.path=builtin:addition-1"], ["data.path=builtin:addition-2"])
    assert changes(before, now, tmp_path).refused


def test_relative_paths_of_an_older_run_begin_where_it_began(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "data.json").write_text(RECORD % tmp_path)
    now = [f"data.path={tmp_path}/rows.jsonl"]
    assert not changes(["data.path=rows.jsonl"], now, tmp_path).allowed


def of_step(skipped=1.0, tokens=8.0, norm=float("nan")):
    return {"skipped": skipped, "loss_tokens": tokens, "grad_norm": norm}


def test_a_run_stops_after_so_many_steps_in_a_row_that_are_not_finite():
    guard = Guard("student", 3)
    for done in (1, 2):
        guard.check(done, of_step())
    guard.check(3, of_step(0.0))  # one good step: the count begins anew
    guard.check(4, of_step(0.5))  # one of two updates
    guard.check(5, of_step(tokens=0.0))  # nothing was left to train on, which may pass
    guard.check(6, of_step())
    guard.check(7, of_step())
    with pytest.raises(NothingLearnt, match=r"^student: stopped after step 8: the last 3 .*grad"):
        guard.check(8, of_step())


def test_a_training_without_an_update_has_learnt_nothing():
    guard = Guard("student", 3)
    guard.end(0, 0)
    guard.end(5, 4)
    guard.check(5, of_step(tokens=0.0))
    with pytest.raises(NothingLearnt, match=r"all 5 updates were skipped: no token is left"):
        guard.end(5, 5)
    assert NothingLearnt.exit_status == 1


def test_every_key_that_may_be_a_path_is_marked():
    """A new key with a path in its name joins the marked ones, or the exceptions here."""
    from fireopd_jax.config import LOCAL
    from fireopd_jax.recipe.schema import Config

    seen, plain = set(), set()

    def visit(cls):
        import typing

        for field in dataclasses.fields(cls):
            hint = typing.get_type_hints(cls, include_extras=True)[field.name]
            for each in parts(hint):
                if dataclasses.is_dataclass(each) and each not in seen:
                    seen.add(each)
                    visit(each)
            if field.name.endswith(("path", "file", "folder")) and LOCAL not in getattr(
                hint, "__metadata__", ()
            ):
                plain.add(f"{cls.__name__}.{field.name}")

    def parts(hint):
        yield hint
        for each in getattr(hint, "__args__", ()):
            yield from parts(each)

    visit(Config)
    assert len(seen) > 20 and plain == set()


def test_absolute_paths_leave_other_names_alone(tmp_path, monkeypatch):
    from fireopd_jax.recipe.paths import absolute

    (tmp_path / "p.jsonl").write_text("{}\n")
    (tmp_path / "chatml").write_text("")
    monkeypatch.chdir(tmp_path)
    config = load_sections(
        ["data.path=[p.jsonl, 'p*.jsonl', openai/gsm8k, ../x.jsonl, 'builtin:addition-2']",
         "student.path=org/model", "student.chat_template=chatml", "teacher.path=~/t",
         "eval.sets={a: {path: p.jsonl}}"]
    )  # fmt: skip
    found = absolute(config, tmp_path)
    assert found.data.path == (
        f"{tmp_path}/p.jsonl", f"{tmp_path}/p*.jsonl", "openai/gsm8k",
        f"{tmp_path.parent}/x.jsonl", "builtin:addition-2",
    )  # fmt: skip
    assert (found.student.path, found.student.chat_template) == ("org/model", "chatml")
    assert found.teachers["default"].path == str(Path.home() / "t")
    assert found.eval.sets["a"].path == f"{tmp_path}/p.jsonl"
    assert absolute(found, Path("/")) == found


def test_supervised_training_has_no_use_for_more_steps(tmp_path):
    found = changes(["run.steps=2"], ["run.steps=4"], tmp_path, distils=False)
    assert "only fireopd train and resume" in found.refused[0]


def test_a_student_that_is_read_from_its_path_may_move(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "sources.json").write_text(json.dumps({"student start": MODEL}))
    found = changes(["student.path=s"], ["student.path=v"], tmp_path)
    assert not found.refused and found.allowed == ["student.path was 's', is now 'v'"]
