"""Requests to an engine and its responses: NumPy arrays of one response each."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32

from fireopd_jax.config import UserError
from fireopd_jax.rollout.sampling import NO_TOKEN

Finish = Literal["running", "stop", "length", "not_finite", "overlong", "budget"]
"""Why a response ended; `running` is of those that `partial` asks the engine for."""
OF_TOKENS: Mapping[str, str] = {
    "tokens": "tokens",
    "logprob": "logprobs",
    "model_logprob": "model_logprobs",
    "policy_logprob": "policy_logprobs",
    "policy_entropy": "policy_entropies",
    "version": "versions",
}
"""Fields of the request table with a value for each token -> the fields of a completion."""
STOP_SLOTS = 8
"""Largest number of stop tokens of a request."""


@dataclasses.dataclass(frozen=True)
class Knobs:
    """Sampling settings of one response."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 disables it."""
    min_p: float = 0.0
    min_tokens: int = 0
    """Tokens before a stop token may be sampled."""
    max_tokens: int = 2**30
    """Longest response, its stop token included; the engine's `room` is a limit, too."""
    stop: tuple[int, ...] = ()
    """Token ids that end the response, which keeps the one that ended it."""
    entropy: bool = False
    """Whether `Completion.policy_entropies` is computed."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end the response: it is cut after the token that completes the first of them."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """One response of T tokens."""

    id: int
    """`id` of the request."""
    tokens: Int32[np.ndarray, " T"]
    logprobs: Float32[np.ndarray, " T"]
    """Of the distribution that was sampled, after temperature and filters."""
    model_logprobs: Float32[np.ndarray, " T"]
    """Of the model at temperature 1, without filters."""
    versions: Int32[np.ndarray, " T"]
    """Update count of the parameters that each token was sampled from."""
    finish: Finish
    policy_logprobs: Float32[np.ndarray, " T"] | None = None
    """Of the model at the request's temperature, without filters."""
    policy_entropies: Float32[np.ndarray, " T"] | None = None
    """Entropies of that distribution, in nats; 0 where `Knobs.entropy` is false."""

    def cut(self, length: int, finish: Finish) -> "Completion":
        """Return the completion with its first `length` tokens only."""
        arrays = {name: getattr(self, name) for name in OF_TOKENS.values()}
        kept = {name: each[:length] for name, each in arrays.items() if each is not None}
        return dataclasses.replace(self, finish=finish, **kept)


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and how to answer it."""

    id: int
    """Seeds the response's random numbers: one id has one response, whatever else runs."""
    prompt: Int32[np.ndarray, " P"]
    knobs: Knobs = Knobs()
    begun: Completion | None = None
    """An unfinished response to continue; its next tokens are those that it would have had."""
    expected: int = 0
    """Estimated response length in tokens: the longest start first; 0 is no estimate."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """Limits after which unfinished responses are returned as they are; None is no limit."""

    tokens: int | None = None
    """Response tokens in total, never exceeded."""
    seconds: float | None = None
    """Wall time, checked between two chunks of steps; results then depend on the machine."""


@runtime_checkable
class Feed(Protocol):
    """Changes a stream of requests while it runs; asked between two runs of the device."""

    def arriving(self) -> Iterable[Request]:
        """Return the requests that have arrived since the last call."""
        ...

    def abandoned(self) -> Collection[int]:
        """Return ids of requests that are to be dropped; no response of theirs is yielded."""
        ...


def empty(request: Request, finish: Finish) -> Completion:
    """Return the completion of a request for which no token was sampled."""
    if request.begun is not None:
        return dataclasses.replace(request.begun, finish=finish)
    ints, floats = np.zeros(0, np.int32), np.zeros(0, np.float32)
    return Completion(request.id, ints, floats, floats, ints, finish, floats, floats)


def cut_at_stop_string(
    completion: Completion,
    strings: Sequence[str],
    text: Callable[[Sequence[int]], str],
    searched: int,
) -> Completion:
    """Return the completion up to the token that completes its first stop string, if it has one.

    `text` decodes token ids; the first `searched` tokens are known to contain no stop string.
    """

    def stopped(length: int, start: int = 0) -> bool:
        decoded = text(completion.tokens[start:length].tolist())
        return any(string in decoded for string in strings)

    low, high = 0, len(completion.tokens)
    # A text has no more tokens than bytes; 4 more bytes cover a character that begins before it.
    reach = max(len(string.encode()) for string in strings) + 4
    if not stopped(high, max(0, searched - reach)):
        return completion
    while high - low > 1:  # A longer response contains every string of a shorter one.
        middle = (low + high) // 2
        low, high = (low, middle) if stopped(middle) else (middle, high)
    return completion.cut(high, "stop")


def check_request(request: Request, vocab_size: int) -> None:
    """Raise UserError if no response to the request can be sampled."""
    if not len(request.prompt):
        raise UserError(f"request {request.id}: the prompt is empty; expected at least one token")
    least, most = int(np.min(request.prompt)), int(np.max(request.prompt))
    if most >= vocab_size or least < 0:
        raise UserError(
            f"request {request.id}: the prompt has token id {least if least < 0 else most}, "
            f"expected ids from 0 to {vocab_size - 1}"
        )
    check_stop(request.knobs.stop, vocab_size)


def check_stop(stop: Sequence[int], vocab_size: int) -> None:
    """Raise UserError for too many stop tokens, or for one outside the vocabulary."""
    if len(stop) > STOP_SLOTS:
        raise UserError(f"{len(stop)} stop tokens; expected at most {STOP_SLOTS}")
    for token in stop:
        if not 0 <= token < vocab_size:
            raise UserError(
                f"stop token {token} is outside the vocabulary of {vocab_size} tokens, so that "
                "no response would end there; take it out of the generation config"
            )


def padded_stop(stop: Sequence[int]) -> list[int]:
    """Return the stop token ids, padded to `STOP_SLOTS` with -1."""
    return [*stop, *[NO_TOKEN] * (STOP_SLOTS - len(stop))]
