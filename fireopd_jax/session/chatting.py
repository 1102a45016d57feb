"""A model that answers conversations while somebody watches.

    messages -> token ids that fit the context -> Engine, a few tokens a run -> Answer so far, ...

A `Speaker` has its parameters in the decode layout only. Its KV cache has the size of the
conversation: a quarter or a half of the context, or all of it, compiled when first needed.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fireopd_jax.config import UserError
from fireopd_jax.models.language_model import Params
from fireopd_jax.rollout.requests import Finish, Knobs, Request
from fireopd_jax.rollout.sampling import seed_for
from fireopd_jax.rollout.streaming import Engine
from fireopd_jax.session.specs import ModelSpec
from fireopd_jax.text.chat import Message, check_template, decode, prompt_ids, settled

CONTEXT = 4096
"""Default limit of a conversation in tokens, where the model has as many positions."""
SHARE = 4
"""The oldest turns are dropped where the answer would have less than 1/4 of the context."""
SHOWN_EVERY_S = 0.1
"""Seconds of a run of the device, after which the answer so far is shown."""
MOST_STEPS = 64
"""Largest number of tokens of a run."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer so far, with the time that its model has taken for it."""

    text: str
    tokens: int
    finish: Finish
    first_s: float
    """Seconds to the first token: of the prompt, and of one step."""
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second after the first one, 0 if there is no second."""
        return max(self.tokens - 1, 0) / max(self.seconds - self.first_s, 1e-9)


@dataclasses.dataclass
class Pace:
    """Decoding steps of the next run: as many as an eye does not wait for.

    A run has a fixed cost, up to a conversion of all parameters, so that it may last twice as long
    as one of a single step.
    """

    steps: int = 1
    single_s: float | None = None

    def after(self, seconds: float) -> None:
        """Adapt the number of steps to the duration of a run of so many."""
        if self.single_s is None:
            self.single_s = seconds
        limit = max(SHOWN_EVERY_S, 2 * self.single_s)
        if seconds < limit / 1.5:
            self.steps = min(2 * self.steps, MOST_STEPS)
        elif seconds > limit * 1.5:
            self.steps = max(self.steps // 2, 1)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A conversation as token ids."""

    ids: np.ndarray
    dropped: int
    """Turns at its beginning that have no room."""


class Speaker:
    """One model in a conversation."""

    def __init__(
        self,
        title: str,
        spec: ModelSpec,
        params: Params,
        template_kwargs: Mapping[str, Any],
        context: int | None = None,
        mesh: Any = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Prepare for conversations of up to `context` tokens; nothing is compiled yet.

        Raises UserError for a model without a chat template, or with fewer positions.
        """
        check_template(spec.tokenizer, template_kwargs, spec.name)
        positions = spec.model.config.max_position_embeddings or 2**30
        if context is not None and context > positions:
            raise UserError(
                f"--context {context}: {title} has {positions} positions "
                "(max_position_embeddings); expected at most as many"
            )
        self.title, self.spec, self._kwargs, self._clock = title, spec, template_kwargs, clock
        self.context = context or min(positions, CONTEXT)
        size = self.context
        seed = seed_for(0, "chat")
        # Requests have ids of their own, so that another seed compiles nothing.
        self._engine = Engine(
            spec.model, width=size, room=size, context=size, rows=1, slots=1, seed=seed, mesh=mesh
        )
        self._engine.load(params, compiled=False)
        self._fitted = 0

    # -- prompts

    def prompt(
        self, system: Sequence[Message], turns: Sequence[Sequence[Message]], max_tokens: int
    ) -> Prompt:
        """Return a conversation without its oldest turns, where these have no room.

        Raises UserError where the last turn alone has none, or the template rejects it.
        """
        wanted = min(max_tokens, max(1, self.context // SHARE))
        ids: list[int] = []
        dropped = 0
        for dropped in range(len(turns)):
            messages = [*system, *(each for turn in turns[dropped:] for each in turn)]
            (ids,) = prompt_ids(
                self.spec.tokenizer,
                [messages],
                self._kwargs,
                origins=["the conversation"],
                model=self.spec.name,
            )
            if len(ids) + wanted <= self.context:
                return Prompt(np.asarray(ids, np.int32), dropped)
        if len(ids) < self.context:
            return Prompt(np.asarray(ids, np.int32), dropped)
        raise UserError(
            f"the message has {len(ids):,} tokens with the template, no room for an answer: the "
            f"context is {self.context:,} tokens (--context)"
        )

    # -- answers

    def needs(self, positions: int) -> int | None:
        """Return the size of the cache that must be compiled for so many positions, if any."""
        capacity = self._engine.capacity_for(positions)
        return None if self._engine.compiled(capacity) else min(capacity, self.context)

    def prepare(self, positions: int) -> None:
        """Resize the cache for a conversation of so many positions, and compile what is new."""
        capacity = self._engine.capacity_for(positions)
        if capacity == self._fitted:
            return
        self._engine.fit(positions)
        # The small programs around the loop compile with a first request.
        token = np.zeros(1, np.int32)
        self._engine.generate([Request(0, token, Knobs(temperature=0.0, max_tokens=1))])
        self._fitted = capacity

    def answer(self, prompt: Prompt, knobs: Knobs, sample: int) -> Iterator[Answer]:
        """Yield the answer after each run of a few tokens, the last time when it has ended.

        `sample` seeds it: the same prompt, knobs and sample have the same answer.
        """
        room = min(knobs.max_tokens, self.context - len(prompt.ids))
        knobs = dataclasses.replace(knobs, max_tokens=room, stop=self.spec.stop)
        self.prepare(len(prompt.ids) + room)
        engine, clock, pace = self._engine, self._clock, Pace()
        stream = engine.stream([Request(sample, prompt.ids, knobs)], partial=True)
        first = seconds = 0.0
        try:
            while True:
                start, engine.chunk_steps = clock(), pace.steps
                completion = next(stream, None)
                if completion is None:
                    return
                took = clock() - start
                seconds += took
                text = decode(self.spec.tokenizer, completion.tokens.tolist())
                if first == 0:
                    first = seconds
                else:
                    pace.after(took)
                shown = settled(text) if completion.finish == "running" else text
                yield Answer(shown, len(completion.tokens), completion.finish, first, seconds)
        finally:
            stream.close()  # pyright: ignore[reportAttributeAccessIssue]
