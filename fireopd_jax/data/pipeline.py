"""Batches of training prompts and of evaluation prompts, made from rows of text.

    rows -> split -> encode -> PromptLoader (endless, shuffled, checkpointed) -> Prompts
                            -> eval_prompts (fixed)                           -> Prompts

All arrays are NumPy and of one static shape, so nothing downstream compiles twice. The n-th prompt
is a function of (data, seed, n) alone, so a checkpoint needs only the position in the stream.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from jaxtyping import Int32, Integer
from transformers import PreTrainedTokenizerBase

from fireopd_jax.config import UserError
from fireopd_jax.data.lengths import not_too_long, not_too_short
from fireopd_jax.data.mixture import prompt_stream
from fireopd_jax.data.repeats import prompt_digest
from fireopd_jax.data.rows import Row
from fireopd_jax.data.settings import DataConfig
from fireopd_jax.text.chat import prompt_ids, response_ids
from fireopd_jax.types import Prompts

SAMPLE_IDS = 2**31
CHUNK = 1000
"""Rows that are tokenized at a time: lists of ids take ten times the memory of arrays."""
PROBLEMS, TENTH = 64, 10
"""Problems that are held out by default, of at least ten times as many prompts with answers."""
MANY = 20_000
"""Rows above which tokenizing takes long enough to be shown."""
Show = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]
"""Opens a progress display: label, total -> context of a function that advances it."""


def unseen(label: str, total: int) -> AbstractContextManager[Callable[[int], object]]:
    """Return a progress display that shows nothing."""
    return nullcontext(lambda n: None)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Token ids of all rows, by row index; only rows in `kept` are used."""

    prompts: list[Int32[np.ndarray, " _"]]
    teacher_prompts: list[Int32[np.ndarray, " _"]]
    """The same prompts in the chat template of each row's teacher."""
    references: list[Int32[np.ndarray, " _"] | None]
    route: Int32[np.ndarray, " N"]
    kept: Integer[np.ndarray, " M"]
    """Indices of the rows whose prompts have at most `max_prompt_tokens` tokens."""
    max_prompt_tokens: int
    max_teacher_prompt_tokens: int
    max_reference_tokens: int
    pad: int
    teacher_pads: tuple[int, ...]
    dropped_prompts: int
    dropped_references: int
    """References longer than `max_reference_tokens`; their rows stay, without a reference."""
    source: Int32[np.ndarray, " N"]
    """Index of each row's source in the mixture."""
    weights: tuple[float, ...] = ()
    """Weight of each source; none without a mixture."""
    dropped_short: int = 0
    """Prompts shorter than `min_prompt_tokens`; `dropped_prompts` are the longer ones."""


def split(
    rows: Sequence[Row], held_out: int | None
) -> tuple[Integer[np.ndarray, " M"], Integer[np.ndarray, " K"]]:
    """Return the indices of the training rows and of the rows of `held_out` distinct prompts.

    Of the prompts whose rows all have answers, those with the smallest SHA-256 are held out, so the
    choice does not depend on the order of the rows, and rows with equal prompts are on the same
    side. The held-out rows are ordered by hash: any first few of them are an unbiased sample,
    however the file is sorted. By default (None) `PROBLEMS` are, or a tenth of those prompts if
    that is less. Raises `UserError` if too few prompts have answers, or if no training row would
    be left.
    """
    digests = [prompt_digest(row) for row in rows]
    distinct = set(digests)
    unanswered = {d for d, row in zip(digests, rows, strict=True) if row.answer is None}
    answered = sorted(distinct - unanswered)
    if held_out is None:
        held_out = min(PROBLEMS, len(answered) // TENTH)
    if held_out >= len(distinct):
        raise UserError(
            f"eval.problems={held_out}: nothing is left to train on, the rows that fit have "
            f"{len(distinct)} distinct prompts"
        )
    if held_out > len(answered):
        without = next(row for row in rows if row.answer is None)
        raise UserError(
            f"{without.origin}: no answer to grade by; {len(answered)} of {len(distinct)} prompts "
            f"have one, and eval.problems={held_out} are held out: name the column as "
            "data.answer_column, or set eval.problems=0"
        )
    chosen = set(answered[:held_out])
    held = [index for index, digest in enumerate(digests) if digest in chosen]
    train = [index for index, digest in enumerate(digests) if digest not in chosen]
    held.sort(key=lambda index: digests[index])
    return np.asarray(train, np.int64), np.asarray(held, np.int64)


def encode(
    rows: Sequence[Row],
    *,
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any],
    teacher_tokenizers: Sequence[PreTrainedTokenizerBase],
    teacher_template_kwargs: Sequence[Mapping[str, Any]],
    teacher_models: Sequence[str] | None = None,
    route: Int32[np.ndarray, " N"],
    config: DataConfig,
    max_reference_tokens: int,
    show: Show = unseen,
) -> Encoded:
    """Tokenize all rows for the student and for each row's teacher.

    `route` indexes the teachers' tokenizers, template arguments and names (in errors); without any
    teacher, their prompts are the student's. `show` displays the progress. Raises `UserError` if no
    prompt fits, or if one is too long and `config.overlong` is "error".
    """
    show = show if len(rows) > MANY else unseen
    with show("prompts of the student", len(rows)) as advance:
        prompts = render(tokenizer, rows, template_kwargs, "student", advance)
    teacher_prompts = list(prompts)
    names = teacher_models or ["the teacher"] * len(teacher_tokenizers)
    routes = zip(teacher_tokenizers, teacher_template_kwargs, names, strict=True)
    for teacher, (teacher_tokenizer, kwargs, name) in enumerate(routes):
        if teacher_tokenizer is tokenizer and kwargs == template_kwargs:
            continue
        own = np.flatnonzero(route == teacher)
        with show(f"prompts of {name}", len(own)) as advance:
            theirs = [rows[int(index)] for index in own]
            rendered = render(teacher_tokenizer, theirs, kwargs, name, advance)
        for index, ids in zip(own, rendered, strict=True):
            teacher_prompts[index] = ids
    longest = np.asarray(
        [max(len(p), len(q)) for p, q in zip(prompts, teacher_prompts, strict=True)], np.int64
    )
    fits = not_too_long(rows, longest, config)
    kept = not_too_short(fits, np.asarray([len(ids) for ids in prompts], np.int64), config)
    references, dropped_references = encode_references(tokenizer, rows, max_reference_tokens)
    return Encoded(
        prompts=prompts,
        teacher_prompts=teacher_prompts,
        references=references,
        route=route,
        kept=kept,
        max_prompt_tokens=config.max_prompt_tokens,
        max_teacher_prompt_tokens=config.max_prompt_tokens,
        max_reference_tokens=max_reference_tokens,
        pad=pad_id(tokenizer),
        teacher_pads=tuple(pad_id(teacher) for teacher in teacher_tokenizers or (tokenizer,)),
        dropped_prompts=len(rows) - len(fits),
        dropped_short=len(fits) - len(kept),
        dropped_references=dropped_references,
        source=np.asarray([row.source for row in rows], np.int32),
        weights=config.weights,
    )


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the padding id; any valid token id will do, because lengths mark the padding."""
    pad = tokenizer.pad_token_id
    return pad if isinstance(pad, int) else 0


def render(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    kwargs: Mapping[str, Any],
    model: str = "student",
    advance: Callable[[int], object] = lambda n: None,
) -> list[Int32[np.ndarray, " _"]]:
    """Tokenize the rows' prompts, and the given beginnings of responses, with one chat template.

    Errors name the row and `model`.
    """
    begun = any(row.begun for row in rows)
    rendered = []
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        ids = prompt_ids(
            tokenizer,
            [row.prompt for row in chunk],
            kwargs,
            begun=[row.begun for row in chunk] if begun else None,
            tools=[row.tools for row in chunk],
            origins=[row.origin for row in chunk],
            model=model,
        )
        rendered += [np.asarray(row, np.int32) for row in ids]
        advance(len(chunk))
    return rendered


def encode_references(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], limit: int
) -> tuple[list[Int32[np.ndarray, " _"] | None], int]:
    """Return the token ids of the references that fit, and the number of those that do not."""
    references: list[Int32[np.ndarray, " _"] | None] = [None] * len(rows)
    given = [(index, row.reference) for index, row in enumerate(rows) if row.reference is not None]
    dropped = 0
    for start in range(0, len(given), CHUNK):
        chunk = given[start : start + CHUNK]
        ids = response_ids(tokenizer, [text for _, text in chunk])
        for (index, _), row in zip(chunk, ids, strict=True):
            if len(row) <= limit:
                references[index] = np.asarray(row, np.int32)
            else:
                dropped += 1
    return references, dropped


class PromptLoader:
    """Endless iterator over batches of training prompts; the rows of a group are adjacent.

    Each epoch has its own order. A batch may span two epochs, so no row is left out.
    """

    def __init__(
        self,
        encoded: Encoded,
        indices: Integer[np.ndarray, " M"],
        *,
        prompts_per_step: int,
        group_size: int,
        seed: int,
        references: bool = False,
    ):
        """Draw from the kept rows of `indices`; with `references`, from those that have one."""
        drawn = [
            int(index)
            for index in np.intersect1d(indices, encoded.kept)
            if not references or encoded.references[index] is not None
        ]
        if not drawn:
            missing = "a prompt that fits" + (" and a reference that fits" if references else "")
            raise UserError(f"data: none of the {len(indices)} training rows has {missing}")
        self.encoded = encoded
        self.prompts_per_step = prompts_per_step
        self.group_size = group_size
        self.references = references
        self.stream = prompt_stream(drawn, seed, encoded.source, encoded.weights)
        self.position = 0
        self.identity = {"data": data_digest(encoded, drawn, references), "seed": seed}

    def __iter__(self) -> Iterator[Prompts]:
        """Return the loader itself: all iterators share its position."""
        return self

    def __next__(self) -> Prompts:
        """Return the next batch."""
        positions = self.position + np.arange(self.prompts_per_step, dtype=np.int64)
        rows = np.asarray([self.stream[int(position)] for position in positions], np.int32)
        self.position += self.prompts_per_step
        members = np.arange(self.group_size)
        sample_id = (positions[:, None] * self.group_size + members[None]) % SAMPLE_IDS
        return collate(
            self.encoded,
            np.repeat(rows, self.group_size),
            sample_id=sample_id.reshape(-1).astype(np.int32),
            group=np.repeat(np.arange(self.prompts_per_step, dtype=np.int32), self.group_size),
            references=self.references,
        )

    def seek(self, batch: int) -> None:
        """Set the position to the first prompt of a batch, counted from 0."""
        self.position = batch * self.prompts_per_step

    def get_state(self) -> dict[str, Any]:
        """Return the position and the stream's identity (data hash and seed), as JSON values."""
        return {"position": self.position, **self.identity}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore a saved position; raise `UserError` if it belongs to another stream."""
        for key, value in self.identity.items():
            if state[key] != value:
                raise UserError(
                    f"data: the saved position belongs to another stream of prompts: its {key} "
                    f"is {state[key]}, here it is {value}; resume with the same data, tokenizer "
                    "and seed"
                )
        self.position = int(state["position"])


def data_digest(encoded: Encoded, indices: Sequence[int], references: bool) -> str:
    """Return a hash of everything that a stream yields, to detect a position of another stream."""
    digest = hashlib.sha256()
    for index in indices:
        parts = [encoded.prompts[index], encoded.teacher_prompts[index]]
        if references and (reference := encoded.references[index]) is not None:
            parts.append(reference)
        for ids in (np.asarray([index, encoded.route[index]]), *parts):
            digest.update(np.asarray(len(ids), "<i8").tobytes())
            digest.update(ids.astype("<i8").tobytes())
    if encoded.weights:
        digest.update(np.asarray(encoded.weights, "<f8").tobytes())
        digest.update(encoded.source[np.asarray(indices)].astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def eval_prompts(
    encoded: Encoded,
    indices: Integer[np.ndarray, " M"],
    samples_per_prompt: int,
    batch_size: int,
) -> list[Prompts]:
    """Return the kept rows of `indices`, each `samples_per_prompt` times, in equal batches.

    `sample_id` is row * samples_per_prompt + s (mod 2^31), whatever the batch size. The last batch
    is padded with rows of length 0, with `row` and `sample_id` -1 and a group of their own.
    """
    rows = indices[np.isin(indices, encoded.kept)].astype(np.int64)
    samples = np.arange(samples_per_prompt)
    sample_id = (rows[:, None] * samples_per_prompt + samples[None]) % SAMPLE_IDS
    padding = -len(rows) * samples_per_prompt % batch_size

    def fill(values: Integer[np.ndarray, " A"], value: int) -> Int32[np.ndarray, " B"]:
        return np.pad(values, (0, padding), constant_values=value).astype(np.int32)

    row = fill(np.repeat(rows, samples_per_prompt), -1)
    ids = fill(sample_id.reshape(-1), -1)
    group = fill(np.repeat(np.arange(len(rows)), samples_per_prompt), len(rows))
    return [
        collate(encoded, row[at], sample_id=ids[at], group=group[at], references=False)
        for at in (slice(start, start + batch_size) for start in range(0, len(row), batch_size))
    ]


def collate(
    encoded: Encoded,
    rows: Int32[np.ndarray, " B"],
    *,
    sample_id: Int32[np.ndarray, " B"],
    group: Int32[np.ndarray, " B"],
    references: bool,
) -> Prompts:
    """Return the rows as `Prompts`, right-padded to static widths; row -1 is padding."""
    width = encoded.max_prompt_tokens
    teacher = np.asarray([encoded.route[row] if row >= 0 else 0 for row in rows], np.int32)
    pads = [encoded.teacher_pads[route] for route in teacher]
    tokens, length = padded(
        [encoded.prompts[row] if row >= 0 else None for row in rows],
        width,
        [encoded.pad] * len(rows),
    )
    teacher_tokens, teacher_length = padded(
        [encoded.teacher_prompts[row] if row >= 0 else None for row in rows],
        encoded.max_teacher_prompt_tokens,
        pads,
    )
    reference = reference_length = None
    if references:
        reference, reference_length = padded(
            [encoded.references[row] for row in rows],
            encoded.max_reference_tokens,
            [encoded.pad] * len(rows),
        )
    return Prompts(
        tokens=tokens,
        length=length,
        teacher_tokens=teacher_tokens,
        teacher_length=teacher_length,
        teacher=teacher,
        row=rows,
        sample_id=sample_id,
        group=group,
        reference=reference,
        reference_length=reference_length,
    )


def padded(
    sequences: Sequence[Int32[np.ndarray, " _"] | None], width: int, pads: Sequence[int]
) -> tuple[Int32[np.ndarray, "B W"], Int32[np.ndarray, " B"]]:
    """Return the right-padded sequences and their lengths; None becomes a row of length 0."""
    tokens = np.repeat(np.asarray(pads, np.int32)[:, None], width, axis=1)
    length = np.zeros(len(sequences), np.int32)
    for index, sequence in enumerate(sequences):
        if sequence is not None:
            tokens[index, : len(sequence)] = sequence
            length[index] = len(sequence)
    return tokens, length
