"""A run's programs are compiled, and compared with the device, before anything is computed."""

import json

import pytest

from fireopd_jax.config import UserError
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.training.run import train

TINY = [
    "smoke", "run.steps=2", "run.completions_every=0", "mesh.data=1", "data.max_prompt_tokens=16",
    "rollout.batch_size=8", "rollout.max_tokens=16", "eval.problems=8", "eval.samples=1",
]  # fmt: skip


def run_of(folder, *more):
    return train(load_config([*TINY, f"run.dir={folder}", *more]))


def log_of(folder):
    return (folder / "logs" / "run.log").read_text()


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("plan") / "run"
    run_of(folder)
    return folder


def test_nothing_compiles_in_any_step(done):
    lines = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    assert [line["perf/compilations"] for line in lines if "loss" in line] == [0, 0]


def test_the_programs_are_compared_before_the_first_evaluation(done):
    text = log_of(done)
    assert "memory: rollout " in text
    assert "score " in text[text.index("memory: ") :]


def test_the_choice_is_recorded(done):
    whole = {"micro_batch_size": None, "remat": "none", "micro_batch_tokens": 256}
    record = json.loads((done / "models" / "fit.json").read_text())
    assert record == {"method.score": whole, "optim": whole | {"remat": "dots"}}


def test_a_device_too_small_is_refused_before_any_evaluation(tmp_path, monkeypatch):
    monkeypatch.setenv("FIREOPD_MEMORY_GIB", "0.0002")
    with pytest.raises(UserError) as caught:
        run_of(tmp_path / "run")
    assert "GiB of memory, the device has 0.00020; expected a smaller" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "run" / "eval").glob("*"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_resumed_run_keeps_its_choice(tmp_path, monkeypatch):
    monkeypatch.setenv("FIREOPD_MEMORY_GIB", "0.0002")
    with pytest.raises(UserError):
        run_of(tmp_path / "run")
    before = json.loads((tmp_path / "run" / "models" / "fit.json").read_text())
    assert before["optim"]["micro_batch_tokens"] == 32
    assert before["optim"]["remat"] == "full"
    monkeypatch.delenv("FIREOPD_MEMORY_GIB")
    summary = run_of(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "models" / "fit.json").read_text()) == before
    assert "optim.micro_batch_tokens=32, remat=full: the update needs" in log_of(tmp_path / "run")
    assert summary["steps"] == 2


def test_a_run_without_answers_is_not_graded(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(40)))
    settings = [each for each in TINY if not each.startswith("eval.")]
    tiny = load_config([*settings, "eval.problems=null", f"data.path={rows}", "run.steps=1",
                        f"run.dir={tmp_path / 'run'}"])  # fmt: skip
    summary = train(tiny)
    assert "no row has an answer: nothing is held out" in log_of(tmp_path / "run")
    assert "student_after" not in summary
    assert "40 to train on, 0 held out" in log_of(tmp_path / "run")
