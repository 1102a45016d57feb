"""What is asked of an engine, and what it gives back: NumPy arrays of one response each."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int32

from fireopd_jax.config import UserError
from fireopd_jax.rollout.sampling import NO_TOKEN

Finish = Literal["running", "stop", "length", "not_finite", "overlong", "budget"]
"""Why a response ended; `running` never leaves the engine."""
STOP_SLOTS = 8
"""Stop tokens that a request may name."""


@dataclasses.dataclass(frozen=True)
class Knobs:
    """How one response is drawn."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    min_tokens: int = 0
    """Tokens before a stop token may be drawn."""
    max_tokens: int = 2**30
    """Longest response, its stop token included; the engine's room bounds it too."""
    stop: tuple[int, ...] = ()
    """Tokens that end the response; the one that did is kept."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end the response: it is cut after the token that completes the first of them."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """One response; `logprobs` are of the distribution really sampled."""

    id: int
    tokens: Int32[np.ndarray, " T"]
    logprobs: Float32[np.ndarray, " T"]
    model_logprobs: Float32[np.ndarray, " T"]
    """Of the raw model at temperature 1."""
    versions: Int32[np.ndarray, " T"]
    """Update count of the parameters that drew each token."""
    finish: Finish

    def cut(self, length: int, finish: Finish) -> "Completion":
        """Keep the first tokens."""
        arrays = ("tokens", "logprobs", "model_logprobs", "versions")
        kept = {name: getattr(self, name)[:length] for name in arrays}
        return dataclasses.replace(self, finish=finish, **kept)


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, and whose random stream answers it."""

    id: int
    """Identity of the random stream: the same id draws the same response, whatever else runs."""
    prompt: Int32[np.ndarray, " P"]
    knobs: Knobs = Knobs()
    begun: Completion | None = None
    """An unfinished response that goes on, with the draws that it would have had."""
    expected: int = 0
    """Guess of the response's length, for who starts first; 0 is none."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """When a rollout ends with rows unfinished; each may be none."""

    tokens: int | None = None
    """Response tokens, never exceeded."""
    seconds: float | None = None
    """Wall time, looked at between two pieces of work; results depend on the machine."""


def empty(request: Request, finish: Finish) -> Completion:
    """Return what there is of a request that nothing was drawn for."""
    if request.begun is not None:
        return dataclasses.replace(request.begun, finish=finish)
    tokens, logprobs = np.zeros(0, np.int32), np.zeros(0, np.float32)
    return Completion(request.id, tokens, logprobs, logprobs, tokens, finish)


def check_request(request: Request, vocab_size: int) -> None:
    """Refuse what no response can be drawn for."""
    if not len(request.prompt):
        raise UserError(f"request {request.id}: the prompt is empty; expected at least one token")
    worst = int(np.max(request.prompt))
    if worst >= vocab_size or int(np.min(request.prompt)) < 0:
        raise UserError(
            f"request {request.id}: the prompt has token {worst}, the vocabulary {vocab_size}"
        )
    check_stop(request.knobs.stop, vocab_size)


def check_stop(stop: Sequence[int], vocab_size: int) -> None:
    """Refuse stop tokens that can never be drawn, and more than there is room for."""
    if len(stop) > STOP_SLOTS:
        raise UserError(f"{len(stop)} stop tokens are named; expected at most {STOP_SLOTS}")
    for token in stop:
        if not 0 <= token < vocab_size:
            raise UserError(
                f"stop token {token} is outside the vocabulary of {vocab_size} tokens, so that "
                "no response would end there; take it out of the generation config"
            )


def padded_stop(stop: Sequence[int]) -> list[int]:
    """Fill up with what is no token."""
    return [*stop, *[NO_TOKEN] * (STOP_SLOTS - len(stop))]
