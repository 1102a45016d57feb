"""Answers in the JSON form of OpenAI's API, and in vLLM's where OpenAI has none.

Generation, Scoring jobs that are done -> choices, log-probabilities, usage
"""

import dataclasses
import itertools
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from fireopd_jax.rollout.requests import Completion
from fireopd_jax.serving.errors import ApiError
from fireopd_jax.serving.fields import Sampling
from fireopd_jax.serving.scorer import Scored
from fireopd_jax.serving.service import Service

LOWEST = -9999.0
"""Stands for -infinity, which JSON does not have."""


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of some tokens, and of the K most probable ones in their places."""

    tokens: Int32[np.ndarray, " T"]
    logprob: Float32[np.ndarray, " T"]
    top_ids: Int32[np.ndarray, "T K"]
    top_logprob: Float32[np.ndarray, "T K"]

    @classmethod
    def sampled(cls, completion: Completion) -> "TokenLogprobs":
        """Return those of a response that the engine recorded: of the sampled tokens only."""
        count = len(completion.tokens)
        ids, logprob = np.zeros((count, 0), np.int32), np.zeros((count, 0), np.float32)
        return cls(completion.tokens, completion.model_logprobs, ids, logprob)

    @classmethod
    def scored(cls, tokens: np.ndarray, scored: Scored, first: int) -> "TokenLogprobs":
        """Return those of the tokens from number `first` >= 1 of a scored sequence on."""
        rows = slice(first - 1, None)
        return cls(
            tokens[first:], scored.logprob[rows], scored.top_ids[rows], scored.top_logprob[rows]
        )

    def rows(self) -> list[tuple[int, float, list[tuple[int, float]]]]:
        """Return token, log-probability, and the K best with theirs, for each place."""
        finite = [np.maximum(each, LOWEST).tolist() for each in (self.logprob, self.top_logprob)]
        best = [
            [pair for pair in zip(ids, values, strict=True) if pair[0] >= 0]
            for ids, values in zip(self.top_ids.tolist(), finite[1], strict=True)
        ]
        return list(zip(self.tokens.tolist(), finite[0], best, strict=True))


def checked(completion: Completion) -> Completion:
    """Return a response; raise ApiError if the model's logits were not finite."""
    if completion.finish not in ("stop", "length"):
        raise ApiError(500, f"the response ended early: {completion.finish}")
    return completion


def finite(scored: Scored) -> Scored:
    """Return scores; raise ApiError if they are not numbers."""
    if not scored.finite:
        raise ApiError(500, "the model's log-probabilities are not numbers")
    return scored


def ending(
    text: str, completion: Completion, fields: Sampling, own: Sequence[int]
) -> tuple[str, dict[str, Any]]:
    """Return the text without the stop text that ended it, and why it ended.

    `stop_reason` is the stop text or the stop token; null for one of the model's `own`.
    """
    if completion.finish == "length":
        return text, {"finish_reason": "length", "stop_reason": None}
    reason: str | int | None = None
    places = [(text.find(each), each) for each in fields.stop_strings if each in text]
    if places:
        at, reason = min(places)
        text = text[: at + len(reason)] if fields.include_stop_str_in_output else text[:at]
    elif len(completion.tokens):
        last = int(completion.tokens[-1])
        reason = last if last in fields.stop_token_ids and last not in own else None
    return text, {"finish_reason": "stop", "stop_reason": reason}


def namer(service: Service, fields: Sampling) -> Callable[[int], str]:
    """Return the function that names tokens in log-probabilities."""
    if fields.return_tokens_as_token_ids:
        return "token_id:{}".format
    return service.token_text


def completion_logprobs(
    listed: TokenLogprobs, name: Callable[[int], str], first: int | None
) -> dict[str, Any]:
    """Return `logprobs` of a completion; `first` is a token before them, which has none."""
    tokens: list[str] = []
    values: list[float | None] = []
    best: list[dict[str, float] | None] = []
    if first is not None:
        tokens, values, best = [name(first)], [None], [None]
    for token, value, top in listed.rows():
        tokens.append(name(token))
        values.append(value)
        best.append({name(each): logprob for each, logprob in [*top, (token, value)]})
    return {
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": best if listed.top_ids.shape[1] else None,
        "text_offset": [0, *itertools.accumulate(map(len, tokens))][:-1],
    }


def chat_logprobs(listed: TokenLogprobs, name: Callable[[int], str]) -> dict[str, Any]:
    """Return `logprobs` of a chat choice."""

    def entry(token: int, value: float) -> dict[str, Any]:
        text = name(token)
        return {"token": text, "logprob": value, "bytes": list(text.encode())}

    content = [
        entry(token, value) | {"top_logprobs": [entry(*each) for each in top]}
        for token, value, top in listed.rows()
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(listed: TokenLogprobs, text: Callable[[int], str]) -> list[Any]:
    """Return vLLM's `prompt_logprobs`: null, then the token itself and the best at each place.

    `rank` is null for a token that is not among those.
    """
    out: list[Any] = [None]
    for token, value, top in listed.rows():
        ranks = {each: (logprob, place) for place, (each, logprob) in enumerate(top, 1)}
        entries = {token: ranks.get(token, (value, None))} | ranks
        out.append(
            {
                str(each): {"logprob": logprob, "rank": rank, "decoded_token": text(each)}
                for each, (logprob, rank) in entries.items()
            }
        )
    return out


def id_logprobs(
    ids: Int32[np.ndarray, "R K"], logprobs: Float32[np.ndarray, "R K"]
) -> list[list[float | None]]:
    """Return `prompt_token_id_logprobs`: null in the padding of `ids`."""
    values = np.maximum(logprobs, LOWEST).astype(object)
    values[ids < 0] = None
    return [[None if x is None else float(x) for x in row] for row in values]


def envelope(
    service: Service, kind: str, prefix: str, choices: Sequence[Any], prompt: int, tokens: int
) -> dict[str, Any]:
    """Return an answer with its choices and the numbers of prompt and response tokens."""
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": service.name,
        "choices": list(choices),
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": tokens,
            "total_tokens": prompt + tokens,
        },
    }
