"""Prompts that quote a solution or an attempt: names, texts of one's own, conversations."""

import re

import pytest

from fireopd_jax.config import UserError
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.text.templates import (
    TEMPLATES,
    Leak,
    asking,
    check_template,
    filled,
    needs_reference,
    template,
)

OWN = ["smoke", "method/opsd"]
TRD = ["smoke", "method/trd"]


def said(text, fields=("problem", "attempt", "reference")):
    """A template filled with `<field>` for each field."""
    return filled(text, {field: f"<{field}>" for field in fields})


def test_every_named_template_quotes_what_its_name_says():
    assert set(TEMPLATES["rewrite"]) == {"maths", "maths_reference", "code", "code_reference"}
    for name in TEMPLATES["rewrite"]:
        text = said(name)
        assert "<problem>" in text and "<attempt>" in text
        assert ("<reference>" in text) == needs_reference(name) == name.endswith("_reference")
        assert ("boxed" in text) == name.startswith("maths")
    text = said("reference")
    assert "<problem>" in text and "<reference>" in text and "<attempt>" not in text
    assert "\\boxed{}" in text, "braces that are no field stay"


def test_braces_in_quotations_are_not_filled_again():
    fields = {"problem": "{attempt} {reference} {x}", "attempt": "{problem}", "reference": "\\1 {}"}
    text = filled("{problem}|{attempt}|{reference}|{other}", fields)
    assert text == "{attempt} {reference} {x}|{problem}|\\1 {}|{other}"


def test_a_text_of_ones_own_is_its_own_template():
    assert template("Q {problem} A {attempt}") == "Q {problem} A {attempt}"
    assert template("maths") == TEMPLATES["rewrite"]["maths"]
    assert not needs_reference("{problem} {attempt}") and needs_reference("{reference}")
    check_template("{problem} {attempt}", "rewrite", ("problem", "attempt"))


@pytest.mark.parametrize(
    ("text", "purpose", "fields", "error"),
    [
        ("math", "rewrite", ("problem", "attempt"), r"no template 'math'; .*did you mean 'maths'"),
        ("refrence", "teacher", ("problem", "reference"), r"did you mean 'reference'"),
        ("reference", "rewrite", ("problem", "attempt"), r"no template 'reference'; expected m"),
        ("again: {problem}", "rewrite", ("problem", "attempt"), r"the text lacks \{attempt\}"),
        ("{problem} {reference} {attempt}", "teacher", ("problem", "reference"),
         r"\{attempt\} is known to method.refine.prompt only"),
    ],
)  # fmt: skip
def test_what_is_no_template_is_an_error(text, purpose, fields, error):
    with pytest.raises(ValueError, match=error):
        check_template(text, purpose, fields)


def test_a_wrong_template_in_a_configuration_names_its_key():
    for settings, key in (
        ([*TRD, "method.refine.prompt=math"], r"method\.refine.*no template 'math'"),
        ([*OWN, "method.teacher.prompt='{problem}'"], r"method\.teacher.*lacks \{reference\}"),
        ([*OWN, "method.teacher.leak.pattern='('"], r"method\.teacher\.leak.*regular expression"),
    ):
        with pytest.raises(UserError, match=key) as caught:
            load_config(settings)
        assert "\n" not in str(caught.value)


def test_the_last_message_of_the_user_is_replaced_and_the_others_stay():
    system = {"role": "system", "content": "Be brief."}
    first, answer = {"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}
    last, note = {"role": "user", "content": "and 2+2"}, {"role": "system", "content": "in words"}
    talk = (system, first, answer, last, note)
    found = asking(talk, "P {problem} R {reference}", {"reference": "4"})
    assert found == (
        system, first, answer, {"role": "user", "content": "P and 2+2 R 4"}, note,
    )  # fmt: skip
    assert talk[3] == last, "the row's own conversation is left alone"


def test_without_a_user_the_last_message_is_the_problem():
    turns = ({"role": "system", "content": "a"}, {"role": "system", "content": "3+4"})
    found = asking(turns, "{problem}?", {})
    assert found == (turns[0], {"role": "user", "content": "3+4?"})


def test_the_leak_finds_talk_of_the_solution_and_nothing_else():
    pattern = re.compile(Leak().pattern)
    for text in ("As the Reference solution says", "the given answer", "this provided solution"):
        assert pattern.search(text)
    for text in ("for reference, solve", "a preference solution", "the solution is given by 3"):
        assert not pattern.search(text)
