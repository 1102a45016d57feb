"""Differences between student and teachers that are allowed, or refused before any compute."""

import copy
import json

import numpy as np
import pytest
from transformers import AddedToken

from fireopd_jax.config import UserError
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.session.setup import set_up
from fireopd_jax.text.chat import stop_ids
from fireopd_jax.text.checks import TokenizerFacts, check_ids, check_teacher, valid_rows
from fireopd_jax.text.tokenizer import BUILTIN, CHAT_TEMPLATE, load_tokenizer
from fireopd_jax.training.run import train

TOKENIZER = load_tokenizer(BUILTIN)
SIZE, END = 261, 257
THINKING = CHAT_TEMPLATE + "{% if enable_thinking %}<think>{% endif %}"
TINY = (
    "{hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 1, num_key_value_heads: 1, "
    "head_dim: 8, intermediate_size: 8, vocab_size: %d}"
)


def facts(name="student", tokenizer=TOKENIZER, generation=None, **kwargs):
    return TokenizerFacts(name, tokenizer, f"of {name}", stop_ids(tokenizer, generation), kwargs)


def changed(*added, **attributes):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_tokens(list(added))
    for name, value in attributes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def rewritten(folder, change):
    """A tokenizer whose tokenizer.json `change` has edited."""
    TOKENIZER.save_pretrained(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    change(content["model"]["vocab"])
    file.write_text(json.dumps(content))
    return load_tokenizer(str(folder))


def refusal(student, teacher, allow=()):
    with pytest.raises(UserError) as caught:
        check_teacher(student, teacher, allow)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_equal_tokenizers_may_be_different_objects(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    check_teacher(facts(), facts("teacher x"), ())
    check_teacher(facts(), facts("teacher x", load_tokenizer(str(tmp_path))), ())


def test_ids_beyond_the_tokenizer_pad_the_head():
    assert valid_rows(TOKENIZER, SIZE, "student") is None
    assert valid_rows(TOKENIZER, 300, "student") == SIZE
    # Added tokens may lie beyond the head, regular ones may not.
    assert valid_rows(TOKENIZER, 258, "student") is None
    with pytest.raises(UserError, match="student: vocab_size=254 is less than the 261 ids") as told:
        valid_rows(TOKENIZER, 254, "student")
    first = [repr(TOKENIZER.convert_ids_to_tokens(254 + i)) for i in range(2)]
    assert f"its tokenizer; {', '.join(first)}" in str(told.value)  # in the order of their ids


def test_ids_without_a_row_are_refused():
    check_ids("a prompt", [np.array([3, 7], np.int32), None, np.array([], np.int32)], 8)
    with pytest.raises(UserError, match="a prompt has the token id 8; ids must be below 8"):
        check_ids("a prompt", [np.array([3], np.int32), np.array([8, 2], np.int32)], 8)


def test_other_tokens_are_refused_whatever_is_allowed(tmp_path):
    def swap(vocabulary):
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    teacher = facts("teacher x", rewritten(tmp_path / "swapped", swap))
    message = refusal(facts(), teacher, ("eos", "special_tokens", "template", "thinking"))
    assert "teacher x: its tokenizer (of teacher x) differs from the student's (of student)" in (
        message
    )
    assert "id 97 is 'b', the student's 'a'" in message
    assert "a served teacher can write text" in message


def test_regular_tokens_that_one_side_lacks_are_another_tokenizer(tmp_path):
    # Each has one token more than the bytes, at an id that the other does not have.
    student, teacher = (
        facts(
            name, rewritten(tmp_path / name, lambda vocabulary, i=i: vocabulary.update({"ab": i}))
        )
        for name, i in (("student", 300), ("teacher x", 301))
    )
    assert "only teacher x has 'ab'" in refusal(student, teacher)


@pytest.mark.parametrize(
    "student, teacher, option, text",
    [
        ({}, {"tokenizer": changed(eos_token="<|user|>")}, "eos",
         "ends responses with '<|user|>', the student with '<|end|>'"),
        ({}, {"tokenizer": changed("<think>")}, "special_tokens",
         "only teacher x has the added '<think>'"),
        ({"tokenizer": changed("<think>")}, {}, "special_tokens",
         "only student has the added '<think>'"),
        ({"tokenizer": changed("<x>")},
         {"tokenizer": changed(AddedToken("<x>", special=True))}, "special_tokens",
         "'<x>' is a special token for only one of the two"),
        ({}, {"tokenizer": changed(bos_token="<|user|>")}, "special_tokens",
         "its bos_token is '<|user|>', the student's None"),
        ({}, {"tokenizer": changed(chat_template="{{ messages }}")}, "template",
         "its chat template is not the student's"),
        ({"tokenizer": changed(chat_template=THINKING), "enable_thinking": True},
         {"tokenizer": changed(chat_template=THINKING), "enable_thinking": False}, "thinking",
         "enable_thinking=False, the student's enable_thinking=True"),
        ({"tokenizer": changed(chat_template=THINKING), "enable_thinking": True},
         {"tokenizer": changed(chat_template=THINKING)}, "thinking",
         "enable_thinking='unset', the student's enable_thinking=True"),
    ],
)  # fmt: skip
def test_a_difference_is_refused_until_it_is_allowed(student, teacher, option, text):
    student, teacher = facts(**student), facts("teacher x", **teacher)
    others = tuple({"eos", "special_tokens", "template", "thinking"} - {option})
    for allow in ((), others):
        message = refusal(student, teacher, allow)
        assert text in message
        assert message.startswith("teacher x: ")
        assert f"set checks.allow=[{', '.join([*allow, option])}]" in message
    check_teacher(student, teacher, (option,))


def test_the_padding_token_may_differ():
    check_teacher(facts(), facts("teacher x", changed(pad_token="<|system|>")), ())


def test_a_generation_config_may_name_more_stop_ids():
    student = facts(generation={"eos_token_id": [END, 10]})
    assert student.stop == (END, 10)
    check_teacher(student, facts("teacher x"), ())
    check_teacher(student, facts("teacher x", changed(eos_token="<|user|>"),
                                   {"eos_token_id": [END, 259]}), ("eos",))  # fmt: skip
    # The student's own EOS is one of the teacher's stop ids, but not the other way round.
    teacher = facts("teacher x", changed(eos_token="<|user|>"), {"eos_token_id": END})
    assert "checks.allow=[eos]" in refusal(facts(), teacher)


def test_arguments_unknown_to_one_template_are_no_separate_difference():
    student = facts(tokenizer=changed(chat_template=THINKING), enable_thinking=False)
    check_teacher(student, facts("teacher x"), ("template",))


def settings(tmp_path, student, teacher, *others):
    for name, tokenizer in (("student", student), ("teacher", teacher)):
        tokenizer.save_pretrained(tmp_path / name)
    return load_config(
        [
            f"student={{architecture: {TINY % 288}, tokenizer: {tmp_path / 'student'}}}",
            f"teacher={{architecture: {TINY % 320}, tokenizer: {tmp_path / 'teacher'}}}",
            "data.path=builtin:addition-1",
            "data.max_prompt_tokens=32",
            "eval.problems=0",
            *others,
        ]
    )


def test_each_models_prompts_use_its_own_template_and_arguments(tmp_path):
    def thinking(mark):
        return changed(chat_template=THINKING.replace("<think>", mark))

    options = (
        "student.chat_template_kwargs={enable_thinking: true}",
        "teacher.chat_template_kwargs={enable_thinking: true}",
    )
    with pytest.raises(UserError, match=r"checks\.allow=\[template\]"):
        set_up(settings(tmp_path / "a", thinking("S"), thinking("T"), *options))
    setup = set_up(
        settings(tmp_path / "b", thinking("S"), thinking("T"), *options, "checks.allow=[template]")
    )
    for ids, theirs in zip(setup.encoded.prompts, setup.encoded.teacher_prompts, strict=True):
        assert ids[-1] == ord("S") and theirs[-1] == ord("T")
        assert ids[:-1].tolist() == theirs[:-1].tolist()


def test_heads_may_be_padded_differently(tmp_path):
    setup = set_up(settings(tmp_path, TOKENIZER, TOKENIZER))
    for spec, rows in ((setup.student, 288), (setup.teachers[0], 320)):
        assert (spec.model.vocab_size, spec.model.valid) == (rows, SIZE)


def test_the_student_never_samples_tokens_that_a_teacher_lacks(tmp_path):
    allowed = "checks.allow=[special_tokens]"
    setup = set_up(settings(tmp_path / "a", changed("<think>"), TOKENIZER, allowed))
    assert (setup.student.model.size, setup.teachers[0].model.size) == (SIZE, SIZE)
    setup = set_up(settings(tmp_path / "b", TOKENIZER, changed("<think>"), allowed))
    assert (setup.student.model.size, setup.teachers[0].model.size) == (SIZE, SIZE + 1)


def test_a_prompt_with_an_id_beyond_the_head_is_refused(tmp_path):
    config = settings(tmp_path, TOKENIZER, TOKENIZER, "student.architecture.vocab_size=258")
    with pytest.raises(UserError, match="student: a prompt has the token id 260"):
        set_up(config)


def test_a_teachers_eos_may_be_exchanged_with_the_students(tmp_path):
    other = changed(eos_token="<|user|>")
    with pytest.raises(UserError, match=r"checks\.allow=\[eos\], or eos_alias of that teacher"):
        set_up(settings(tmp_path / "a", TOKENIZER, other))
    config = settings(
        tmp_path / "b",
        TOKENIZER,
        other,
        "teacher.eos_alias=true",
        "mesh.data=1",
        "run.steps=1",
        "rollout.batch_size=8",
        "rollout.max_tokens=8",
        f"run.dir={tmp_path / 'run'}",
    )
    setup = set_up(config)
    (teacher,) = setup.teachers
    assert teacher.model.exchange is None
    scoring = teacher.scoring(setup.student)
    assert scoring.exchange == (setup.student.stop[0], teacher.stop[0])
    assert train(config)["steps"] == 1
    with pytest.raises(UserError, match="teacher default: eos_alias has no effect"):
        set_up(settings(tmp_path / "c", TOKENIZER, TOKENIZER, "teacher.eos_alias=true"))
