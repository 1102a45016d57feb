"""The evaluation sets of a run: problems in the student's tokens, and how they are sampled.

eval.sets -> EvalSet -> OpenSet (token ids, settings) -> batches of Prompts
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from fireopd_jax.config import UserError
from fireopd_jax.data.pipeline import Encoded, encode, eval_prompts
from fireopd_jax.data.rows import Row
from fireopd_jax.data.settings import DataConfig
from fireopd_jax.evaluation.graders import check_kind
from fireopd_jax.evaluation.responses import Problem
from fireopd_jax.evaluation.sets import EvalSet, read_set
from fireopd_jax.evaluation.settings import EvalSetConfig
from fireopd_jax.models.architecture import DecoderConfig
from fireopd_jax.recipe.schema import Config
from fireopd_jax.session.specs import ModelSpec
from fireopd_jax.text.checks import check_ids
from fireopd_jax.types import Prompts

UNLIMITED = 2**30
ALIGN = 16
"""Prompts are padded to a multiple of this, so that sets of similar prompts share a program."""


@dataclasses.dataclass(frozen=True)
class SetSettings:
    """How a set is sampled: the set's own settings, else those of the run."""

    samples: int
    max_tokens: int
    temperature: float
    top_p: float
    every: int
    grader: str

    @classmethod
    def of(cls, own: EvalSetConfig, config: Config) -> "SetSettings":
        """Return the settings of one set of a run."""
        shared = config.eval
        return cls(
            samples=own.samples,
            max_tokens=own.max_tokens or config.rollout.max_tokens,
            temperature=shared.temperature if own.temperature is None else own.temperature,
            top_p=shared.top_p if own.top_p is None else own.top_p,
            every=shared.every if own.every is None else own.every,
            grader=own.grader or config.data.grader,
        )


@dataclasses.dataclass(frozen=True)
class OpenSet:
    """An evaluation set, tokenized for the student."""

    own: EvalSet
    settings: SetSettings
    encoded: Encoded

    @property
    def name(self) -> str:
        """Name of the set."""
        return self.own.name

    @property
    def problems(self) -> Sequence[Problem]:
        """The problems, by row."""
        return self.own.problems

    def notes(self) -> Iterator[str]:
        """Yield what a user should know of the set."""
        return self.own.notes(self.settings.grader)

    def batches(self, batch_size: int) -> list[Prompts]:
        """Return the prompts, each as often as it is sampled, in equal batches."""
        return eval_prompts(self.encoded, self.encoded.kept, self.settings.samples, batch_size)

    def due(self, done: int, steps: int) -> bool:
        """Return whether the set is evaluated after `done` of `steps` steps."""
        every = self.settings.every
        return done in (0, steps) or bool(every and done % every == 0)


def open_sets(config: Config, student: ModelSpec) -> tuple[OpenSet, ...]:
    """Return the evaluation sets of a run.

    Raises UserError, with file and line, for a row without an answer or a prompt that does not fit
    the student.
    """
    return tuple(_opened(config, student))


def _opened(config: Config, student: ModelSpec) -> Iterator[OpenSet]:
    for name, own in config.eval.sets.items():
        settings = SetSettings.of(own, config)
        check_kind(settings.grader, f"eval.sets.{name}.grader")
        data = dataclasses.replace(own.data, grader=settings.grader)
        chosen = read_set(name, data, own.problems)
        encoded = _encoded(chosen.rows, student)
        check_ids(f"eval.sets.{name}: a prompt", encoded.prompts, student.model.vocab_size)
        key, model = f"eval.sets.{name}.max_tokens", student.model.config
        check_positions(encoded.prompts, chosen.rows, settings.max_tokens, model, key)
        yield OpenSet(chosen, settings, encoded)


def check_positions(
    ids: Sequence[Sequence[int] | np.ndarray],
    rows: Sequence[Row],
    max_tokens: int,
    model: DecoderConfig,
    key: str,
) -> None:
    """Raise UserError, with file and line, where prompt and response exceed the positions.

    A shorter limit for some prompts would make their responses wrong unnoticed.
    """
    limit = model.max_position_embeddings
    longest = max(range(len(ids)), key=lambda index: len(ids[index]))
    length = len(ids[longest])
    if limit is None or length + max_tokens <= limit:
        return
    room = limit - length
    raise UserError(
        f"{rows[longest].origin}: the prompt has {length} tokens; with {key}={max_tokens} that is "
        f"more than the model's {limit} positions (max_position_embeddings); "
        + (f"expected {key} of at most {room}" if room > 0 else "it has no room for a response")
    )


def _encoded(rows: Sequence[Row], student: ModelSpec) -> Encoded:
    """Return the student's prompts, padded to the longest."""
    encoded = encode(
        rows,
        tokenizer=student.tokenizer,
        template_kwargs=student.config.chat_template_kwargs,
        teacher_tokenizers=(),
        teacher_template_kwargs=(),
        route=np.zeros(len(rows), np.int32),
        config=DataConfig(max_prompt_tokens=UNLIMITED),
        max_reference_tokens=0,
    )
    width = -(-max(map(len, encoded.prompts)) // ALIGN) * ALIGN
    return dataclasses.replace(encoded, max_prompt_tokens=width, max_teacher_prompt_tokens=width)
