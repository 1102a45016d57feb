"""Names, values and forms that users of other libraries type, each answered by what exists."""

import re
from pathlib import Path

import pytest

from fireopd_jax.config import UserError
from fireopd_jax.recipe.aliases import NAMES, OTHERS, SECTIONS, TRL, VERL
from fireopd_jax.recipe.forms import ROOTS
from fireopd_jax.recipe.keys import check_layers, shipped_schema
from fireopd_jax.recipe.layers import find_config, read_layers
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.recipe.spellings import KINDS, VALUES, WHOLE

TEACHER = "teacher.architecture.hidden_size=32"
PLAIN = {"integer": "1", "number": "0.5", "boolean": "true", "string": "x", "array": "[]"}
KEY = re.compile(rf"\b(?:{'|'.join(ROOTS)})\.[a-z_0-9A-Z.]*[a-z_0-9](?:=[\w{{}}]+)?")
METHOD = re.compile(r"\bmethod/(\w+)")


def refusal(*arguments):
    with pytest.raises(UserError) as caught:
        check_layers(read_layers([TEACHER, *arguments]))
        load_config([TEACHER, *arguments])
    return str(caught.value)


def accepted(setting, *files):
    """Check that a hint is accepted: the setting, or its key with some value, over these files."""
    schema = shipped_schema()
    key, equals, value = setting.partition("=")
    full = tuple(key.replace("teacher.", "teachers.default.", 1).split("."))
    tree, _ = check_layers(read_layers([TEACHER, *files]))
    field = schema.find(full, tree)
    if field is None:
        return False
    check_layers(read_layers([TEACHER, *files, f"{key}={value if equals else 'null'}"]))
    return True


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_answer_is_asked_back(name):
    answer = NAMES[name]
    message = refusal(f"{name}=1")
    assert "did you mean" not in message and "\n" not in message
    if " " in answer:
        files = [f"method/{each}" for each in METHOD.findall(answer)]
        named = [setting for setting in KEY.findall(answer) if not setting.startswith("method/")]
        assert message.endswith(answer)
    else:
        files, named = [], re.findall(r"use '([^']+)'", message)
        assert len(named) == 1
        files = [f"{each}.kind={kind}" for each, kind in re.findall(r"(\S+)\.kind=(\w+)", message)]
    assert all(accepted(setting, *files) for setting in named), (name, message)


@pytest.mark.parametrize("name", sorted(SECTIONS))
def test_every_section_of_another_library_is_answered(name):
    message = refusal(f"{name}.some_key_of_it=1")
    assert "did you mean" not in message and SECTIONS[name] in message
    assert all(map(accepted, KEY.findall(SECTIONS[name])))
    for method in METHOD.findall(SECTIONS[name]):
        find_config(f"method/{method}")


def test_sentences_about_values_name_what_exists():
    for text in sorted({*KINDS.values(), *WHOLE.values()}):
        methods = [f"method/{each}" for each in METHOD.findall(text) if each != "NAME"]
        for setting in KEY.findall(text.replace("teachers.NAME", "teachers.default")):
            if "NAME" not in setting:
                loss = [m for m in methods if "divergence" in setting]
                assert accepted(setting, *loss), (text, setting)
    enums = {value for field in fields() for value in re.split(r" \| |list of ", field.type)}
    for meant in sorted(set(VALUES.values())):
        assert meant in enums, meant


def fields():
    return shipped_schema().every_field


def test_no_name_of_ours_is_taken_for_another_librarys():
    """A key that exists is never answered; a name that is ours elsewhere leads to that key."""
    ours = {field.key[-1] for field in fields()}
    for name in sorted(ours & NAMES.keys()):
        answer = NAMES[name]
        assert name in answer or name in ("steps", "seed"), (name, answer)
    tables = (TRL, VERL, OTHERS)
    twice = [
        n for i, one in enumerate(tables) for other in tables[i + 1 :] for n in one if n in other
    ]
    assert twice == []


@pytest.mark.parametrize(
    "key, ours",
    [
        ("rollout.n", "rollout.group_size"),
        ("actor_rollout_ref.rollout.val_kwargs.n", "eval.samples"),
        ("student.sft.optim.lr", "student.sft.optim.learning_rate"),
        ("teacher.model_name_or_path", "teachers.default.path"),
        ("teachers.math.torch_dtype", "teachers.math.dtype"),
        ("trainer.logger", "run.report_to"),
        ("data.max_prompt_length", "data.max_prompt_tokens"),
    ],
)
def test_the_longest_end_counts_and_the_own_section_comes_first(key, ours):
    assert refusal(f"{key}=1").endswith(f"unknown key {dotted_default(key)!r}: use {ours!r}")


def dotted_default(key):
    return key.replace("teacher.", "teachers.default.", 1) if key.startswith("teacher.") else key


def test_an_answer_names_the_kind_that_its_key_needs():
    message = refusal("method.filter.kind=keep_all", "traj_skip_percentile=20")
    assert "use 'method.filter.drop_fraction', with method.filter.kind=teacher_quantile" in message
    message = refusal("method.filter.kind=keep_all", "method.filter.drop_fraction=0.1")
    assert "with method.filter.kind=teacher_quantile or random_drop or length_drop" in message
    message = refusal("method.loss.divergence.beta=1")
    assert "method.loss.divergence.kind=jensen_shannon" in message


@pytest.mark.parametrize(
    "key", ["data.shufle_all", "zzz.qqq", "foo", "teachers.train_files", "bar.n_x"]
)
def test_no_hint_names_what_cannot_be_set(key):
    message = refusal(f"{key}=3")
    for hint in re.findall(r"did you mean '([^']+)'", message):
        assert accepted(hint), message


def test_a_file_of_another_library_is_answered_at_once(tmp_path):
    file = tmp_path / "gkd.yaml"
    file.write_text(
        "model_name_or_path: a/b\nteacher_model_name_or_path: c/d\nlearning_rate: 2e-5\n"
        "beta: 0.1\nsomething_else: 3\n"
    )
    lines = refusal(str(file)).splitlines()
    assert lines[0] == f"{file}: 5 unknown keys:" and len(lines) == 6
    assert lines[1] == f"  {file}:1: unknown key 'model_name_or_path': use 'student.path'"
    assert lines[5] == f"  {file}:5: unknown key 'something_else'"
    nested = tmp_path / "verl.yaml"
    nested.write_text(
        "actor_rollout_ref:\n  actor:\n    optim: {lr: 1e-6}\n    strategy: fsdp\n"
        "trainer:\n  logger: [console, wandb]\n  nnodes: 1\n"
    )
    lines = refusal(str(nested)).splitlines()
    assert [line.split(": ")[0].strip() for line in lines[1:]] == [
        f"{nested}:{n}" for n in (3, 4, 6, 7)
    ]
    many = tmp_path / "many.yaml"
    many.write_text("".join(f"unheard_of_{n}: 1\n" for n in range(40)))
    lines = refusal(str(many)).splitlines()
    assert lines[0].endswith("40 unknown keys:") and lines[-1] == "  and 24 more"


@pytest.mark.parametrize(
    "setting, meant",
    [
        ("student.dtype=bf16", "did you mean 'bfloat16'?"),
        ("teacher.dtype=FP32", "did you mean 'float32'?"),
        ("optim.schedule=cosine_with_warmup", "did you mean 'cosine'?"),
        ("optim.schedule=cosin", "did you mean 'cosine'?"),
        ("optim.remat=true", "did you mean 'full'?"),
        ("run.report_to=tb", "did you mean 'tensorboard'?"),
        ("run.report_to=wandb,trackoi", "did you mean 'trackio'?"),
        ("run.report_to=all", "'tensorboard', 'wandb' or 'trackio' (it is 'all')"),
        ("method.loss.kind=forward_kl", "method.loss.divergence.kind=forward_kl, with method/gkd"),
        ("method.loss.kind=sampled_reverse_k", "did you mean 'sampled_reverse_kl'?"),
        ("method.loss=gkd", "method/gkd"),
        ("method=gkd", "method/gkd"),
        ("method=fast", "method/NAME"),
        ("optim=adamw_torch", "AdamW"),
        ("student=a/b", "`student.path=...`"),
        ("teachers=a/b", "`teacher.path=...`"),
        ("teachers.math=a/b", "`teacher.path=...`"),
        ("eval.sets.gsm8k=a.jsonl", "`eval.sets.NAME.path=...` is the file"),
        ("student.sft=3", "(it is 3)"),
        ("data.mixture=[{path: a, wieght: 1}]", "did you mean 'weight'?"),
        ("method.aggregate=token-mean", "did you mean 'token'?"),
        ("run.steps=1,000", "did you mean 1000?"),
        ("run.steps=5,", "did you mean 5?"),
        ("optim.learning_rate=1,5", "did you mean 1.5?"),
        ("optim.learning_rate=\u22121e-6", "did you mean -1e-6?"),
        ("run.steps=12:30", "(it is '12:30')"),
        ("run.seed=2024-01-01", "(it is '2024-01-01')"),
    ],
)  # fmt: skip
def test_wrong_values_are_answered_by_the_value_that_was_meant(setting, meant):
    assert meant in refusal(setting)


@pytest.mark.parametrize("text, number", [("010", 10), ("0x10", 16), ("0o17", 15), ("+7", 7)])
def test_numbers_are_those_of_yaml_1_2(tmp_path, text, number):
    assert load_config([TEACHER, f"run.seed={text}"]).run.seed == number
    file = tmp_path / "a.yaml"
    file.write_text(f"run:\n  seed: {text}\n")
    assert load_config([TEACHER, str(file)]).run.seed == number


def test_what_yaml_1_1_turns_into_something_else_stays_as_it_is_written(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(
        "student: {chat_template_kwargs: {date: 2024-01-01, at: 12:30:45, id: 1_0, think: no}}\n"
        "optim: {learning_rate: 1e-6}\nrun: {name: 010}\n"
    )
    config = load_config([TEACHER, str(file)])
    assert config.student.chat_template_kwargs == {
        "date": "2024-01-01", "at": "12:30:45", "id": "1_0", "think": False
    }  # fmt: skip
    assert config.optim.learning_rate == 1e-6 and config.run.name == "010"
    assert load_config([TEACHER, "run.name=a #b"]).run.name == "a #b"


@pytest.mark.parametrize(
    "words, typed",
    [
        ("--run.steps 5", "without dashes: run.steps=5"),
        ("--run.steps=5", "without dashes: run.steps=5"),
        ("--max-steps 5", "without dashes: run.steps=5"),
        ("--report_to wandb", "without dashes: run.report_to=wandb"),
        ("\u2013run.steps=5", "without dashes: run.steps=5"),
        ("--bf16", "without dashes: bf16=true (the compute dtype is a key of each model"),
        ("run.steps = 5", "without blanks: run.steps=5"),
        ("run.steps= 5", "without blanks: run.steps=5"),
        ("run.steps =5", "without blanks: run.steps=5"),
        ("run.steps: 5", "without blanks: run.steps=5"),
        ("run.steps 5", "without blanks: run.steps=5"),
        ("run.name=\u201cx\u201d", "typographic; type run.name='x'"),
        ("run.dir=", "the value is empty; write run.dir=null for none"),
        ("--dry-rnu", "no such option (did you mean 'dry-run'?)"),
        ("run.ste\u200bps=5", "type 'run.steps'"),
    ],
)
def test_other_forms_of_settings_are_shown_as_they_are_typed_here(words, typed):
    assert typed in refusal(*words.split(" "))


def test_files_may_look_like_anything(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "--odd.yaml").write_text("run: {steps: 3}\n")
    assert load_config([TEACHER, "--odd.yaml"]).run.steps == 3


def test_the_sections_are_those_of_the_configuration():
    assert set(ROOTS) == {*shipped_schema().root["properties"], "teacher"}


def test_the_last_layer_with_a_length_counts(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("run: {steps: 350}\n")
    config = load_config([TEACHER, str(file), "run.epochs=2"])
    assert config.run.epochs == 2
    file.write_text("run: {epochs: 2}\n")
    config = load_config([TEACHER, str(file), "run.steps=5"])
    assert (config.run.epochs, config.run.steps) == (None, 5)
    assert "give one of them" in refusal("run.epochs=2", "run.steps=5")
    # The warm-up is compared with the number of steps, which is not known yet.
    assert load_config([TEACHER, "run.epochs=9", "optim.warmup_steps=500"]).run.epochs == 9


def test_the_page_for_people_from_elsewhere_has_the_answers_of_the_command_line():
    page = (Path(__file__).parent.parent.parent / "docs" / "coming_from.md").read_text("utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    answers = (a if " " in a else f"`{a}`" for a in (TRL | VERL | OTHERS).values())
    names = list(TRL) + list(VERL) + list(OTHERS)
    assert rows == [
        f"| `{name}` | {text[0].upper() + text[1:] if ' ' in text else text} |"
        for name, text in zip(names, answers, strict=True)
    ]
