"""Layers, overrides and the one-line errors."""

import os
from pathlib import Path

import pytest
import yaml

from fireopd_jax.config import UserError, dotted, nearest, validate
from fireopd_jax.recipe.keys import shipped_schema
from fireopd_jax.recipe.layers import (
    find_config,
    overlay,
    read_file,
    read_layers,
    read_override,
    split_key,
)
from fireopd_jax.recipe.schema import Config, as_tree, load, load_config

TEACHER = "teacher.architecture.hidden_size=32"


def write(folder, name, text):
    file = folder / name
    file.write_text(text)
    return str(file)


def refusal(arguments):
    with pytest.raises(UserError) as caught:
        load_config(arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_later_files_and_overrides_win_and_siblings_stay(tmp_path):
    a = write(tmp_path, "a.yaml", "optim: {learning_rate: 1e-3, beta1: 0.5}\nrun: {steps: 7}")
    b = write(tmp_path, "b.yaml", "optim:\n  learning_rate: 2e-3\n")
    config = load_config([a, b, TEACHER, "run.seed=3"])
    assert (config.optim.learning_rate, config.optim.beta1, config.optim.beta2) == (
        2e-3,
        0.5,
        0.999,
    )
    assert (config.run.steps, config.run.seed) == (7, 3)
    assert load_config([b, a, TEACHER]).optim.learning_rate == 1e-3
    # Overrides win wherever they stand, the last of them over the others.
    config = load_config(["optim.learning_rate=5e-3", a, TEACHER, "run.steps=8", "run.steps=9"])
    assert (config.optim.learning_rate, config.run.steps) == (5e-3, 9)


def test_an_empty_file_changes_nothing(tmp_path):
    empty = write(tmp_path, "a.yaml", "# nothing\n")
    assert load_config([empty, TEACHER]) == load_config([TEACHER])


def test_defaults_written_out_read_back_to_the_same(tmp_path):
    config = load_config([TEACHER, "run.compare=[opd]", "method.filter.kind=keep_all"])
    # What is off by default has no effect: only the checks know what the user wrote.
    text = yaml.safe_dump(as_tree(config))
    assert validate(Config, yaml.safe_load(text), {}) == config


def test_a_layer_that_names_a_kind_starts_the_section_anew_and_one_without_merges(tmp_path):
    a = write(tmp_path, "a.yaml", "method: {filter: {kind: teacher_quantile, drop_fraction: 0.5}}")
    same = write(tmp_path, "b.yaml", "method: {filter: {kind: teacher_quantile, scope: batch}}")
    other = write(tmp_path, "c.yaml", "method: {filter: {kind: keep_all}}")
    more = write(tmp_path, "d.yaml", "method: {filter: {scope: teacher}}")
    assert load_config([a, same, TEACHER]).method.filter.drop_fraction == 0.2
    assert load_config([a, other, TEACHER]).method.filter.kind == "keep_all"
    merged = load_config([a, more, TEACHER]).method.filter
    assert (merged.drop_fraction, merged.scope) == (0.5, "teacher")
    back = load_config([a, other, same, TEACHER])
    assert back.method.filter.drop_fraction == 0.2
    assert back.method.loss.clip == 0.2


def test_the_order_of_overrides_does_not_matter():
    """All overrides are one layer: a kind does not undo earlier overrides of its section."""
    kind, value = "method.filter.kind=random_drop", "method.filter.drop_fraction=0.4"
    for order in ([kind, value], [value, kind]):
        assert load_config([TEACHER, *order]).method.filter.drop_fraction == 0.4
    assert load_config([TEACHER, "run.steps=3", "run.steps=4"]).run.steps == 4


def test_a_path_replaces_an_embedded_model(tmp_path):
    a = write(
        tmp_path, "a.yaml",
        "student: {architecture: {hidden_size: 8}, sft: {steps: 3}}\n"
        "teacher: {architecture: {hidden_size: 8}}",
    )  # fmt: skip
    config = load_config([a, "student.path=runs/x/models/student", "teacher.path=y"])
    assert config.student.path == "runs/x/models/student" and config.student.sft is None
    assert config.student.architecture.hidden_size == 128
    assert config.teachers["default"].path == "y"
    both = [a, "student.path=x", "student.sft.steps=5"]
    assert load_config(both).student.sft.steps == 5


def test_teacher_is_short_for_the_default_teacher(tmp_path):
    a = write(tmp_path, "a.yaml", "teacher: {tokenizer: other}\nteachers: {second: {}}")
    config = load_config([a, TEACHER, "data.teacher_column=teacher"])
    assert sorted(config.teachers) == ["default", "second"]
    assert config.teachers["default"].tokenizer == "other"
    assert config.teachers["default"].architecture.hidden_size == 32
    bad = write(tmp_path, "b.yaml", "run: {steps: 3}\nteacher:\n  tokeniser: x\n")
    message = refusal([bad])
    assert message.startswith(f"{bad}:3: ") and "'teachers.default.tokenizer'" in message


def test_numbers_that_yaml_takes_for_text():
    assert load_config([TEACHER, "optim.learning_rate=1e-6"]).optim.learning_rate == 1e-6


def test_values_are_yaml():
    config = load_config(
        [
            TEACHER,
            "run.compare=[opd, fire_opd_released]",
            "data.path=[a.jsonl, b.parquet]",
            "optim.clip_norm=null",
        ]
    )
    assert config.run.compare == ("opd", "fire_opd_released")
    assert config.data.path == ("a.jsonl", "b.parquet")
    assert config.optim.clip_norm is None
    layer = read_override("a.b=x=y")
    assert (layer.tree, layer.origins) == ({"a": {"b": "x=y"}}, {("a", "b"): "command line"})
    assert read_override("a={b").tree == {"a": "{b"}


@pytest.mark.parametrize("text", ["=3", "a..b=1", ".a=1", "a.=1"])
def test_a_key_has_a_name_between_its_dots(text):
    assert "dotted key" in refusal([text])


def test_errors_name_file_and_line(tmp_path):
    a = write(tmp_path, "a.yaml", "run:\n  steps: 3\noptim:\n  # peak\n  learning_rate: -1\n")
    message = refusal([a, TEACHER])
    assert message.startswith(f"{a}:5: optim.learning_rate: ") and "-1" in message
    message = refusal([a, TEACHER, "optim.learning_rate=fast"])
    assert message.startswith("command line: optim.learning_rate: ") and "'fast'" in message
    b = write(tmp_path, "b.yaml", "method:\n  filter: {kind: keep_none}\n")
    message = refusal([b, TEACHER])
    assert message.startswith(f"{b}:2: method.filter.kind") and "keep_all" in message
    message = refusal([TEACHER, "data.path=[1.5]"])
    assert message.startswith("command line: data.path")
    assert "optim" in refusal([TEACHER, "optim=3"])
    assert "teachers" in refusal(["teachers=null"])


def test_a_validator_of_several_fields_names_their_section(tmp_path):
    a = write(tmp_path, "a.yaml", "student:\n  architecture:\n    head_dim: 3\n")
    message = refusal([a, TEACHER])
    assert message.startswith(f"{a}:2: student.architecture: head_dim must be even")


def test_unknown_keys_are_answered_by_the_nearest(tmp_path):
    a = write(tmp_path, "a.yaml", "optim:\n  learning_rte: 1\n")
    assert refusal([a]) == (
        f"{a}:2: unknown key 'optim.learning_rte' (did you mean 'optim.learning_rate'?)"
    )
    assert "'optim.learning_rate'" in refusal(["learning_rate=1"])
    assert "did you mean" not in refusal(["zzz.qqq=1"])
    assert "'student.sft.optim.beta1'" in refusal(["student.sft.optim.bta1=0.9"])
    assert "'teachers.math.sft.steps'" in refusal(["teachers.math.sft.stps=3"])


@pytest.mark.parametrize(
    "key, ours",
    [
        ("max_completion_length", "rollout.max_tokens"),
        ("optim.lr", "optim.learning_rate"),
        ("rollout.num_generations", "rollout.group_size"),
        ("traj_skip_percentile", "method.filter.drop_fraction"),
        ("actor.entropy_alpha", "method.reweight.alpha"),
    ],
)
def test_names_of_other_tools_are_answered_by_ours(key, ours):
    assert refusal([f"{key}=1"]) == f"command line: unknown key {key!r}: use {ours!r}"


def test_a_key_of_another_kind_is_told_so():
    message = refusal([TEACHER, "method.filter.kind=keep_all", "method.filter.drop_fraction=0.1"])
    assert "is a key of another kind of 'method.filter'" in message


def test_a_key_that_stands_twice(tmp_path):
    a = write(tmp_path, "a.yaml", "run:\n  steps: 1\n  seed: 2\n  steps: 3\n")
    assert refusal([a]) == f"{a}:4: run.steps is set twice"
    # The same name in two sections is another key.
    b = write(tmp_path, "b.yaml", "run: {steps: 3}\nstudent: {sft: {steps: 4}}\n")
    assert load_config([b, TEACHER]).student.sft.steps == 4


@pytest.mark.parametrize("text", ["run: {steps: 3", "run: !!python/object:os.system {}", "a: b: c"])
def test_what_is_not_yaml(tmp_path, text):
    a = write(tmp_path, "a.yaml", text)
    assert refusal([a]).startswith(f"{a}:1: not valid YAML: ")


def test_what_is_not_text_or_not_a_mapping(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    assert "a.yaml:1: the text is UTF-16; save it as UTF-8" in refusal([str(tmp_path / "a.yaml")])
    (tmp_path / "a.yaml").write_bytes(b"run:\n  name: caf\xe9\n")
    assert "a.yaml:2: the text is not UTF-8" in refusal([str(tmp_path / "a.yaml")])
    assert "key: value" in refusal([write(tmp_path, "b.yaml", "- 1\n- 2\n")])
    assert "c.yaml:1: expected a name" in refusal([write(tmp_path, "c.yaml", "5: x\n")])


def test_a_file_that_is_not_there():
    assert "did you mean 'quickstart.yaml'?" in refusal(["quickstrat.yaml"])
    assert "no such configuration file" in refusal(["nothing/like/it.yaml"])


def test_the_nearest_file_may_be_the_user_s_own(tmp_path):
    write(tmp_path, "mine.yaml", "")
    assert f"did you mean '{tmp_path}/mine.yaml'?" in refusal([str(tmp_path / "mien.yaml")])


def test_what_is_no_plain_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    os.mkfifo("pipe.yaml")
    for name in ("configs", ".", ".."):
        assert refusal([name]) == f"{name}: a folder; expected a configuration, a .yaml file"
    assert refusal(["pipe.yaml"]).startswith("pipe.yaml: no plain file; expected")
    assert refusal(["-"]).startswith("-: a configuration is not read from standard input")


def test_a_section_of_comments_changes_nothing_and_one_value_is_no_section(tmp_path):
    a = write(tmp_path, "a.yaml", "run:\n  # steps: 3\ndata:\n")
    assert load_config([a, TEACHER]) == load_config([TEACHER])
    assert "run: input should be a dictionary" in refusal(["run=3", TEACHER])


def test_shipped_files_are_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("configs/smoke.yaml", "smoke.yaml", "smoke"):
        assert find_config(name).name == "smoke.yaml"
    for name in ("method/opd", "opd", "configs/method/opd.yaml"):
        assert find_config(name).parent.name == "method"
    own = write(tmp_path, "smoke.yaml", "run: {steps: 5}")
    assert find_config("smoke.yaml").resolve() == Path(own)


def test_overlay_changes_neither_layer():
    base, layer = {"a": {"b": 1}}, {"a": {"c": {"d": 2}}}
    out = overlay(base, layer)
    out["a"]["c"]["d"] = 3
    assert base == {"a": {"b": 1}} and layer == {"a": {"c": {"d": 2}}}


def test_origins_are_lines(tmp_path):
    a = write(tmp_path, "a.yaml", "run:\n  steps: 3\n\noptim: {beta1: 0.5}\n")
    layer = read_file(tmp_path / "a.yaml")
    assert layer.tree == {"run": {"steps": 3}, "optim": {"beta1": 0.5}}
    assert layer.origins[("run", "steps")] == f"{a}:2"
    assert layer.origins[("optim", "beta1")] == f"{a}:4"


def test_nearest_says_nothing_of_what_is_far():
    assert nearest("stduent", ["student"]) == " (did you mean 'student'?)"
    assert nearest("xyz", ["student"]) == ""


def test_a_mistyped_suffix_is_no_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "'smoke.yaml'" in refusal(["configs/smoke.ymal"])
    assert "no such configuration file" in refusal(["smoke.txt"])


def test_the_files_that_were_used_are_noted(tmp_path):
    a = write(tmp_path, "a.yaml", "run: {steps: 7, compare: [opd]}")
    (note,) = load([a, "smoke"]).notes
    shipped = [str(find_config(name)) for name in ("smoke", "method/opd")]
    assert note == f"configuration: {a}, {shipped[0]}, {shipped[1]}"
    assert load(["smoke", "run.seed=1"]).notes[0].endswith("smoke.yaml, command line")


@pytest.mark.parametrize(
    "text, name", [("2024", "2024"), ("1e3", "1e3"), ("007", "007"), ("2024-11-29", "2024-11-29"),
                   ("yes", "yes"), ("1_0", "1_0"), ("'x'", "x")]
)  # fmt: skip
def test_a_name_may_look_like_a_number(tmp_path, text, name):
    assert load_config([TEACHER, f"run.name={text}"]).run.name == name
    file = write(tmp_path, "a.yaml", f"run: {{name: {text}}}")
    assert load_config([TEACHER, file]).run.name == name


def test_null_is_no_name():
    assert load_config([TEACHER, "run.dir=null"]).run.dir is None


@pytest.mark.parametrize("text", ["true", "yes", "off"])
@pytest.mark.parametrize("key", ["run.steps", "optim.learning_rate", "optim.clip_norm"])
def test_yes_is_no_number(tmp_path, key, text):
    message = refusal([TEACHER, f"{key}={text}"])
    assert message.startswith(f"command line: {key}: expected ") and repr(text) in message
    section, name = key.split(".")
    file = write(tmp_path, "a.yaml", f"{section}:\n  {name}: {text}")
    assert refusal([TEACHER, file]).startswith(f"{file}:2: {key}: expected ")
    assert load_config([TEACHER, "run.export=yes"]).run.export is True


@pytest.mark.parametrize(
    "words, quoted",
    [
        ("student.lora={rank: 16}", "'student.lora={rank: 16}'"),
        ("student.lora={rank: 16, alpha: 32} run.seed=1", "'student.lora={rank: 16, alpha: 32}'"),
        ("run.compare=[opd, gkd]", "'run.compare=[opd, gkd]'"),
    ],
)
def test_a_value_that_the_shell_has_split_is_told_how_to_quote_it(words, quoted):
    message = refusal([TEACHER, *words.split(" ")])
    assert "quote it" in message and message.endswith(quoted)
    assert "no such configuration file" not in message


def test_names_with_dots_are_quoted_in_keys(tmp_path):
    assert split_key('teachers."a.b c".path') == ("teachers", "a.b c", "path")
    assert split_key("a.b") == ("a", "b") and split_key('""') == ("",)
    for key in [("teachers", "a.b", "path"), ("a", "b=c"), ("x", "")]:
        assert split_key(dotted(key)) == key
    config = load_config(['teachers."deepseek-v3.1".tokenizer=builtin:bytes'])
    assert list(config.teachers) == ["deepseek-v3.1"]
    file = write(tmp_path, "a.yaml", "teachers:\n  a.b:\n    tokeniser: x\n")
    assert refusal([file]) == (
        f"{file}:3: unknown key 'teachers.\"a.b\".tokeniser' "
        "(did you mean 'teachers.\"a.b\".tokenizer'?)"
    )
    bad = write(tmp_path, "b.yaml", "teachers:\n  a.b:\n    dtype: int3\n")
    assert refusal([bad]).startswith(f'{bad}:3: teachers."a.b".dtype: ')


def mutations(name):
    """Typing errors: a letter left out, doubled, or swapped with the next."""
    for i in range(1, len(name) - 1):
        yield name[:i] + name[i + 1 :]
        yield name[:i] + name[i] + name[i:]
        yield name[: i - 1] + name[i] + name[i - 1] + name[i + 1 :]


def test_every_mistyped_key_is_answered_by_itself_or_by_a_key_that_exists():
    tree = as_tree(load_config([TEACHER]))
    known = {dotted(key): key for key in shipped_schema().chosen(tree)}
    asked = right = 0
    for key in known.values():
        for mistyped in list(mutations(key[-1]))[::40]:
            wrong = (*key[:-1], mistyped)
            if dotted(wrong) in known or key[0] in ("teachers", "base"):
                continue
            message = refusal([TEACHER, f"{dotted(wrong)}=1"])
            hint = message.partition("did you mean ")[2].strip("')?")
            assert not hint or hint in known, message
            asked, right = asked + 1, right + (hint == dotted(key))
    assert asked > 40 and right > 0.95 * asked


@pytest.mark.parametrize(
    "key, words",
    [
        ("data.train_files", "use 'data.path'"),
        ("gradient_accumulation_steps", "optim.micro_batch_tokens"),
        ("trainer.report_to", "use 'run.report_to'"),
    ],
)
def test_foreign_keys_are_not_answered_by_what_means_something_else(key, words):
    assert words in refusal([TEACHER, f"{key}=1"])


@pytest.mark.parametrize("value", ["[" * 5000, "&a [*a]"])
def test_an_override_without_an_end_is_one_line(value):
    with pytest.raises(UserError, match=r"^data\.path: nested too deeply"):
        read_layers([f"data.path={value}"])
