"""Log-probabilities of given tokens, and of given ids, from a served teacher.

    prompt ids, response ids, ids [T, K] -> one request a row -> log-probs, what is missing, top-K

Sources, the first that the server has: `prompt_logprob_token_ids` (given ids), `prompt_logprobs`
(the most probable tokens) of vLLM, `echo` with `logprobs` of OpenAI's old API. All are of the
model's distribution at temperature 1.
"""

import base64
import dataclasses
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float32, Int32

from fireopd_jax.config import UserError
from fireopd_jax.remote.client import Client, Request
from fireopd_jax.remote.errors import Malformed, Refused

Best = Mapping[int, float]
"""Token id -> log-probability, of the most probable tokens in one place."""

NOTHING: Mapping[str, str] = {"at": "", "ids": "", "top": ""}
"""The packed scores of a row without a token."""


@dataclasses.dataclass(frozen=True)
class ScoreRow:
    """A response of T tokens after a prompt, both in the teacher's vocabulary."""

    prompt: Sequence[int]
    response: Sequence[int]
    ids: Int32[np.ndarray, "T K"] | None = None
    """Token ids to score in each place besides the response's own; -1 in empty slots."""


@dataclasses.dataclass(frozen=True)
class RowScores:
    """Log-probabilities of one row."""

    logprob: Float32[np.ndarray, " T"]
    at_ids: Float32[np.ndarray, "T K"] | None
    """At `ScoreRow.ids`; -inf in empty slots and where missing."""
    missing: Bool[np.ndarray, "T K"] | None
    """True where an id has no log-probability: the server returns the most probable ids only."""
    top_ids: Int32[np.ndarray, "T N"]
    """The N most probable token ids, most probable first; -1 where the server returned fewer."""
    top_logprob: Float32[np.ndarray, "T N"]


@dataclasses.dataclass(frozen=True)
class ScoreFeatures:
    """What a server supports, found once at the start."""

    form: Literal["prompt_logprobs", "echo", "given_ids"]
    """Source of most probable tokens, and of a token's own log-probability; `given_ids` is a server
    that scores given ids only."""
    given_ids: bool
    """Whether it scores given ids."""
    top: int
    """Most probable tokens that it returns in one place."""
    max_tokens: int
    """Fewest tokens that a request must sample: 0 or 1."""


def score_features(client: Client, example: ScoreRow) -> ScoreFeatures:
    """Return what the server supports, by scoring `example`; raises `UserError` if nothing."""
    own = np.asarray(example.response, np.int32)[:, None]
    asked = dataclasses.replace(example, ids=own)
    refusals: list[Refused] = []

    def works(form: Any, given_ids: bool, top: int) -> ScoreFeatures | None:
        for max_tokens in (0, 1):
            features = ScoreFeatures(form, given_ids, top, max_tokens)
            try:
                client.probe(_request(client, features, asked, 0 if given_ids else top))
                return features
            except Refused as error:
                if error.is_final:
                    raise
                refusals.append(error)
        return None

    tops = sorted({min(k, client.settings.top_logprobs) for k in (1000, 20, 5, 1)}, reverse=True)
    forms = [("prompt_logprobs", k) for k in tops] + [("echo", k) for k in tops]
    listed = next((found for form, k in forms if (found := works(form, False, k))), None)
    exact = works("given_ids", True, 0)
    if listed is None and exact is None:
        if all(error.status == 404 for error in refusals):
            raise refusals[0]  # no such model, or no such path
        raise UserError(
            f"{client.label}: gives no log-probabilities of a prompt's tokens (prompt_logprobs, or "
            "echo with logprobs, at /completions): expected a server that does, or a method that "
            "needs a teacher's text only, such as configs/method/omniopd.yaml"
        )
    found = listed or exact
    assert found is not None
    found = dataclasses.replace(found, given_ids=exact is not None)
    ids = "of given ids" if found.given_ids else f"of the {found.top} most probable ids only"
    client.log(f"{client.label}: log-probabilities {ids}, by {found.form}")
    return found


def score(
    client: Client, features: ScoreFeatures, rows: Sequence[ScoreRow], *, top: int = 0
) -> list[RowScores]:
    """Return the log-probabilities of each row, at temperature 1.

    `top`: number of the most probable ids to return; `UserError` if the server has fewer. Rows
    without a token of a response are not sent. Ids without a log-probability are counted as
    `missing_ids` of `scored_ids` in the client's stats.
    """
    if top > features.top:
        raise UserError(
            f"{client.label}: returns the {features.top} most probable tokens of a prompt's "
            f"places, the method needs {top} (top_logprobs, and the server's own limit)"
        )
    sent = [row for row in rows if len(row.response)]
    answers = client.ask([_request(client, features, row, top, kind="scores") for row in sent])
    scored = iter(answers)
    out = [_scores(row, next(scored) if len(row.response) else NOTHING, top) for row in rows]
    for row, scores in zip(rows, out, strict=True):
        if row.ids is not None and scores.missing is not None:
            client.count("scored_ids", int((row.ids >= 0).sum()))
            client.count("missing_ids", int(scores.missing.sum()))
    return out


def score_again(client: Client, features: ScoreFeatures, row: ScoreRow, top: int) -> RowScores:
    """Return the scores of a row from the server, never from the cache."""
    answer = client.probe(_request(client, features, row, top))
    return _scores(row, answer, top)


def _request(
    client: Client, features: ScoreFeatures, row: ScoreRow, top: int, kind: str = "probe"
) -> Request:
    """Return the request that scores a row; its answer is packed as `_scores` unpacks it."""
    if not row.prompt:
        raise ValueError("the first token of a sequence has no log-probability: prompt is empty")
    whole = [int(token) for token in (*row.prompt, *row.response)]
    body: dict[str, Any] = {
        "prompt": whole,
        "max_tokens": features.max_tokens,
        "temperature": 1.0,
    }
    wanted = _wanted(row)
    exact = features.given_ids
    if exact:
        body["prompt_logprob_token_ids"] = wanted.tolist()
        body["prompt_logprob_start"] = len(row.prompt) - 1
    # The most probable tokens may be all there is of the ids.
    listed = top if exact else max(top, features.top if row.ids is not None else 0)
    if features.form == "echo" and (listed or not exact):
        body |= {"echo": True, "logprobs": listed, "return_tokens_as_token_ids": True}
    elif listed or not exact:
        body["prompt_logprobs"] = listed

    def read(answer: Any) -> dict[str, str]:
        best: Iterator[Best] = iter([{}] * len(row.response))
        if listed or not exact:
            places = _echoed if features.form == "echo" else _prompt_logprobs
            best = iter(places(answer, whole, len(row.prompt)))
        given = _given(answer, wanted) if exact else None
        return _packed(row, wanted, given, list(best), top)

    digest = hashlib.sha256(wanted.tobytes()).hexdigest()
    bound = (len(whole), features.max_tokens)
    return Request("/completions", body, read, bound, f"{digest} {top}", kind)


def _wanted(row: ScoreRow) -> Int32[np.ndarray, "T _"]:
    """Return the ids to score: the response's own in column 0, then the given ones."""
    own = np.asarray(row.response, np.int32).reshape(-1, 1)
    return own if row.ids is None else np.concatenate([own, np.asarray(row.ids, np.int32)], axis=1)


def _packed(
    row: ScoreRow,
    wanted: Int32[np.ndarray, "T C"],
    given: Float32[np.ndarray, "T C"] | None,
    best: Sequence[Best],
    top: int,
) -> dict[str, str]:
    """Return values at `wanted` (NaN is missing), top ids and their values, as bytes in base64."""
    if given is None:
        given = np.full(wanted.shape, np.nan, np.float32)
        for t, (ids, place) in enumerate(zip(wanted.tolist(), best, strict=True)):
            given[t] = [place.get(token, np.nan) for token in ids]
    if (lost := np.isnan(given[:, 0])).any():
        raise Malformed(f"no log-probability of response token {int(lost.argmax())}")
    ids = np.full((len(row.response), top), -1, np.int32)
    values = np.full((len(row.response), top), -np.inf, np.float32)
    for t, place in enumerate(best):
        ranked = sorted(place.items(), key=lambda item: (-item[1], item[0]))[:top]
        for i, (token, value) in enumerate(ranked):
            ids[t, i], values[t, i] = token, value
    arrays = {"at": given.astype("<f4"), "ids": ids.astype("<i4"), "top": values.astype("<f4")}
    return {name: base64.b64encode(x.tobytes()).decode() for name, x in arrays.items()}


def _scores(row: ScoreRow, packed: Mapping[str, str], top: int) -> RowScores:
    """Return the scores that `_packed` wrote."""
    wanted = _wanted(row)

    def array(name: str, dtype: Any, width: int) -> np.ndarray:
        raw = np.frombuffer(base64.b64decode(packed[name]), np.dtype(dtype).newbyteorder("<"))
        return raw.astype(dtype).reshape(len(row.response), width)

    given = array("at", np.float32, wanted.shape[1])
    at_ids = missing = None
    if row.ids is not None:
        empty = wanted[:, 1:] < 0
        missing = np.isnan(given[:, 1:]) & ~empty
        at_ids = np.where(missing | empty, np.float32(-np.inf), given[:, 1:])
    ids, values = array("ids", np.int32, top), array("top", np.float32, top)
    return RowScores(given[:, 0], at_ids, missing, ids, values)


def _choice(answer: Any) -> Mapping[str, Any]:
    try:
        return dict(answer["choices"][0])
    except (KeyError, IndexError, TypeError, ValueError):
        raise Malformed("expected a choice") from None


def _prompt_logprobs(answer: Any, whole: Sequence[int], first: int) -> list[Best]:
    """Return the places from token `first` on of vLLM's `prompt_logprobs`."""
    listed = _choice(answer).get("prompt_logprobs")
    if not isinstance(listed, list) or len(listed) != len(whole):
        raise Malformed(f"expected prompt_logprobs of {len(whole)} tokens")
    try:
        return [
            {_id(token): float(entry["logprob"]) for token, entry in place.items()}
            for place in listed[first:]
        ]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        raise Malformed("expected prompt_logprobs as {id: {logprob}}") from None


def _echoed(answer: Any, whole: Sequence[int], first: int) -> list[Best]:
    """Return the places from token `first` on of the old API's `logprobs` with `echo`.

    Other tokens than the response's have ids only where the server names them `token_id:ID`.
    """
    listed = _choice(answer).get("logprobs") or {}
    try:
        own = listed["token_logprobs"][first : len(whole)]
        best = (listed.get("top_logprobs") or [{}] * len(whole))[first : len(whole)]
        if len(own) != len(whole) - first or len(best) != len(own):
            raise Malformed(f"expected logprobs of {len(whole)} tokens")
        return [
            {**_named(place), token: float(value)}
            for place, value, token in zip(best, own, whole[first:], strict=True)
        ]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        raise Malformed("expected logprobs of the prompt's tokens") from None


def _named(place: Mapping[str, float] | None) -> Best:
    mark = "token_id:"
    return {
        _id(name.removeprefix(mark)): float(value)
        for name, value in (place or {}).items()
        if name.startswith(mark)
    }


def _id(text: str) -> int:
    if not 0 <= (number := int(text)) < 2**31:
        raise ValueError(f"no token id: {text}")
    return number


def _given(answer: Any, wanted: Int32[np.ndarray, "T C"]) -> Float32[np.ndarray, "T C"]:
    """Return `prompt_token_id_logprobs`: rows of numbers, or vLLM's .npy file as base64."""
    field = "prompt_token_id_logprobs"
    rows = _choice(answer).get(field)
    rows = answer.get(field) if rows is None else rows
    decoders: Mapping[type, Callable[[Any], Any]] = {list: np.array, str: _npy}
    try:
        values = decoders[type(rows)](rows).astype(np.float32)
    except (KeyError, TypeError, ValueError, OSError, OverflowError, EOFError, MemoryError):
        raise Malformed(f"expected {field} as rows of numbers") from None
    if values.shape != wanted.shape:
        raise Malformed(f"expected {field} of shape {wanted.shape}, found {values.shape}")
    return np.where(wanted < 0, np.float32(np.nan), values)


def _npy(text: str) -> np.ndarray:
    return np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)
