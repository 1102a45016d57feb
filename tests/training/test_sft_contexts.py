"""Supervised training after several kinds of prompts."""

import dataclasses
import json

import numpy as np
import pytest

from fireopd_jax.config import UserError
from fireopd_jax.data.pipeline import PromptLoader
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.session.setup import set_up
from fireopd_jax.training.prepare import in_contexts, in_teacher_template, with_errors

ROWS = [
    {"prompt": "1+1", "answer": "2", "because": "1 and 1 is 2", "told": None},
    {"prompt": "2+3", "answer": "5", "because": "2 and 3 is 5", "told": "it is 5"},
    {"prompt": "9+9", "answer": "18", "because": None, "told": "it is 18"},
    {"prompt": "4+4", "answer": "8", "because": "4 and 4 is 8", "told": "it is 8"},
]
"""Row 0 has no privileged solution but its reference, row 2 has no reference."""
COLUMNS = ["data.reference_column=because", "data.privileged_column=told"]
TOLD = "method.teacher.prompt='{problem}|{reference}'"
ATTEMPT = "method.refine.prompt='{problem}?{attempt}'"
SMALL = ["mesh.data=1", "eval.problems=0", "rollout.batch_size=4", "rollout.group_size=1",
         "rollout.max_tokens=24", "data.max_prompt_tokens=12"]  # fmt: skip


def make_setup(tmp_path, *settings, rows=ROWS, columns=COLUMNS):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return set_up(load_config(["smoke", *SMALL, *columns, *settings, f"data.path={file}"]))


def shown(setup, contexts, spec=None):
    """Each training example as (prompt, response)."""
    spec = spec or setup.student
    encoded = setup.encoded
    if spec is not setup.student:
        encoded = in_teacher_template(spec, encoded)
    encoded, rows = in_contexts(setup, spec, encoded, setup.train, contexts)
    count = sum(encoded.references[i] is not None for i in rows)
    loader = PromptLoader(
        encoded, rows, prompts_per_step=count, group_size=1, seed=0, references=True
    )
    prompts, decode = next(loader), spec.tokenizer.decode
    return sorted(
        (
            decode(ids[:n]).removeprefix("<|user|>").removesuffix("<|end|><|assistant|>"),
            decode(answer[:m], skip_special_tokens=True),
        )
        for ids, n, answer, m in zip(
            prompts.tokens, prompts.length, prompts.reference, prompts.reference_length, strict=True
        )
    )


PLAIN = [("1+1", "1 and 1 is 2"), ("2+3", "2 and 3 is 5"), ("4+4", "4 and 4 is 8")]
PRIVILEGED = [
    ("1+1|1 and 1 is 2", "1 and 1 is 2"),
    ("2+3|it is 5", "2 and 3 is 5"),
    ("4+4|it is 8", "4 and 4 is 8"),
]


def test_rows_with_a_reference_come_once_for_each_kind_of_prompt(tmp_path):
    setup = make_setup(tmp_path, "method/opsd", TOLD)
    assert shown(setup, ("prompt",)) == PLAIN
    assert shown(setup, ("teacher",)) == PRIVILEGED
    assert shown(setup, ("prompt", "teacher")) == sorted(PLAIN + PRIVILEGED)
    same = in_contexts(setup, setup.student, setup.encoded, setup.train, ("prompt",))
    assert same[0] is setup.encoded and same[1] is setup.train


@pytest.mark.parametrize("teacher", [False, True])
def test_a_rewrite_is_asked_for_with_an_attempt_that_has_errors(teacher, tmp_path):
    setup = make_setup(tmp_path, "method/trd", ATTEMPT, columns=COLUMNS[:1])
    spec = setup.teachers[0] if teacher else setup.student
    found = shown(setup, ("prompt", "rewrite"), spec)
    assert [pair for pair in found if "?" not in pair[0]] == PLAIN
    quoting = [pair for pair in found if "?" in pair[0]]
    assert len(quoting) == len(PLAIN)
    for (prompt, answer), (problem, right) in zip(quoting, PLAIN, strict=True):
        asked, attempt = prompt.split("?")
        assert (asked, answer) == (problem, right) and attempt != right
        assert len(attempt) == len(right)
    assert shown(setup, ("rewrite",), spec) == quoting, "the errors are a function of the seed"
    other = make_setup(tmp_path, "method/trd", ATTEMPT, "run.seed=1", columns=COLUMNS[:1])
    assert shown(other, ("rewrite",)) != quoting


def test_responses_of_a_teacher_are_asked_for_after_solutions_and_quoted_with_errors(tmp_path):
    rows = [row | {"because": None} for row in ROWS]
    setup = make_setup(tmp_path, "method/opsd", TOLD, rows=rows)
    end = setup.student.stop[0]
    ids = [np.array([*f"so 1{i}".encode(), end], np.int32) for i in range(4)]
    setup = dataclasses.replace(setup, encoded=dataclasses.replace(setup.encoded, references=ids))
    assert [row for row, _ in shown(setup, ("teacher",))] == [
        "2+3|it is 5", "4+4|it is 8", "9+9|it is 18"
    ], "row 0 has no solution"  # fmt: skip
    without = [dataclasses.replace(row, privileged=None) for row in setup.rows]
    with pytest.raises(UserError, match=r"student: sft\.contexts: .*data\.privileged_column"):
        shown(dataclasses.replace(setup, rows=without), ("prompt", "teacher"))
    setup = make_setup(tmp_path, "method/trd", ATTEMPT, rows=rows)
    setup = dataclasses.replace(setup, encoded=dataclasses.replace(setup.encoded, references=ids))
    for asked, answer in shown(setup, ("rewrite",)):
        attempt = asked.split("?")[1]
        assert attempt.startswith("so ") and attempt != answer and len(attempt) == len(answer)


@pytest.mark.parametrize("text", ["7", "a 1 b 22 c 333", "12+34=46\n2+4=6, 46"])
def test_an_attempt_has_a_wrong_digit_and_is_otherwise_the_same(text):
    wrong, places = [], set()
    for seed in range(300):
        changed = with_errors(text, seed)
        assert changed == with_errors(text, seed) and len(changed) == len(text)
        at = [i for i, (a, b) in enumerate(zip(text, changed, strict=True)) if a != b]
        assert at and all(text[i].isdigit() and changed[i].isdigit() for i in at)
        wrong.append(len(at))
        places.add(at[0])
    digits = [i for i, character in enumerate(text) if character.isdigit()]
    assert places == set(digits), "the first error may be anywhere"
    # The first of n digits at random, then a third of those after it.
    expected = 1 + (len(digits) - 1) / 2 / 3
    assert np.mean(wrong) == pytest.approx(expected, rel=0.15)


def test_a_text_without_digits_stays():
    assert with_errors("no digit", 0) == "no digit" and with_errors("", 0) == ""
