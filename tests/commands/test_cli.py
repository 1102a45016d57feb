"""The command line: quick help, one line for a mistake, exit statuses."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
import yaml

from fireopd_jax.config import dotted
from fireopd_jax.recipe.keys import shipped_schema
from fireopd_jax.recipe.schema import as_tree, load_config
from tests.cases import one_device
from tests.commands.calling import call

COMMAND = "from fireopd_jax.cli import main; main()"
HEAVY = "{'jax', 'flax', 'transformers', 'datasets', 'numpy', 'orbax', 'rich'}"


def process(*arguments, code=COMMAND, **kwargs):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=one_device(),
        **kwargs,
    )


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["eval", "--help"], ["chat", "--help"]]
)
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('HEAVY', sorted({HEAVY} & set(sys.modules))))\n{COMMAND}"
    )
    done = process(*arguments, code=code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("HEAVY []")


@pytest.mark.parametrize("command", ["train", "sft"])
def test_help_is_short_and_points_to_the_keys(monkeypatch, capsys, command):
    assert call(monkeypatch, command, "--help") == 0
    text = capsys.readouterr().out
    assert text.count("\n") < 60 and "fireopd keys" in text


def test_keys_lists_every_key_and_those_of_models_once(monkeypatch, capsys):
    assert call(monkeypatch, "keys") == 0
    text = capsys.readouterr().out
    listed = [line.strip().partition(":")[0] for line in text.splitlines()]
    shared = {field.key[1:] for field in shipped_schema().fields() if field.key[0] == "student"}
    for field in shipped_schema().fields():
        own = field.key[2:] if field.key[0] == "teachers" else field.key[1:]
        again = field.key[0] in ("teachers", "base") and own in shared
        if field.type != "section" and len(field.key) > 1:
            assert (dotted(field.key) in listed) != again, field.key
    assert "Peak learning rate." in text and "teachers.NAME.eos_alias" in text


@pytest.mark.parametrize(
    "prefix, there, not_there",
    [
        ("rollout", "rollout.top_p: number", "optim."),
        ("optim.learning_rate", "Peak learning rate.", "optim.beta1"),
        ("method.filter", "method.filter (kind: tip):", "method.loss"),
        ("teacher.path", "teachers.NAME.path: string | null = null", "student."),
        ("teachers.math.sft", "teachers.NAME.sft.steps", "student."),
        ("base", "base.path", "student."),
    ],
)
def test_keys_of_one_section(monkeypatch, capsys, prefix, there, not_there):
    assert call(monkeypatch, "keys", prefix) == 0
    text = capsys.readouterr().out
    assert there in text and not_there not in text


def test_keys_of_a_section_that_is_not_there(monkeypatch, capsys):
    assert call(monkeypatch, "keys", "rolout") == 2
    assert "did you mean 'rollout'?" in capsys.readouterr().err


def test_a_mistyped_key_is_answered_before_anything_heavy_is_imported():
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('HEAVY', sorted({HEAVY} & set(sys.modules))))\n{COMMAND}"
    )
    done = process("train", "configs/quickstart.yaml", "optim.learning_rte=1", code=code)
    assert done.returncode == 2 and "'optim.learning_rate'" in done.stderr
    assert done.stdout.rstrip().endswith("HEAVY []")


def test_help_names_the_commands(monkeypatch, capsys):
    assert call(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    assert all(
        name in text for name in ("train", "sft", "eval", "generate", "export", "keys", "env")
    )
    assert "schema" not in text


@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_dry_run_prints_what_loads_to_the_same(monkeypatch, capsys, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    settings = ["quickstart.yaml", "optim.learning_rate=1e-6", "eval.problems=0"]
    assert call(monkeypatch, command, "--dry-run", "--full", *settings) == 0
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    assert load_config([str(file)]) == load_config(settings)
    assert yaml.safe_load(file.read_text()) == json.loads(
        json.dumps(as_tree(load_config(settings)))
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["printed.yaml"]


def test_a_mistake_is_one_line_and_status_2(tmp_path):
    done = process("train", "quickstart.yaml", "optim.learning_rte=1", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "fireopd: command line: unknown key 'optim.learning_rte' "
        "(did you mean 'optim.learning_rate'?)\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["train"], "teachers: none is given"),
        (["train", "nowhere.yaml"], "nowhere.yaml: no such configuration file"),
        (["train", "smoke", "data.path=nowhere.jsonl"], "no file 'nowhere.jsonl'"),
        (["train", "smoke", "data.path=builtin:adition-2"], "builtin:addition-2"),
        (["train", "smoke", "rollout.group_size=3"], "rollout.group_size=3 does not divide"),
        (["train", "smoke", "run.compare=[fire_odp]"], "fire_opd"),
        (["train", "smoke", "run.name=a/b"], "run.name"),
        (["sft", "smoke", "optim.beta1=2"], "optim.beta1"),
        (["eval", "nowhere"], "nowhere: no such folder; expected that of a run"),
        (["eval", "nowhere", "run.seed=3"], "only eval.*"),
        (["export", "nowhere", "--to", "out"], "nowhere: no such folder"),
        (["export", "nowhere", "--to", "out", "--dtype", "bf16"], "--dtype bf16: expected float32"),
        (["generate", "nowhere", "--prompts", "p.jsonl"], "--prompts: no file 'p.jsonl'"),
        (["generate", "nowhere", "--prompts", "builtin:addition-1"], "no such folder"),
    ],
)
def test_mistakes_name_what_is_wrong(monkeypatch, capsys, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *arguments) == 2
    printed = capsys.readouterr()
    *progress, error = printed.err.splitlines()  # what was going on, then the one line
    assert words in error and error.startswith("fireopd: ")
    assert not any(words in line or "Traceback" in line for line in progress)


@pytest.mark.parametrize(
    "option",
    ["--temperature=1e300", "--temperature=inf", "--samples=999999999", "--top-k=9999999999"],
)
def test_a_number_that_no_device_takes_is_refused_by_its_option(monkeypatch, capsys, option):
    assert call(monkeypatch, "generate", "m", option) == 2
    assert option.split("=")[0] in capsys.readouterr().err
    assert call(monkeypatch, "export", "m", "--to", "x", "--max-shard-gib", "inf") == 2


def test_an_unknown_option_or_command_is_refused(monkeypatch, capsys):
    assert call(monkeypatch, "trian") == 2
    assert call(monkeypatch, "train", "--dryrun") == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_error_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("fireopd_jax.recipe.schema.load", lambda settings: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(monkeypatch, "train", "smoke")


def test_an_interrupt_is_status_130(monkeypatch, capsys):
    from fireopd_jax.runtime.signals import Interrupted

    def stop(settings):
        raise Interrupted("distil student: stopped after step 2 of 5")

    monkeypatch.setattr("fireopd_jax.recipe.schema.load", stop)
    assert call(monkeypatch, "train", "smoke") == 130
    assert capsys.readouterr().err == "fireopd: distil student: stopped after step 2 of 5\n"


def test_the_environment_is_json(monkeypatch, capsys):
    assert call(monkeypatch, "env") == 0
    described = json.loads(capsys.readouterr().out)
    assert len(described["devices"]) == 8 and described["packages"]["jax"]


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_the_version_imports_nothing_heavy(option):
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('HEAVY', sorted({HEAVY} & set(sys.modules))))\n{COMMAND}"
    )
    done = process(option, code=code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"fireopd {version('fireopd-jax')}\nHEAVY []\n"


def test_the_module_runs_as_the_command():
    arguments = [sys.executable, "-m", "fireopd_jax", "-V"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, env=one_device())
    assert done.stdout == f"fireopd {version('fireopd-jax')}\n"


def test_the_schema_is_written_for_every_section(monkeypatch, tmp_path):
    assert call(monkeypatch, "schema", str(tmp_path / "schema.json")) == 0
    schema = json.loads((tmp_path / "schema.json").read_text())
    assert set(schema["properties"]) == set(as_tree(load_config(["smoke"])))
