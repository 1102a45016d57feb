"""Checks at the start: does a served teacher agree with itself, and with our token ids?

the same tokens scored twice -> the same numbers, probabilities that add up to at most 1
our token ids, the server's  -> the same tokens
one continuation             -> a text
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from fireopd_jax.config import UserError
from fireopd_jax.remote.client import Client, Request
from fireopd_jax.remote.errors import Malformed, Mismatched, Refused
from fireopd_jax.remote.logprobs import ScoreFeatures, ScoreRow, score_again
from fireopd_jax.remote.texts import Prefix, TextFeatures, continuations

MASS_TOLERANCE = 1e-3
"""How far probabilities may add up to more than 1, by rounding."""
LISTED = 5
SHOWN = 60
SAMPLE_TOKENS = 24
"""Tokens of the two samples that show whether the server draws at random."""


def check_scores(client: Client, features: ScoreFeatures, rows: Sequence[ScoreRow]) -> None:
    """Raise `UserError` if two scorings differ, or are no log-probabilities of one distribution."""
    top, tolerance = min(LISTED, features.top), client.settings.tolerance
    for row in rows:
        one, other = (score_again(client, features, row, top) for _ in range(2))
        if not (np.isfinite(one.logprob) & np.isfinite(other.logprob)).all():
            raise UserError(f"{client.label}: its log-probabilities are not finite numbers")
        gap = np.abs(one.logprob - other.logprob)
        if (gap > tolerance).any():
            t = int(gap.argmax())
            raise UserError(
                f"{client.label}: disagrees with itself: token {t} of a response has the "
                f"log-probability {one.logprob[t]:.5g}, and {other.logprob[t]:.5g} when asked "
                f"again; a difference of {gap[t]:.3g} is over served.tolerance={tolerance:g}"
            )
        if (one.logprob > MASS_TOLERANCE).any():
            raise UserError(
                f"{client.label}: log-probability {one.logprob.max():.5g} is above 0: expected "
                "log-probabilities, found something else (logits?)"
            )
        mass = np.exp(one.top_logprob.astype(np.float64)).sum(axis=1)
        if top and (mass > 1 + MASS_TOLERANCE).any():
            t = int(mass.argmax())
            raise UserError(
                f"{client.label}: the {top} most probable tokens in place {t} have the probability "
                f"{mass[t]:.5g} together: expected at most 1, log-probabilities at temperature 1"
            )


def check_tokens(client: Client, tokenizer: PreTrainedTokenizerBase, row: ScoreRow) -> bool:
    """Return whether the tokens could be compared; raise `Mismatched` at the first difference.

    Asks /tokenize for the ids of a text with special tokens; a server without it is asked for the
    texts of our ids; a server without either is named in the log.
    """
    ids = [int(token) for token in (*row.prompt, *row.response)]
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    ours = list(tokenizer(text, add_special_tokens=False)["input_ids"])  # pyright: ignore[reportArgumentType]
    if (theirs := _tokenized(client, text)) is not None:
        _compare_ids(client, tokenizer, ours, theirs)
    elif (texts := _decoded(client, ids)) is not None:
        for t, (token, found) in enumerate(zip(ids, texts, strict=True)):
            expected = tokenizer.decode([token], clean_up_tokenization_spaces=False)
            if found is not None and not _same_text(str(expected), found):
                raise Mismatched(
                    f"{client.label}: its tokenizer is not ours: token {t} of a prompt, id "
                    f"{token}, is {expected!r} here and {found!r} there"
                )
    else:
        client.log(
            f"{client.label}: has no /tokenize and no decoded tokens: that its token ids are ours "
            "could not be checked"
        )
        return False
    return True


def check_texts(client: Client, features: TextFeatures, example: Prefix) -> None:
    """Raise `UserError` unless the server continues `example`; log how, and whether it samples."""
    (texts,) = continuations(client, features, [example], 2, max_tokens=SAMPLE_TOKENS, kind="probe")
    client.log(f"{client.label}: {example.partial[-SHOWN:]!r} is continued by {texts[0][:SHOWN]!r}")
    if not any(texts):
        client.log(f"{client.label}: warning: both continuations of the check are empty")
    elif texts[0] == texts[1]:
        client.log(
            f"{client.label}: warning: two samples at temperature 1 are the same "
            f"{len(texts[0])} characters; a server that decodes greedily gives the same text every "
            "time (its defaults, or extra_body)"
        )


def _compare_ids(
    client: Client, tokenizer: PreTrainedTokenizerBase, ours: list[int], theirs: list[int]
) -> None:
    if ours == theirs:
        return
    pairs = zip(ours, theirs, strict=False)
    t = next((t for t, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    mine, its = (
        f"{ids[t]} ({tokenizer.decode([ids[t]])!r})" if t < len(ids) else "the end"
        for ids in (ours, theirs)
    )
    raise Mismatched(
        f"{client.label}: its tokenizer is not ours: token {t} of a text with special tokens is "
        f"{mine} here and {its} there ({len(ours)} tokens here, {len(theirs)} there)"
    )


def _tokenized(client: Client, text: str) -> list[int] | None:
    """Return the server's ids of a text, None if it does not tokenize."""

    def read(answer: Any) -> list[int]:
        try:
            return [int(token) for token in answer["tokens"]]
        except (KeyError, TypeError, ValueError):
            raise Malformed("expected tokens") from None

    body = {"prompt": text, "add_special_tokens": False}
    try:
        return client.probe(Request(f"{client.settings.root}/tokenize", body, read, (0, 0)))
    except Refused:
        return None


def _decoded(client: Client, ids: Sequence[int]) -> list[str | None] | None:
    """Return the server's texts of our ids by vLLM's `prompt_logprobs`, None if it has none."""

    def read(answer: Any) -> list[str | None]:
        try:
            places = answer["choices"][0]["prompt_logprobs"]
            return [
                place and place[str(token)]["decoded_token"]
                for place, token in zip(places, ids, strict=True)
            ]
        except (KeyError, IndexError, TypeError, ValueError):
            raise Malformed("expected prompt_logprobs with decoded_token") from None

    body = {"prompt": list(ids), "max_tokens": 1, "prompt_logprobs": 1}
    try:
        return client.probe(Request("/completions", body, read, (len(ids), 1)))
    except Refused:
        return None


def _same_text(one: str, other: str) -> bool:
    """Return whether two texts of a token are the same, up to how spaces are written.

    Parts of a character cannot be compared.
    """
    if "\ufffd" in one + other:
        return True
    return one.replace("▁", " ").strip() == other.replace("▁", " ").strip()
