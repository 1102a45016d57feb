"""What a resumed run repeats, refuses and holds in memory."""

import json
import shutil

import jax
import pytest
import yaml

from fireopd_jax.commands.generate import GenerateOptions, generate_to_file
from fireopd_jax.config import UserError
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.runs.checkpoints import Checkpoints
from fireopd_jax.session.finished import evaluate_model
from fireopd_jax.session.session import Session
from fireopd_jax.training.distill import Distillation
from fireopd_jax.training.run import train

MODEL = (
    "{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1, "
    "head_dim: 8, intermediate_size: 32}"
)
BASE = [
    "mesh.data=1",
    "data.path=builtin:addition-1",
    "data.max_prompt_tokens=8",
    "rollout.batch_size=8",
    "rollout.max_tokens=12",
    f"student.architecture={MODEL}",
    "run.steps=4",
    "run.save_every=2",
    "eval.problems=4",
    "eval.samples=1",
    "eval.batch_size=8",
]
RANDOM = f"teacher.architecture={MODEL}"


class Died(BaseException):
    """The process ends here."""


def run(folder, *settings):
    return train(load_config([*BASE, *settings, f"run.dir={folder}"]))


def die_in(monkeypatch, step, folder, *settings):
    """Begin a run that ends in `step`, after its checkpoint of step 2."""
    score = Distillation.score

    def dying(self, params, rollout, state):
        if int(state.updates) == step:
            self.checkpoints.close()
            raise Died
        return score(self, params, rollout, state)

    with monkeypatch.context() as patched:
        patched.setattr(Distillation, "score", dying)
        with pytest.raises(Died):
            run(folder, *settings)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A finished run, whose models serve as frozen teachers."""
    folder = tmp_path_factory.mktemp("runs") / "taught"
    run(folder, RANDOM, "run.steps=1")
    return folder


def test_a_resume_grades_nothing_again(tmp_path, monkeypatch):
    folder, labels = tmp_path / "run", []
    die_in(monkeypatch, 3, folder, RANDOM)
    evaluate = Session.evaluate

    def counted(self, spec, params, label, **options):
        labels.append(label)
        return evaluate(self, spec, params, label, **options)

    monkeypatch.setattr(Session, "evaluate", counted)
    summary = run(folder, RANDOM)
    assert labels == ["student_after"]
    assert {"teacher", "student_before", "student_after"} <= set(summary)


def test_an_older_run_that_lacks_a_key_of_today_is_resumed(tmp_path, monkeypatch):
    folder, sft = tmp_path / "run", "teacher.sft={steps: 1, batch_size: 8}"
    die_in(monkeypatch, 3, folder, RANDOM, sft)
    file = folder / "config.yaml"
    tree = yaml.safe_load(file.read_text())
    del tree["rollout"]["min_tokens"], tree["teachers"]["default"]["sft"]["optim"]["remat"]
    del tree["method"]["filter"]["window"]
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=r"rollout\.min_tokens was 0, is now 2"):
        run(folder, RANDOM, sft, "rollout.min_tokens=2", "method.loss.importance_cap=2")
    assert run(folder, RANDOM, sft)["steps"] == 4


@pytest.mark.slow
def test_a_frozen_teacher_is_read_where_it_is_and_never_copied(taught, tmp_path, monkeypatch):
    teacher = tmp_path / "teacher"
    shutil.copytree(taught / "models" / "student", teacher)
    folder, settings = tmp_path / "run", [f"teacher.path={teacher}", "run.compare=[exopd]"]
    settings += [f"base.path={taught}/models/student_start"]
    die_in(monkeypatch, 3, folder, *settings)
    assert {p.name for p in (folder / "models").iterdir()} == {
        "fit.json", "sources.json", "templates.json", "student_start", "student",
    }  # fmt: skip
    sources = json.loads((folder / "models" / "sources.json").read_text())
    assert list(sources) == ["teacher default", "base"]
    # Another teacher under the same path: the run would be taught by two.
    shutil.rmtree(teacher / "params")
    shutil.copytree(taught / "models" / "student_start" / "params", teacher / "params")
    with pytest.raises(UserError, match=r"^teacher default: params/.* has changed since the run"):
        run(folder, *settings)
    shutil.rmtree(teacher)
    shutil.copytree(taught / "models" / "student", teacher)
    summary = run(folder, *settings)
    # Grades and answers come from the folder that it was read from.
    assert evaluate_model(folder, "teacher_default", []) == summary["teacher"]
    prompts, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "1+2"}\n')
    generate_to_file(
        str(folder), prompts, out, GenerateOptions(max_tokens=4), name="teacher_default"
    )
    assert len(out.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    "names",
    [
        ("a b", "a_b"),
        pytest.param(("demo/math", "demo/code"), marks=pytest.mark.slow),
        pytest.param(("v3.1", ".."), marks=pytest.mark.slow),
    ],
)
def test_teachers_of_like_or_odd_names_stay_apart(tmp_path, names):
    rows = [{"prompt": f"{i}", "answer": "1", "teacher": names[i % 2]} for i in range(24)]
    file, folder = tmp_path / "rows.jsonl", tmp_path / "home" / "run"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    teachers = ", ".join(f'"{name}": {{architecture: {MODEL}}}' for name in names)
    summary = run(
        folder, f"teachers={{{teachers}}}", f"data.path={file}", "data.teacher_column=teacher",
        "data.answer_column=answer", "run.steps=1",
    )  # fmt: skip
    models = sorted(p.name for p in (folder / "models").iterdir() if p.name.startswith("teacher"))
    assert len(models) == 2 and [p.name for p in folder.parent.iterdir()] == ["run"]
    assert set(summary["teacher"]) == set(names)
    for name in names:
        assert evaluate_model(folder, f"teacher_{name}", []) == summary["teacher"][name]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {f"method/keep_fraction_{name}" for name in names} <= set(lines[0])
    with pytest.raises(UserError, match="no model 'teacher_nobody'"):
        evaluate_model(folder, "teacher_nobody", [])


ANSWERS = [
    "data.reference_column=solution",
    "student.sft={steps: 1, batch_size: 8, source: teacher}",
    "teacher.sft={steps: 40, batch_size: 32, optim: {learning_rate: 1e-2}}",
]


@pytest.mark.parametrize(
    "settings",
    [
        ["student.sft={steps: 1, batch_size: 8}", "data.reference_column=solution"],
        pytest.param(ANSWERS, marks=pytest.mark.slow),
        pytest.param(["method/exopd", f"base.architecture={MODEL}"], marks=pytest.mark.slow),
        pytest.param(["student.lora={rank: 2}"], marks=pytest.mark.slow),
    ],
    ids=["references", "answers", "base", "lora"],
)
def test_a_run_answers_and_is_graded_by_its_own_configuration(tmp_path, settings):
    folder, file = tmp_path / "run", tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{i}+1", "sum": f"{i + 1}", "solution": f"={i + 1}"} for i in range(24)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [f"data.path={file}", "data.answer_column=sum"]
    summary = run(folder, RANDOM, *data, *settings, "run.steps=1")
    assert evaluate_model(folder, "student", []) == summary["student_after"]
    assert evaluate_model(folder, "teacher_default", []) == summary["teacher"]
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "1+2"}\n')
    generate_to_file(str(folder), prompts, tmp_path / "out.jsonl", GenerateOptions(max_tokens=4))


def test_a_run_that_held_nothing_out_answers_and_says_why_it_is_not_graded(tmp_path):
    folder, prompts = tmp_path / "run", tmp_path / "p.jsonl"
    run(folder, RANDOM, "run.steps=1", "eval.problems=0")
    prompts.write_text('{"prompt": "1+2"}\n')
    generate_to_file(str(folder), prompts, tmp_path / "out.jsonl", GenerateOptions(max_tokens=4))
    with pytest.raises(UserError, match=r"no held-out problems \(eval\.problems=0\)"):
        evaluate_model(folder, "student", [])


WIDE = MODEL.replace("hidden_size: 16", "hidden_size: 256").replace("size: 32", "size: 512")


def live_bytes():
    """Bytes of all live buffers; a buffer that several arrays show counts once."""
    shards = [shard.data for array in jax.live_arrays() for shard in array.addressable_shards]
    return sum({shard.unsafe_buffer_pointer(): shard.nbytes for shard in shards}.values())


@pytest.mark.slow
def test_saving_and_resuming_hold_one_state_on_the_device(tmp_path, monkeypatch):
    """At most one state and one shard of it, beside the teacher and a batch."""
    seen, state_bytes = {}, {}
    save, restore = Checkpoints.save, Checkpoints.restore

    def watched(name, call):
        def wrapper(self, *arguments, **options):
            before = live_bytes()
            out = call(self, *arguments, **options)
            seen.setdefault(name, []).append((before, live_bytes()))
            if name == "save":
                state_bytes["state"] = sum(leaf.nbytes for leaf in jax.tree.leaves(arguments[1]))
                leaves = jax.tree.leaves(arguments[1])
                state_bytes["shard"] = max(leaf.nbytes for leaf in leaves)
            return out

        return wrapper

    settings = [RANDOM, f"student.architecture={WIDE}", "eval.problems=0"]
    idle = live_bytes()
    monkeypatch.setattr(Checkpoints, "save", watched("save", save))
    monkeypatch.setattr(Checkpoints, "restore", watched("restore", restore))
    die_in(monkeypatch, 3, tmp_path / "run", *settings)
    slack = 2**18  # teacher, prompts, one batch and its scores
    limit = idle + state_bytes["state"] + state_bytes["shard"] + slack
    assert state_bytes["state"] > 4 * (state_bytes["shard"] + slack)
    assert all(max(pair) < limit for pair in seen["save"]), (seen, state_bytes, idle)
    jax.clear_caches()
    idle = live_bytes()
    run(tmp_path / "run", *settings)
    ((before, after),) = seen["restore"]
    assert before < idle + slack, "nothing of the state is made before it is read"
    assert after < idle + state_bytes["state"] + slack


FLYING = [
    "rollout.overprovision=0.5",
    "rollout.max_tokens=24",
    "method.loss.importance_cap=2",
    # So that responses end after different numbers of tokens.
    "student.sft={steps: 20, batch_size: 16, optim: {learning_rate: 1e-2}}",
]


def test_rows_in_flight_are_in_the_checkpoint(tmp_path, monkeypatch):
    run(tmp_path / "whole", RANDOM, *FLYING)
    die_in(monkeypatch, 3, tmp_path / "killed", RANDOM, *FLYING)
    run(tmp_path / "killed", RANDOM, *FLYING)
    of_whole, of_killed = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    )
    keys = [key for key in of_whole[0] if key.split("/")[0] in ("rollout", "loss", "completions")]
    assert {"rollout/unfinished_rows", "rollout/stale_fraction", "loss"} <= set(keys)
    for one, other in zip(of_whole, of_killed, strict=True):
        for key in keys:
            assert one.get(key) == other.get(key), key
    hashes = [
        json.loads((tmp_path / name / "summary.json").read_text())["params_sha256"]
        for name in ("whole", "killed")
    ]
    assert hashes[0] == hashes[1]
    behind = [each["rollout/updates_behind_max"] for each in of_whole if "loss" in each]
    assert behind[0] == 0 and max(behind) >= 1
    log = (tmp_path / "whole" / "logs" / "run.log").read_text()
    assert "rollout.overprovision=0.5: some tokens are of the parameters of earlier steps" in log
    assert "responses in flight are not learned from" in log


def test_a_checkpoint_has_no_fields_for_what_a_run_does_not_use(tmp_path):
    run(tmp_path, RANDOM, "run.steps=2")
    saved = json.loads((tmp_path / "checkpoints" / "2" / "state" / "_METADATA").read_text())
    fields = {key.split("'")[1] for key in saved["tree_metadata"]}
    # Those of every run so far; another one would make their checkpoints unreadable.
    assert fields == {"params", "opt_state", "updates", "skipped", "stages", "average"}
