"""Scores of given sequences: log-probabilities of their tokens, of the K best and of given ids.

    sequences of L tokens -> buckets of equal padded sizes -> one program each -> Scored

Sizes are padded to powers of two, so that few programs are compiled: lengths from 128 on, K and the
number of given ids from 1 on. Logits never exist: the head is reduced inside `ops.head`.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float32, Int32

from fireopd_jax.models.language_model import LanguageModel, Params
from fireopd_jax.ops.head import LARGEST_K, head_gather, head_topk
from fireopd_jax.sharding.mesh import shard_rows
from fireopd_jax.types import Array

SHORTEST = 128
"""Padded length of short sequences, in scored tokens."""
TOGETHER = 8
"""Largest number of sequences that each device scores in one call."""
TOKENS = 8192
"""Largest number of padded tokens of one device in one call, if it scores several sequences."""
LARGEST_SUPPORT = 1024
"""Largest number of given ids of a token."""

__all__ = ["LARGEST_K", "LARGEST_SUPPORT", "ScoreRequest", "Scored", "Scorer"]


@dataclasses.dataclass(frozen=True)
class ScoreRequest:
    """A sequence of L tokens to score.

    Source row i, from 0 to L - 2, is the distribution after token i: it predicts token i + 1.
    """

    tokens: Int32[np.ndarray, " L"]
    k: int = 0
    """Number of most probable ids of each row, at most `LARGEST_K`."""
    support: Int32[np.ndarray, "R S"] | None = None
    """Ids whose log-probabilities are returned, padded with -1: at source rows `start` to
    `start` + R - 1."""
    start: int = 0

    @property
    def bucket(self) -> tuple[int, int, int]:
        """Padded sizes: scored tokens, K, given ids."""
        width = 0 if self.support is None else self.support.shape[1]
        return at_least(len(self.tokens) - 1, SHORTEST), padded(self.k), padded(width)


@dataclasses.dataclass(frozen=True)
class Scored:
    """Float32 log-probabilities at temperature 1, in nats; rows are the L - 1 source rows."""

    logprob: Float32[np.ndarray, " N"]
    """Of the token that follows."""
    top_ids: Int32[np.ndarray, "N K"]
    """In order of falling probability; -1 where fewer than K ids have one above 0."""
    top_logprob: Float32[np.ndarray, "N K"]
    at_ids: Float32[np.ndarray, "R S"] | None
    """Of the ids in `ScoreRequest.support`; -inf in padding."""

    @property
    def finite(self) -> bool:
        """Whether no log-probability is NaN."""
        return not np.isnan(self.logprob).any()


def at_least(size: int, least: int) -> int:
    """Return the smallest `least` * 2^i that is not below `size`."""
    while least < size:
        least *= 2
    return least


def padded(size: int) -> int:
    """Return 0 for 0, else the next power of two."""
    return at_least(size, 1) if size else 0


class Scorer:
    """Scores sequences with one model; one compiled program for each bucket and batch size."""

    def __init__(self, model: LanguageModel, params: Params, mesh: Mesh):
        self.model, self.params, self.mesh = model, params, mesh
        self.programs: set[tuple[int, ...]] = set()
        """Batch sizes and buckets whose programs are compiled."""
        self._run = jax.jit(self._scores, static_argnames="k")

    def score(self, requests: Sequence[ScoreRequest]) -> list[Scored]:
        """Return the scores of the sequences, in their order; those of one bucket run together."""
        found: list[Scored | None] = [None] * len(requests)
        buckets: dict[tuple[int, int, int], list[int]] = {}
        for index, request in enumerate(requests):
            if len(request.tokens) > 1:
                buckets.setdefault(request.bucket, []).append(index)
            else:
                found[index] = _nothing(request)
        for bucket, indices in buckets.items():
            size = max(1, min(TOGETHER, TOKENS // bucket[0])) * self.mesh.size
            for start in range(0, len(indices), size):
                piece = indices[start : start + size]
                together = size if len(piece) > self.mesh.size else self.mesh.size
                batch = self._batch([requests[i] for i in piece], bucket, together)
                for index, scored in zip(piece, batch, strict=True):
                    found[index] = scored
        return [scored for scored in found if scored is not None]

    def _batch(
        self, requests: Sequence[ScoreRequest], bucket: tuple[int, int, int], size: int
    ) -> list[Scored]:
        """Score sequences of one bucket in one call of `size` rows."""
        length, k, width = bucket
        tokens = np.zeros((size, length + 1), np.int32)
        mask = np.zeros((size, length), bool)
        support = np.full((size, length, width), -1, np.int32)
        for row, request in enumerate(requests):
            tokens[row, : len(request.tokens)] = request.tokens
            mask[row, : len(request.tokens) - 1] = True
            if request.support is not None:
                rows, ids = request.support.shape
                support[row, request.start : request.start + rows, :ids] = request.support
        self.programs.add((size, *bucket))
        inputs = shard_rows(self.mesh, (tokens, mask, support))
        logprob, top_ids, top_logprob, at_ids = jax.device_get(self._run(self.params, *inputs, k=k))
        out = []
        for row, request in enumerate(requests):
            real, given = len(request.tokens) - 1, None
            if request.support is not None:
                rows, ids = request.support.shape
                given = at_ids[row, request.start : request.start + rows, :ids]
            best = slice(0, real), slice(0, request.k)
            out.append(
                Scored(logprob[row, :real], top_ids[row][best], top_logprob[row][best], given)
            )
        return out

    def _scores(
        self,
        params: Params,
        tokens: Int32[Array, "B L"],
        mask: Bool[Array, "B N"],
        support: Int32[Array, "B N S"],
        *,
        k: int,
    ) -> tuple[Array, Array, Array, Array]:
        """Return log-probabilities [B, N], the K best ids and theirs [B, N, K], and [B, N, S]."""
        first, rest = tokens[:, :1], tokens[:, 1:]
        ones = jnp.ones(tokens.shape[0], jnp.int32)
        hidden, head = self.model.response_hidden(params, first, ones, rest, mask)
        options = self.model.head_options(mesh=self.mesh)
        top_ids = jnp.zeros((*rest.shape, 0), jnp.int32)
        top_logprob, at_ids = jnp.zeros(top_ids.shape), jnp.zeros(support.shape)
        logprob = None
        if k:
            best = head_topk(hidden, head, rest, k=k, **options)
            logprob, top_ids, top_logprob = best.logprob, best.top_ids, best.top_logprob
        if support.shape[-1] or logprob is None:
            gathered = head_gather(hidden, head, rest, support, **options)
            logprob, at_ids = gathered.logprob, gathered.support_logprob
        return logprob, top_ids, top_logprob, at_ids


def _nothing(request: ScoreRequest) -> Scored:
    """Return the scores of a sequence of one token, which has no source rows."""
    at_ids = None if request.support is None else np.zeros(request.support.shape, np.float32)
    none = np.zeros((0, request.k))
    return Scored(np.zeros(0, np.float32), none.astype(np.int32), none.astype(np.float32), at_ids)
