"""Prompts of teachers with privileged information, and prompts that quote a response."""

import copy
import dataclasses
import json

import numpy as np
import pytest

from fireopd_jax.config import UserError
from fireopd_jax.data.pipeline import PromptLoader
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.session.contexts import (
    Quoting,
    check_context,
    encoded_for,
    longest_quoting,
    teacher_specs,
    voice_of,
    width_of,
)
from fireopd_jax.session.setup import set_up
from fireopd_jax.text.templates import CUT

SETTINGS = ["smoke", "mesh.data=1", "eval.problems=0", "rollout.batch_size=8"]
TEXT = "method.teacher.prompt='{problem} is {reference}'"
LOUD = "{% for turn in messages %}<|user|>!{{ turn.content }}<|end|>{% endfor %}<|assistant|>"
TINY = (
    "{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1, "
    "head_dim: 8, intermediate_size: 32"
)


def make_setup(tmp_path, rows, *settings):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return set_up(load_config([*SETTINGS, f"data.path={file}", *settings]))


def told(count=6, **more):
    return [{"prompt": f"{i}+{i}", "solution": f"{2 * i}", **more} for i in range(count)]


def shown(spec, ids):
    return spec.tokenizer.decode(ids)


def test_the_own_teacher_is_prompted_with_the_rows_solution(tmp_path):
    setup = make_setup(tmp_path, told(), "method/opsd", TEXT, "data.privileged_column=solution")
    method = setup.config.method
    encoded = encoded_for(setup, method)
    assert teacher_specs(setup, method) == (setup.student,)
    for i in range(6):
        text = shown(setup.student, encoded.teacher_prompts[i])
        assert text == f"<|user|>{i}+{i} is {2 * i}<|end|><|assistant|>"
        np.testing.assert_array_equal(encoded.prompts[i], setup.encoded.prompts[i])
    assert encoded.max_teacher_prompt_tokens == width_of(
        max(len(ids) for ids in encoded.teacher_prompts)
    )
    assert encoded.max_prompt_tokens == setup.encoded.max_prompt_tokens
    assert not encoded.route.any() and len(encoded.teacher_pads) == 1


def test_each_route_has_its_teachers_prompt(tmp_path):
    rows = [{**row, "teacher": ("default", "b")[i % 2]} for i, row in enumerate(told())]
    teachers = f"teachers.b.architecture={TINY}}}"
    setup = make_setup(
        tmp_path, rows, "method/fire_opd", TEXT, "data.privileged_column=solution",
        "data.teacher_column=teacher", teachers,
    )  # fmt: skip
    first, second = setup.teachers
    tokenizer = copy.deepcopy(second.tokenizer)
    tokenizer.chat_template = LOUD
    setup = dataclasses.replace(
        setup, teachers=(first, dataclasses.replace(second, tokenizer=tokenizer))
    )
    encoded = encoded_for(setup, setup.config.method)
    for i in range(6):
        mark = "!" if i % 2 else ""
        text = shown(first, encoded.teacher_prompts[i])
        assert text == f"<|user|>{mark}{i}+{i} is {2 * i}<|end|><|assistant|>"
    np.testing.assert_array_equal(encoded.route, [0, 1] * 3)


def test_rows_without_a_solution_are_not_drawn(tmp_path):
    rows = told()
    rows[1]["solution"] = rows[4]["solution"] = None
    setup = make_setup(tmp_path, rows, "method/opsd", "data.privileged_column=solution")
    encoded = encoded_for(setup, setup.config.method)
    np.testing.assert_array_equal(encoded.kept, [0, 2, 3, 5])
    np.testing.assert_array_equal(setup.encoded.kept, np.arange(6))
    loader = PromptLoader(encoded, setup.train, prompts_per_step=8, group_size=1, seed=0)
    assert set(np.concatenate([next(loader).row for _ in range(4)])) == {0, 2, 3, 5}
    # A method without privileged information draws them all.
    plain = load_config([*SETTINGS, "method/opd"]).method
    assert len(encoded_for(setup, plain).kept) == 6


def test_a_rewrite_with_the_reference_needs_it_too(tmp_path):
    rows = told()
    rows[2]["solution"] = None
    setup = make_setup(
        tmp_path, rows, "method/trd", "method.refine.prompt=maths_reference",
        "data.privileged_column=solution",
    )  # fmt: skip
    encoded = encoded_for(setup, setup.config.method)
    np.testing.assert_array_equal(encoded.kept, [0, 1, 3, 4, 5])
    for ours, theirs in zip(encoded.teacher_prompts, setup.encoded.teacher_prompts, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_no_solution_at_all_names_the_columns_key(tmp_path):
    setup = make_setup(tmp_path, [{"prompt": f"{i}"} for i in range(4)], "method/opsd")
    with pytest.raises(UserError, match=r"rows\.jsonl:1: no row .*data\.privileged_column") as e:
        encoded_for(setup, setup.config.method)
    assert "\n" not in str(e.value)


def test_prompts_above_the_teachers_limit_are_not_trained_on(tmp_path):
    rows = told()
    rows[3]["solution"] = "7" * 40
    settings = ["method/opsd", TEXT, "data.privileged_column=solution"]
    setup = make_setup(tmp_path, rows, *settings)
    lengths = [len(ids) for ids in encoded_for(setup, setup.config.method).teacher_prompts]
    limit = lengths[0]
    setup = make_setup(tmp_path, rows, *settings, f"method.teacher.max_prompt_tokens={limit}")
    encoded = encoded_for(setup, setup.config.method)
    wanted = [i for i, length in enumerate(lengths) if length <= limit]
    np.testing.assert_array_equal(encoded.kept, wanted)
    assert 3 not in wanted and 0 in wanted
    setup = make_setup(tmp_path, rows, *settings, "method.teacher.max_prompt_tokens=3")
    with pytest.raises(UserError, match=r"max_prompt_tokens=3: none of 6 prompts.*shortest has"):
        encoded_for(setup, setup.config.method)


def test_the_models_positions_bound_prompt_and_response(tmp_path):
    settings = ["method/opsd", TEXT, "data.privileged_column=solution", "data.max_prompt_tokens=8",
                "rollout.max_tokens=24"]  # fmt: skip
    setup = make_setup(tmp_path, told(), *settings)
    longest = max(len(ids) for ids in encoded_for(setup, setup.config.method).teacher_prompts)
    for spare, fits in ((0, True), (-1, False)):
        size = longest + 24 + spare
        limited = f"student.architecture={TINY}, max_position_embeddings: {size}}}"
        setup = make_setup(tmp_path, told(), *settings, limited)
        if fits:
            encoded_for(setup, setup.config.method)
            continue
        with pytest.raises(
            UserError,
            match=rf"student: prompts of {longest} tokens \(method\.teacher\.max_prompt_tokens\)",
        ):
            encoded_for(setup, setup.config.method)
    with pytest.raises(UserError, match=r"method\.refine\.max_prompt_tokens"):
        check_context(setup.student, 1000, 24, "method.refine")


def quoting(setup, limit, text="{problem}|{attempt}|{reference}"):
    spec = setup.student
    return Quoting(voice_of(spec), text, limit, spec.tokenizer)


def test_the_end_of_the_attempt_is_cut_first_and_then_the_solution(tmp_path):
    setup = make_setup(
        tmp_path, [{"prompt": "1+1", "solution": "0123456789" * 4}], "method/trd",
        "data.privileged_column=solution",
    )  # fmt: skip
    row, tokenizer = setup.rows[0], setup.student.tokenizer
    attempt = [*tokenizer("abcdefghij" * 4, add_special_tokens=False)["input_ids"],
               setup.student.stop[0]]  # fmt: skip
    whole = quoting(setup, 10_000)(row, attempt)
    text = shown(setup.student, whole)
    assert text == f"<|user|>1+1|{'abcdefghij' * 4}|{row.privileged}<|end|><|assistant|>"
    seen = []
    for limit in range(len(whole), 0, -1):
        ids = quoting(setup, limit)(row, attempt)
        if ids is None:
            break
        assert len(ids) <= limit
        seen.append(shown(setup.student, ids))
    assert ids is None, "at some limit nothing is left to cut"
    first, *rest = seen
    assert first == text
    kept = [each.split("|")[3:5] for each in rest]
    for quoted, solution in kept:
        assert quoted.endswith(CUT)
        body = solution.removesuffix("<")
        if body != row.privileged:  # the solution is cut only when nothing of the attempt is left
            assert quoted == CUT and body.endswith(CUT)
            assert row.privileged.startswith(body.removesuffix(CUT))
        else:
            assert ("abcdefghij" * 4).startswith(quoted.removesuffix(CUT))
    sizes = [len(quoted) for quoted, _ in kept]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 20
    assert any(solution.startswith("012") and CUT in solution for _, solution in kept)


def test_without_a_solution_in_the_template_only_the_attempt_is_cut(tmp_path):
    setup = make_setup(tmp_path, told(), "method/trd")
    row = setup.rows[0]
    bare = len(quoting(setup, 1000, "{problem}|{attempt}")(row, [])) + len(CUT)
    assert quoting(setup, bare, "{problem}|{attempt}")(row, [97] * 50) is not None
    assert quoting(setup, bare - 1, "{problem}|{attempt}")(row, [97] * 50) is None


def test_by_default_the_longest_response_of_the_longest_row_is_quoted_whole(tmp_path):
    rows = [*told(), {"prompt": "9" * 50, "solution": "8" * 30}]
    setup = make_setup(tmp_path, rows, "method/trd", "data.privileged_column=solution",
                       "method.refine.prompt=maths_reference")  # fmt: skip
    limit = longest_quoting(setup, setup.config.method, "maths_reference")
    ids = quoting(setup, limit, "maths_reference")(setup.rows[-1], [97] * 64)
    assert len(ids) == limit and CUT not in shown(setup.student, ids)
