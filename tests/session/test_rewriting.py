"""Rewrites of responses: what is asked, what is trained on, and what is dropped."""

import copy
import dataclasses
import json
from collections.abc import Mapping

import jax
import numpy as np
import pytest

from fireopd_jax.config import UserError
from fireopd_jax.data.pipeline import PromptLoader
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.session.contexts import encoded_for
from fireopd_jax.session.host import Policies
from fireopd_jax.session.refining import host_stages
from fireopd_jax.session.rewriting import Rewriter
from fireopd_jax.session.setup import set_up
from fireopd_jax.text.templates import CUT
from fireopd_jax.types import Rewritten, Rollout, Writer
from tests.cases import make_rollout, make_session

ROWS, ROOM = 8, 48
TEXT = "method.refine.prompt='{problem}|{attempt}'"
SETTINGS = ["smoke", "method/trd", "mesh.data=1", "eval.problems=0", f"rollout.batch_size={ROWS}",
            "rollout.group_size=1", f"rollout.max_tokens={ROOM}", "data.max_prompt_tokens=24",
            "data.privileged_column=solution"]  # fmt: skip
PARAMS = [{"of": np.zeros(1)}, {"of": np.ones(1)}]
UPDATES = np.asarray(7, np.int32)


@dataclasses.dataclass
class Call:
    """One call of the sampler."""

    spec: object
    params: object
    prompts: object
    sampling: object


class Scripted:
    """A sampler that returns given token ids by row of the data set; it finishes all but `cut`."""

    def __init__(self, answers: Mapping[int, list[int]], cut=()):
        self.answers, self.cut, self.calls = answers, cut, []

    def __call__(self, spec, params, prompts, sampling, version, max_tokens=None):
        assert int(version) == 7
        self.calls.append(Call(spec, params, prompts, sampling))
        tokens, mask = np.zeros((ROWS, ROOM), np.int32), np.zeros((ROWS, ROOM), bool)
        tokens[:] = 999  # what a sampler leaves outside of its mask means nothing
        finished = np.zeros(ROWS, bool)
        for i, row in enumerate(prompts.row):
            if prompts.length[i]:
                ids = self.answers[int(row)]
                tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
                finished[i] = int(row) not in self.cut
        new = make_rollout(mask)
        return dataclasses.replace(new, prompts=prompts, tokens=tokens, finished=finished)


def make_setup(tmp_path, *settings, rows=None):
    rows = rows or [
        {"prompt": f"{i}+{i}", "answer": f"{2 * i}", "solution": f"see {2 * i}"}
        for i in range(ROWS)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return set_up(load_config([*SETTINGS, f"data.path={file}", TEXT, *settings]))


def ids_of(setup, text, end=True):
    ids = setup.student.tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*ids, setup.student.stop[0]] if end else ids


def make_own(setup, text=lambda row: f"try {row}", empty=()):
    """The student's own responses to one batch: `text(row)`, none for the rows `empty`."""
    method = setup.config.method
    loader = PromptLoader(
        encoded_for(setup, method), setup.train, prompts_per_step=ROWS, group_size=1, seed=0
    )
    prompts = next(loader)
    tokens, mask = np.zeros((ROWS, ROOM), np.int32), np.zeros((ROWS, ROOM), bool)
    for i, row in enumerate(prompts.row):
        if int(row) not in empty:
            ids = ids_of(setup, text(int(row)))
            tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
    logprob = -np.random.default_rng(0).exponential(size=mask.shape).astype(np.float32) * mask
    rollout = dataclasses.replace(make_rollout(mask, logprob=logprob), tokens=tokens)
    return dataclasses.replace(rollout, prompts=prompts, finished=mask.any(axis=1))


def rewritten(setup, sampler, own):
    """The rollout after all host stages, on the host, by row of the data set; and the order."""
    policies = Policies(student=PARAMS[0], teachers=PARAMS[: len(setup.teachers)], updates=UPDATES)
    rollout: Rollout = own
    for stage in host_stages(make_session(setup, sampler), setup.config.method):
        rollout = stage(rollout, policies)
    rollout = jax.device_get(rollout)
    order = np.argsort(rollout.prompts.row)  # every row of the data set is drawn once
    np.testing.assert_array_equal(rollout.prompts.row[order], np.arange(ROWS))
    return jax.tree.map(lambda leaf: leaf[order], rollout)


def answers(setup, text=lambda row: f"new {row}"):
    return {row: ids_of(setup, text(row)) for row in range(ROWS)}


def trained(rollout, row):
    """Token ids that are trained on."""
    return rollout.tokens[row][rollout.mask[row]].tolist()


def shown(setup, tokens, length):
    return setup.student.tokenizer.decode(tokens[:length])


def outcomes(rollout):
    return [Rewritten(int(each)).name for each in rollout.original.outcome]


def test_a_rewrite_takes_the_place_of_the_response_that_it_quotes(tmp_path):
    setup = make_setup(tmp_path, "method.refine={temperature: 0.5, top_p: 0.9, top_k: 3}",
                       "method.refine.max_tokens=11")  # fmt: skip
    sampler, own = Scripted(answers(setup)), make_own(setup)
    out = rewritten(setup, sampler, own)
    (call,) = sampler.calls
    assert call.spec is setup.teachers[0] and call.params is PARAMS[0]
    knobs = call.sampling
    assert (float(knobs.temperature), float(knobs.top_p), int(knobs.top_k)) == pytest.approx(
        (0.5, 0.9, 3)
    )
    assert int(knobs.max_tokens) == 11
    by_row = np.argsort(own.prompts.row)
    for row in range(ROWS):
        asked = f"<|user|>{row}+{row}|try {row}<|end|><|assistant|>"
        at = by_row[row]
        assert shown(setup, call.prompts.tokens[at], call.prompts.length[at]) == asked
        prompts = out.prompts
        assert shown(setup, prompts.teacher_tokens[row], prompts.teacher_length[row]) == asked
        assert shown(setup, prompts.tokens[row], prompts.length[row]) == (
            f"<|user|>{row}+{row}<|end|><|assistant|>"
        )
        # The end of the rewrite is trained on, too.
        assert trained(out, row) == ids_of(setup, f"new {row}")
        assert not out.tokens[row][~out.mask[row]].any()
        np.testing.assert_array_equal(out.original.tokens[row], own.tokens[at])
        np.testing.assert_array_equal(out.original.mask[row], own.mask[at])
        np.testing.assert_array_equal(out.original.model_logprob[row], own.model_logprob[at])
    assert outcomes(out) == ["DONE"] * ROWS and out.finished.all()
    assert (out.writer == Writer.REWRITER).all() and (out.version == 7).all()
    assert not out.logprob.any() and not out.model_logprob.any()
    assert out.correct is None and out.leaked is None


def test_a_rewrite_at_the_limit_is_dropped(tmp_path):
    setup = make_setup(tmp_path)
    texts = answers(setup) | {2: ids_of(setup, "x" * ROOM, end=False)}
    out = rewritten(setup, Scripted(texts, cut=[2]), make_own(setup))
    assert outcomes(out) == ["DONE", "DONE", "CUT", *["DONE"] * 5]
    assert not out.mask[2].any() and not out.finished[2]
    # What was written is kept for the completions.
    assert out.tokens[2][out.original.rewrite[2]].tolist() == ids_of(setup, "x" * ROOM, end=False)
    assert out.mask[[0, 1, 3, 4, 5, 6, 7]].any(axis=1).all()
    # The teacher's prompt is the row's own again: the score program sees a valid prompt.
    assert shown(setup, out.prompts.teacher_tokens[2], out.prompts.teacher_length[2]) == (
        "<|user|>2+2<|end|><|assistant|>"
    )


def test_a_row_whose_problem_alone_is_too_long_is_not_asked(tmp_path):
    rows = [{"prompt": f"{i}+{i}" + "1" * 15 * (i == 5), "solution": "s"} for i in range(ROWS)]
    setup = make_setup(tmp_path, "method.refine.max_prompt_tokens=36", rows=rows)
    sampler, own = Scripted(answers(setup)), make_own(setup, lambda row: "b" * 30)
    out = rewritten(setup, sampler, own)
    assert outcomes(out) == [*["DONE"] * 5, "OVERLONG", "DONE", "DONE"]
    asked = sampler.calls[0].prompts.length
    assert asked[own.prompts.row == 5] == 0 and (asked[own.prompts.row != 5] > 0).all()
    assert asked.max() <= 36 and sampler.calls[0].prompts.tokens.shape[1] == 48
    assert not out.mask[5].any()


def test_a_quotation_is_cut_to_the_limit_that_was_given(tmp_path):
    setup = make_setup(tmp_path, "method.refine.max_prompt_tokens=33")
    sampler = Scripted(answers(setup))
    rewritten(setup, sampler, make_own(setup, lambda row: "a" * 40))
    prompts = sampler.calls[0].prompts
    for tokens, length in zip(prompts.tokens, prompts.length, strict=True):
        assert length == 33
        assert shown(setup, tokens, length).endswith(f"|{'a' * 7}{CUT}<|end|><|assistant|>")


def test_the_models_positions_are_checked_before_anything_is_sampled(tmp_path):
    small = ("{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, "
             "num_key_value_heads: 1, head_dim: 8, intermediate_size: 32, ")  # fmt: skip
    for size, fits in ((33 + ROOM, True), (32 + ROOM, False)):
        setup = make_setup(
            tmp_path, "method.refine.max_prompt_tokens=33",
            f"teacher.architecture={small} max_position_embeddings: {size}}}",
        )  # fmt: skip
        if fits:
            Rewriter(make_session(setup, None), setup.config.method)
            continue
        with pytest.raises(UserError, match=r"^teacher default: prompts of 33 .*method\.refine"):
            Rewriter(make_session(setup, None), setup.config.method)


def test_an_end_of_another_model_becomes_the_students(tmp_path):
    setup = make_setup(tmp_path)
    new, foreign = ids_of(setup, "new", end=False), 260
    assert foreign not in setup.student.stop
    out = rewritten(setup, Scripted(answers(setup) | {3: [*new, foreign]}), make_own(setup))
    assert trained(out, 3) == [*new, setup.student.stop[0]]
    assert outcomes(out) == ["DONE"] * ROWS
    # A rewrite that was cut did not end with its last token.
    texts = answers(setup) | {3: [*new, foreign]}
    assert outcomes(rewritten(setup, Scripted(texts, cut=[3]), make_own(setup)))[3] == "CUT"


def test_a_rewrite_ends_where_the_student_would(tmp_path):
    setup = make_setup(tmp_path)
    ids = [*ids_of(setup, "ab"), *ids_of(setup, "cd")]
    out = rewritten(setup, Scripted(answers(setup) | {3: ids}, cut=[3]), make_own(setup))
    assert trained(out, 3) == ids_of(setup, "ab") and out.finished[3]
    assert outcomes(out)[3] == "DONE"


def test_ids_that_the_student_lacks_are_not_trained_on(tmp_path):
    setup = make_setup(tmp_path)
    size = setup.student.model.size - 1
    setup = dataclasses.replace(setup, student=setup.student.limited(size))
    new = ids_of(setup, "new", end=False)
    texts = answers(setup) | {1: [*new, size, setup.student.stop[0]], 4: [*new, size - 1, 257]}
    out = rewritten(setup, Scripted(texts), make_own(setup))
    assert outcomes(out) == ["DONE", "CUT", *["DONE"] * 6]
    assert not out.mask[1].any() and out.tokens.max() == size - 1


def test_a_fraction_of_the_rows_keeps_the_students_own_responses(tmp_path):
    setup = make_setup(tmp_path, "method.refine.fraction=0.5", "method.teacher.leak=null")
    own = make_own(setup)
    first, again = (Scripted(answers(setup)) for _ in range(2))
    out = rewritten(setup, first, own)
    same = rewritten(setup, again, own)
    jax.tree.map(np.testing.assert_array_equal, out, same)
    kept = out.original.outcome == Rewritten.KEPT
    assert 0 < kept.sum() < ROWS
    order = np.argsort(own.prompts.row)
    before = jax.tree.map(lambda leaf: leaf[order], jax.device_get(own))
    for name in ("tokens", "mask", "logprob", "model_logprob", "finished", "version", "writer"):
        np.testing.assert_array_equal(getattr(out, name)[kept], getattr(before, name)[kept])
    # Those rows are scored after the plain prompt; the rewriter was not asked for them.
    np.testing.assert_array_equal(
        out.prompts.teacher_length[kept], before.prompts.teacher_length[kept]
    )
    width = before.prompts.teacher_tokens.shape[1]
    np.testing.assert_array_equal(
        out.prompts.teacher_tokens[kept][:, :width], before.prompts.teacher_tokens[kept]
    )
    asked = first.calls[0].prompts.length[order] > 0
    np.testing.assert_array_equal(asked, ~kept)
    assert (out.writer[~kept] == Writer.REWRITER).all()
    # The choice belongs to the sample, whatever else is in the batch.
    turned = jax.tree.map(lambda leaf: leaf[::-1], jax.device_get(own))
    other = rewritten(setup, Scripted(answers(setup)), turned)
    np.testing.assert_array_equal(other.original.outcome, out.original.outcome)
    none = make_setup(tmp_path, "method.refine.fraction=0")
    assert outcomes(rewritten(none, Scripted({}), make_own(none))) == ["KEPT"] * ROWS


def test_rewrites_that_are_much_shorter_are_dropped(tmp_path):
    setup = make_setup(tmp_path, "method.refine.min_length_ratio=0.5")
    texts = answers(setup, lambda row: "x" * (row + 1))  # row + 2 tokens for 10 tokens
    out = rewritten(setup, Scripted(texts), make_own(setup, lambda row: "y" * 9))
    assert outcomes(out) == ["SHORT"] * 3 + ["DONE"] * 5
    assert not out.mask[:3].any() and out.mask[3:].any(axis=1).all()


def test_rows_that_a_rewrite_makes_worse_are_dropped(tmp_path):
    setup = make_setup(tmp_path, "method.refine.drop_worse=true")
    right = [0, 1, 2, 3]  # of the student's own
    later = {0: "0", 1: "9", 4: "8", 5: "1"}  # right, wrong, right, wrong
    texts = answers(setup, lambda row: later.get(row, "77"))
    texts[3] = ids_of(setup, "6", end=False)
    own = make_own(setup, lambda row: f"{2 * row}" if row in right else "z")
    out = rewritten(setup, Scripted(texts, cut=[3]), own)
    assert outcomes(out) == ["DONE", "WORSE", "WORSE", "CUT", "DONE", "DONE", "DONE", "DONE"]
    # The grades are those of what is trained on.
    np.testing.assert_array_equal(out.correct, [1, 0, 0, 0, 1, 0, 0, 0])
    assert not out.mask[[1, 2, 3]].any()


def test_a_rewrite_may_be_scored_after_the_plain_prompt(tmp_path):
    setup = make_setup(tmp_path, "method.refine.score_after=prompt")
    own = make_own(setup)
    out = rewritten(setup, Scripted(answers(setup)), own)
    order = np.argsort(own.prompts.row)
    np.testing.assert_array_equal(out.prompts.teacher_tokens, own.prompts.teacher_tokens[order])
    np.testing.assert_array_equal(out.prompts.teacher_length, own.prompts.teacher_length[order])
    assert trained(out, 0) == ids_of(setup, "new 0")


def with_template(setup, *templates):
    """The setup whose teachers have these chat templates."""
    specs = []
    for spec, template in zip(setup.teachers, templates, strict=True):
        tokenizer = copy.deepcopy(spec.tokenizer)
        tokenizer.chat_template = template
        specs.append(dataclasses.replace(spec, tokenizer=tokenizer))
    return dataclasses.replace(setup, teachers=tuple(specs))


THINKING = (
    "{% for turn in messages %}<|user|>{{ turn.content }}<|end|>{% endfor %}<|assistant|>"
    "{% if think %}<think>{% endif %}"
)


def test_the_teachers_template_may_have_other_arguments_when_it_scores(tmp_path):
    setup = make_setup(tmp_path, "method.refine.score_template_kwargs={think: true}",
                       "method.refine.max_prompt_tokens=47")  # fmt: skip
    setup = with_template(setup, THINKING)
    sampler = Scripted(answers(setup))
    out = rewritten(setup, sampler, make_own(setup, lambda row: "a" * 40 if row == 1 else "abc"))
    asked, own = sampler.calls[0].prompts, np.argsort(sampler.calls[0].prompts.row)
    assert shown(setup, asked.tokens[own[0]], asked.length[own[0]]) == (
        "<|user|>0+0|abc<|end|><|assistant|>"
    )
    prompts = out.prompts
    assert shown(setup, prompts.teacher_tokens[0], prompts.teacher_length[0]) == (
        "<|user|>0+0|abc<|end|><|assistant|><think>"
    )
    # Each of the two is cut to the limit by itself.
    assert shown(setup, prompts.teacher_tokens[1], prompts.teacher_length[1]) == (
        f"<|user|>1+1|{'a' * 14}{CUT}<|end|><|assistant|><think>"
    )
    assert "a" * 40 + "<" in shown(setup, asked.tokens[own[1]], asked.length[own[1]])
    with pytest.raises(UserError, match="does not use 'thunk'"):
        wrong = make_setup(tmp_path, "method.refine.score_template_kwargs={thunk: true}")
        rewritten(wrong, Scripted(answers(wrong)), make_own(wrong))


def test_each_teacher_rewrites_the_rows_that_are_routed_to_it(tmp_path):
    rows = [{"prompt": f"{i}", "solution": "s", "teacher": ("default", "b")[i % 3 == 0]}
            for i in range(ROWS)]  # fmt: skip
    small = ("{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, "
             "num_key_value_heads: 1, head_dim: 8, intermediate_size: 32}")  # fmt: skip
    setup = make_setup(
        tmp_path, f"teachers.b.architecture={small}", "data.teacher_column=teacher",
        "method.score={kind: top_k, k: 4}", "method.loss={kind: support_divergence}", rows=rows,
    )  # fmt: skip
    setup = with_template(setup, THINKING, THINKING.replace("<|user|>", "<|user|>!"))
    sampler, own = Scripted(answers(setup)), make_own(setup)
    out = rewritten(setup, sampler, own)
    assert [call.params is params for call, params in zip(sampler.calls, PARAMS, strict=True)]
    for index, call in enumerate(sampler.calls):
        mine = np.asarray([row % 3 == 0 for row in call.prompts.row]) == (index == 1)
        np.testing.assert_array_equal(call.prompts.length > 0, mine)
        assert call.spec is setup.teachers[index] and call.params is PARAMS[index]
    for row in range(ROWS):
        mark = "!" if row % 3 == 0 else ""
        assert shown(setup, out.prompts.teacher_tokens[row], out.prompts.teacher_length[row]) == (
            f"<|user|>{mark}{row}|try {row}<|end|><|assistant|>"
        )
        assert trained(out, row) == ids_of(setup, f"new {row}")


def test_rows_without_a_response_stay_empty(tmp_path):
    setup = make_setup(tmp_path)
    sampler, own = Scripted(answers(setup)), make_own(setup, empty=[2, 6])
    out = rewritten(setup, sampler, own)
    assert outcomes(out) == ["DONE", "DONE", "KEPT", "DONE", "DONE", "DONE", "KEPT", "DONE"]
    assert not out.mask[[2, 6]].any()
    assert (sampler.calls[0].prompts.length == 0).sum() == 2


def test_all_rows_may_be_dropped(tmp_path):
    setup = make_setup(tmp_path)
    texts = {row: ids_of(setup, "xy", end=False) for row in range(ROWS)}
    out = rewritten(setup, Scripted(texts, cut=range(ROWS)), make_own(setup))
    assert outcomes(out) == ["CUT"] * ROWS and not out.mask.any()
    assert (out.prompts.teacher_length > 0).all()


def test_leaks_in_rewrites_are_counted_or_dropped(tmp_path):
    told = "method.refine.prompt='{problem}|{attempt}|{reference}'"
    pattern = "method.teacher.leak={pattern: 'see \\d+'"
    for drop in ("false", "true"):
        setup = make_setup(tmp_path, told, f"{pattern}, drop: {drop}}}")
        texts = answers(setup, lambda row: "see 1" if row < 3 else "new")
        out = rewritten(setup, Scripted(texts), make_own(setup))
        np.testing.assert_array_equal(out.leaked, [True] * 3 + [False] * 5)
        np.testing.assert_array_equal(out.mask.any(axis=1), [drop == "false"] * 3 + [True] * 5)
    setup = make_setup(tmp_path, told, "method.teacher.leak=null")
    assert rewritten(setup, Scripted(answers(setup)), make_own(setup)).leaked is None
