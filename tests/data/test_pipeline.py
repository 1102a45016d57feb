import copy
import dataclasses
import json

import numpy as np
import pytest

from fireopd_jax.config import UserError
from fireopd_jax.data.pipeline import PromptLoader, encode, eval_prompts, split
from fireopd_jax.data.sources import DataConfig, Row
from fireopd_jax.text.chat import decode
from fireopd_jax.text.tokenizer import BUILTIN, load_tokenizer

TOKENIZER = load_tokenizer(BUILTIN)
PAD, END, USER, ASSISTANT = 256, 257, 259, 260
FIELDS = ("tokens", "length", "teacher_tokens", "teacher_length", "teacher", "row", "sample_id")


def row(text, reference=None):
    prompt = ({"role": "user", "content": text},)
    return Row(prompt, "1", reference, teacher=None, origin=f"file:{text}")


def other_teacher():
    """A teacher tokenizer with an upper-casing template and another pad id."""
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = "{{ messages[0]['content'] | upper }}{{ '!' if loud }}"
    tokenizer.pad_token = "<|system|>"
    return tokenizer


def encoded_rows(rows, *, limit=8, reference_limit=4, overlong="drop"):
    return encode(
        rows,
        tokenizer=TOKENIZER,
        template_kwargs={},
        teacher_tokenizers=[TOKENIZER],
        teacher_template_kwargs=[{}],
        route=np.zeros(len(rows), np.int32),
        config=DataConfig(max_prompt_tokens=limit, overlong=overlong),
        max_reference_tokens=reference_limit,
    )


def loader(encoded, indices=None, **kwargs):
    indices = np.arange(len(encoded.prompts)) if indices is None else indices
    settings = {"prompts_per_step": 3, "group_size": 2, "seed": 5, **kwargs}
    return PromptLoader(encoded, indices, **settings)


def same(left, right):
    for name in (*FIELDS, "group"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)


def test_the_split_depends_on_the_prompts_text_alone():
    texts = [f"p{index % 20}" for index in range(50)]
    train, held = split([row(text) for text in texts], 6)
    assert sorted([*train, *held]) == list(range(50))
    assert (np.diff(train) > 0).all()
    chosen = {texts[index] for index in held}
    assert len(chosen) == 6
    assert chosen.isdisjoint({texts[index] for index in train})
    order = np.random.default_rng(0).permutation(50)
    _, again = split([row(texts[index]) for index in order], 6)
    # Held-out rows are ordered by hash: the first few do not depend on the order in the file.
    by_text = list(dict.fromkeys(texts[index] for index in held))
    assert list(dict.fromkeys(texts[order[index]] for index in again)) == by_text
    _, fewer = split([row(text) for text in texts], 5)
    assert list(dict.fromkeys(texts[index] for index in fewer)) == by_text[:5]


def test_the_split_must_leave_training_rows():
    rows = [row("a"), row("a"), row("b")]
    train, held = split(rows, 0)
    assert (train.tolist(), held.tolist()) == ([0, 1, 2], [])
    with pytest.raises(UserError, match=r"eval\.problems=2: nothing .* 2 distinct prompts"):
        split(rows, 2)


def test_only_prompts_with_answers_are_held_out():
    rows = [row(text) for text in "abcdefgh"]
    missing = (1, 4, 6)
    some = [
        dataclasses.replace(each, answer=None) if i in missing else each
        for i, each in enumerate(rows)
    ]
    train, held = split(some, 5)
    assert sorted(held) == [0, 2, 3, 5, 7] and train.tolist() == list(missing)
    # Of rows that all have answers, the choice is what it was before answers could be missing.
    _, chosen = split(rows, 3)
    assert [rows[i].prompt[0]["content"] for i in chosen] == ["a", "e", "g"]
    with pytest.raises(UserError, match=r"file:b: no answer .* 5 of 8 prompts .*problems=6 "):
        split(some, 6)


def test_a_prompt_with_an_unanswered_row_is_trained_on():
    rows = [row("a"), dataclasses.replace(row("a"), answer=None), row("b"), row("c")]
    train, held = split(rows, 2)
    assert (train.tolist(), sorted(held)) == ([0, 1], [2, 3])


def test_each_row_is_encoded_for_its_own_teacher():
    encoded = encode(
        [row("a"), row("b"), row("c")],
        tokenizer=TOKENIZER,
        template_kwargs={},
        teacher_tokenizers=[TOKENIZER, other_teacher()],
        teacher_template_kwargs=[{}, {"loud": True}],
        route=np.asarray([0, 1, 0], np.int32),
        config=DataConfig(max_prompt_tokens=5),
        max_reference_tokens=4,
    )
    student = [[USER, ord(letter), END, ASSISTANT] for letter in "abc"]
    assert [ids.tolist() for ids in encoded.prompts] == student
    assert [ids.tolist() for ids in encoded.teacher_prompts] == [student[0], [*b"B!"], student[2]]
    (batch,) = eval_prompts(encoded, np.arange(3), 1, 3)
    assert batch.teacher.tolist() == [0, 1, 0]
    assert batch.tokens[1].tolist() == [*student[1], PAD]
    assert batch.teacher_tokens.tolist() == [
        [*student[0], PAD],
        [*b"B!", 258, 258, 258],
        [*student[2], PAD],
    ]
    assert batch.teacher_length.tolist() == [4, 2, 4]


def test_the_teachers_prompt_must_fit_too():
    teacher = copy.deepcopy(TOKENIZER)
    teacher.chat_template = "{{ messages[0]['content'] * 9 }}"
    encoded = encode(
        [row("a"), row("b")],
        tokenizer=TOKENIZER,
        template_kwargs={},
        teacher_tokenizers=[TOKENIZER, teacher],
        teacher_template_kwargs=[{}, {}],
        route=np.asarray([0, 1], np.int32),
        config=DataConfig(max_prompt_tokens=8),
        max_reference_tokens=4,
    )
    assert encoded.kept.tolist() == [0]


def test_prompts_and_references_that_are_too_long_are_dropped_and_counted():
    rows = [row("a" * 5, "abc"), row("a" * 6), row("b", "abcd"), row("c", "")]
    encoded = encoded_rows(rows)
    assert encoded.kept.tolist() == [0, 2, 3]
    assert (encoded.dropped_prompts, encoded.dropped_references) == (1, 1)
    first, second, third, fourth = encoded.references
    assert first.tolist() == [*b"abc", END]
    assert second is None and third is None
    assert fourth.tolist() == [END]


def test_a_prompt_that_is_too_long_may_be_an_error():
    with pytest.raises(UserError, match=r"file:aaaaaa: the prompt has 9 tokens, over .*=8"):
        encoded_rows([row("a"), row("a" * 6)], overlong="error")
    fits = "none of 2 prompts fits, they have 9 to 10 tokens; expected data.max_prompt_tokens=16"
    with pytest.raises(UserError, match=fits):
        encoded_rows([row("a" * 6), row("a" * 7)])


@pytest.mark.parametrize(("answered", "held"), [(0, 0), (9, 0), (10, 1), (200, 20), (900, 64)])
def test_by_default_a_tenth_of_the_answered_prompts_is_held_out_up_to_64(answered, held):
    asked = [dataclasses.replace(row(f"q{i}"), answer=None) for i in range(1000)]
    rows = [dataclasses.replace(each, answer="0") for each in asked[:answered]] + asked[answered:]
    train, held_out = split(rows, None)
    assert (len(train), len(held_out)) == (1000 - held, held)
    assert all(rows[i].answer is not None for i in held_out)


def test_a_batch_holds_groups_side_by_side():
    batch = next(loader(encoded_rows([row(text) for text in "abcdefg"])))
    assert batch.tokens.shape == batch.teacher_tokens.shape == (6, 8)
    assert batch.group.tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.sample_id.tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.row[0] == batch.row[1] != batch.row[2] == batch.row[3]
    assert batch.length.tolist() == [4] * 6
    for index, tokens in zip(batch.row, batch.tokens, strict=True):
        assert tokens.tolist() == [USER, ord("abcdefg"[index]), END, ASSISTANT] + [PAD] * 4
    assert batch.reference is None and batch.reference_length is None
    assert all(getattr(batch, name).dtype == np.int32 for name in (*FIELDS, "group"))


def test_batches_span_epochs_and_drop_no_row():
    stream = loader(encoded_rows([row(text) for text in "abcdefg"]), np.asarray([0, 1, 3, 4, 6]))
    batches = [next(stream) for _ in range(5)]
    drawn = np.concatenate([batch.row[::2] for batch in batches]).reshape(3, 5)
    for epoch in drawn:
        assert sorted(epoch) == [0, 1, 3, 4, 6]
    assert len({tuple(epoch) for epoch in drawn}) > 1
    ids = np.concatenate([batch.sample_id for batch in batches])
    assert ids.tolist() == list(range(30))


def test_the_order_of_the_stream_depends_on_the_seed():
    encoded = encoded_rows([row(chr(97 + index)) for index in range(20)])
    streams = [loader(encoded, prompts_per_step=20, seed=seed) for seed in (5, 5, 6)]
    first, again, other = [next(stream).row.tolist() for stream in streams]
    assert first == again != other


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7])
def test_a_restored_loader_goes_on_with_the_same_batches(steps):
    # Six rows and three prompts per step: 2 steps end an epoch; 1, 3 and 7 stop within one.
    encoded = encoded_rows([row(text) for text in "abcdef"])
    stream = loader(encoded)
    for _ in range(steps):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    expected = [next(stream) for _ in range(5)]
    restored = loader(encoded)
    next(restored)
    restored.set_state(state)
    for batch in expected:
        same(next(restored), batch)


def test_the_position_does_not_depend_on_the_batch_size():
    encoded = encoded_rows([row(text) for text in "abcdef"])
    wide, narrow = loader(encoded, prompts_per_step=4), loader(encoded, prompts_per_step=2)
    expected = next(wide)
    rows = np.concatenate([next(narrow).row for _ in range(2)])
    assert rows.tolist() == expected.row.tolist()
    narrow.set_state(wide.get_state())
    assert next(narrow).row.tolist() == next(wide).row.tolist()[:4]


def test_a_position_of_other_data_is_refused():
    state = loader(encoded_rows([row(text) for text in "abcdef"])).get_state()
    with pytest.raises(UserError, match="another stream of prompts: its data is"):
        loader(encoded_rows([row(text) for text in "abcdeg"])).set_state(state)
    with pytest.raises(UserError, match="its seed is 5, here it is 6"):
        loader(encoded_rows([row(text) for text in "abcdef"]), seed=6).set_state(state)


def test_with_references_only_rows_that_have_one_are_drawn():
    rows = [row("a", "r"), row("b"), row("c", "st"), row("d", "too long"), row("e" * 9, "u")]
    stream = loader(encoded_rows(rows), references=True, prompts_per_step=2, group_size=1)
    for _ in range(3):
        batch = next(stream)
        assert sorted(batch.row) == [0, 2]
        assert batch.reference.shape == (2, 4)
        assert batch.reference_length.tolist() == [len(rows[i].reference) + 1 for i in batch.row]
        for index, reference, length in zip(
            batch.row, batch.reference, batch.reference_length, strict=True
        ):
            assert reference[length - 1] == END
            assert (reference[length:] == PAD).all()
            assert decode(TOKENIZER, reference.tolist()) == rows[index].reference
    with pytest.raises(UserError, match="a reference that fits"):
        loader(encoded_rows([row("a"), row("b")]), references=True)
    with pytest.raises(UserError, match="none of the 1 training rows"):
        loader(encoded_rows(rows), np.asarray([4]))


def test_evaluation_batches_are_of_one_shape_and_padded():
    encoded = encoded_rows([row(text) for text in ("a", "b" * 9, "c", "d", "e")])
    batches = eval_prompts(encoded, np.asarray([1, 2, 4]), 3, 4)
    assert [batch.tokens.shape for batch in batches] == [(4, 8), (4, 8)]
    rows = np.concatenate([batch.row for batch in batches])
    assert rows.tolist() == [2, 2, 2, 4, 4, 4, -1, -1]
    ids = np.concatenate([batch.sample_id for batch in batches])
    assert ids.tolist() == [6, 7, 8, 12, 13, 14, -1, -1]
    assert np.concatenate([batch.group for batch in batches]).tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    length = np.concatenate([batch.length for batch in batches])
    assert length.tolist() == [4] * 6 + [0, 0]
    assert np.concatenate([batch.teacher_length for batch in batches])[6:].tolist() == [0, 0]
    assert (batches[1].tokens[2:] == PAD).all()
    assert eval_prompts(encoded, np.asarray([], np.int64), 3, 4) == []


def test_evaluation_ids_do_not_depend_on_the_batch_size():
    encoded = encoded_rows([row(text) for text in "abcde"])
    (one,) = eval_prompts(encoded, np.arange(5), 2, 10)
    two = eval_prompts(encoded, np.arange(5), 2, 5)
    for name in (*FIELDS, "group"):
        joined = np.concatenate([getattr(batch, name) for batch in two])
        np.testing.assert_array_equal(joined, getattr(one, name))
