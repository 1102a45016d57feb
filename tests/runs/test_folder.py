import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fireopd_jax.config import UserError
from fireopd_jax.recipe.run import RunConfig
from fireopd_jax.runs.folder import environment, open_run, state_of
from fireopd_jax.runtime.files import plain

RESOLVED = {
    "run": {"steps": 3, "seed": 0, "log_every": 1},
    "optim": {"learning_rate": 1e-6, "betas": (0.9, 0.95), "clip": None},
}

HOLD = """
import sys, time
from pathlib import Path
from fireopd_jax.runs.folder import open_run
from fireopd_jax.recipe.run import RunConfig
folder = open_run(RunConfig(dir=sys.argv[1]), {"run": {"steps": 3}})
print("held", flush=True)
time.sleep(60)
"""


def changed(**sections) -> dict:
    return {
        name: {**RESOLVED.get(name, {}), **keys} for name, keys in (RESOLVED | sections).items()
    }


def held_elsewhere(path: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_names_are_numbered_and_latest_follows(tmp_path):
    root = tmp_path / "runs"
    paths = []
    for _ in range(3):
        with open_run(RunConfig(name="a"), RESOLVED, root=root) as folder:
            assert folder.state == "new"
            paths.append(folder.path)
            assert (root / "latest").resolve() == folder.path.resolve()
    assert [path.name for path in paths] == ["a", "a-2", "a-3"]
    assert os.readlink(root / "latest") == "a-3"
    assert {path.name for path in root.iterdir()} == {"a", "a-2", "a-3", "latest"}


@pytest.mark.parametrize("name", ["", "..", "a/b", "latest"])
def test_a_name_is_a_plain_name(tmp_path, name):
    with pytest.raises(UserError, match=r"run\.name"):
        open_run(RunConfig(name=name), RESOLVED, root=tmp_path)


@pytest.mark.parametrize("part", ["a [1]", "a\\b", "a\udcff"])
def test_a_path_that_checkpoints_could_not_be_read_back_from_is_refused(tmp_path, part):
    for dry in (False, True):
        with pytest.raises(UserError, match="cannot be read back from a path with"):
            config = RunConfig(dir=str(tmp_path / part.replace("\udcff", "[")))
            state_of(config, RESOLVED) if dry else open_run(config, RESOLVED)
    with pytest.raises(UserError, match="cannot be read back from a path with"):
        open_run(RunConfig(name="a"), RESOLVED, root=tmp_path / part)
    assert not any(tmp_path.iterdir())


def test_an_empty_folder_is_fine_and_an_interrupted_run_resumes(tmp_path):
    config = RunConfig(dir=str(tmp_path))
    with open_run(config, RESOLVED) as folder:
        assert folder.state == "new"
        assert folder.config.exists() and folder.checkpoints.is_dir()
    with open_run(config, RESOLVED) as folder:
        assert folder.state == "resume"
    with pytest.raises(UserError, match="never"):
        open_run(RunConfig(dir=str(tmp_path), resume="never"), RESOLVED)


def test_a_complete_run_says_so(tmp_path):
    config = RunConfig(dir=str(tmp_path))
    with open_run(config, RESOLVED) as folder:
        folder.write_json("summary.json", {"loss": float("nan"), "steps": np.int64(3)})
    assert json.loads(folder.summary.read_text()) == {"loss": "nan", "steps": 3}
    with open_run(config, RESOLVED) as folder:
        assert folder.state == "complete"


def test_another_configuration_is_refused_with_both_values(tmp_path):
    config = RunConfig(dir=str(tmp_path))
    open_run(config, RESOLVED).close()
    other = changed(run={"steps": 5}, optim={"learning_rate": 2e-6, "decay": 0.1})
    with pytest.raises(UserError) as caught:
        open_run(config, other)
    message = str(caught.value)
    assert "run.steps was 3, is now 5" in message
    assert "optim.learning_rate was 1e-06, is now 2e-06" in message
    assert "optim.decay was (absent), is now 0.1" in message
    assert "betas" not in message and "\n" not in message
    # The refusal gives the lock back and changes nothing.
    assert open_run(config, RESOLVED).state == "resume"


def test_at_most_eight_differences_are_shown(tmp_path):
    config = RunConfig(dir=str(tmp_path))
    open_run(config, RESOLVED).close()
    with pytest.raises(UserError, match="and 2 more") as caught:
        open_run(config, changed(extra={f"key_{i}": i for i in range(10)}))
    assert str(caught.value).count("is now") == 8


def test_keys_that_only_change_what_is_shown_may_change(tmp_path):
    config = RunConfig(dir=str(tmp_path))
    open_run(config, RESOLVED).close()
    with open_run(config, changed(run={"log_every": 7, "resume": "auto", "keep": 9})) as folder:
        assert folder.state == "resume"


def test_the_budget_of_a_served_teacher_may_change_but_not_what_it_answers(tmp_path):
    config = RunConfig(dir=str(tmp_path))
    served = {"url": "http://localhost:1/v1", "model": "m", "max_tokens_budget": 10, "retries": 6}

    def of(**keys):
        return changed(teachers={"a.b": {"served": served | keys, "retries": keys.get("other")}})

    open_run(config, of()).close()
    with open_run(config, of(max_tokens_budget=None, retries=1)) as folder:
        assert folder.state == "resume"
    for key, value in {"url": "http://localhost:2/v1", "model": "n", "other": 1}.items():
        with pytest.raises(UserError, match=r"another configuration: teachers\.a\.b\."):
            open_run(config, of(**{key: value}))


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        open_run(RunConfig(dir=str(tmp_path)), RESOLVED)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="not a folder"):
        open_run(RunConfig(dir=str(tmp_path / "thesis.tex")), RESOLVED)


def test_a_live_process_keeps_its_folder_and_a_closed_one_frees_it(tmp_path):
    config = RunConfig(dir=str(tmp_path))
    folder = open_run(config, RESOLVED)
    with pytest.raises(UserError, match=f"pid {os.getpid()}"):
        open_run(config, RESOLVED)
    folder.close()
    folder.close()
    open_run(config, RESOLVED).close()


@pytest.mark.kill
def test_a_killed_process_blocks_nobody(tmp_path):
    config, resolved = RunConfig(dir=str(tmp_path / "run")), {"run": {"steps": 3}}
    process = held_elsewhere(tmp_path / "run")
    try:
        with pytest.raises(UserError, match=f"pid {process.pid}"):
            open_run(config, resolved)
    finally:
        process.kill()
        process.communicate()
    with open_run(config, resolved) as folder:
        assert folder.state == "resume"


@pytest.mark.kill
def test_a_process_killed_before_its_configuration_leaves_an_empty_run(tmp_path):
    (tmp_path / ".lock").write_text("1\n")
    (tmp_path / ".writing-config.yaml-1").write_text("ru")
    with open_run(RunConfig(dir=str(tmp_path)), RESOLVED) as folder:
        assert folder.state == "new"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    with open_run(RunConfig(dir=str(tmp_path)), RESOLVED) as folder:
        folder.write_json("env.json", {"a": 1})
        with pytest.raises(TypeError):
            folder.write_json("env.json", {"a": object()})
        assert json.loads((folder.path / "env.json").read_text()) == {"a": 1}
        assert not list(folder.path.glob(".writing-*"))


def test_latest_is_not_touched_by_a_run_elsewhere(tmp_path):
    root = tmp_path / "runs"
    open_run(RunConfig(), RESOLVED, root=root).close()
    open_run(RunConfig(dir=str(tmp_path / "elsewhere")), RESOLVED, root=root).close()
    assert os.readlink(root / "latest") == "run"
    open_run(RunConfig(dir=str(root / "own")), RESOLVED, root=root).close()
    assert os.readlink(root / "latest") == "own"


def test_a_folder_called_latest_is_not_replaced(tmp_path):
    (tmp_path / "latest").mkdir()
    open_run(RunConfig(), RESOLVED, root=tmp_path).close()
    assert (tmp_path / "latest").is_dir() and not (tmp_path / "latest").is_symlink()


def test_plain_is_json():
    value = {"a": np.float32("inf"), 1: (np.arange(2), float("nan")), "path": Path("x")}
    assert plain(value) == {"a": "inf", "1": [[0, 1], "nan"], "path": "x"}


def test_the_environment_names_versions_and_devices():
    described = environment(["cpu:0"])
    assert described["devices"] == ["cpu:0"]
    assert described["packages"]["numpy"] == np.__version__
    assert described["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    json.dumps(described)


def test_neither_runs_nor_tracking_start_jax():
    code = "import fireopd_jax.runs.folder, fireopd_jax.runs.tracking"
    code += "; import sys; print('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout == "False\n"


def test_a_run_is_resumed_through_the_link_to_the_latest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    open_run(RunConfig(name="a"), RESOLVED).close()
    with open_run(RunConfig(dir="runs/latest"), RESOLVED) as folder:
        assert folder.state == "resume"
    assert os.readlink("runs/latest") == "a" and (tmp_path / "runs/latest/config.yaml").is_file()


@pytest.mark.parametrize(
    "text", ["7e12345", "1e5", "0o17", "010", "1:30", "2024-01-01", "yes", ".5e3"]
)
def test_texts_that_a_version_of_yaml_reads_as_numbers_stay_texts(tmp_path, text):
    config, resolved = RunConfig(dir=str(tmp_path)), changed(data={"revision": text})
    open_run(config, resolved).close()
    with open_run(config, resolved) as folder:
        assert folder.state == "resume"
    other = changed(data={"revision": text + "x"})
    with pytest.raises(UserError, match=f"was {text!r}, is now"):
        open_run(config, other)
