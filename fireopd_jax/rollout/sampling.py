"""From logits to one token a row and its log-probabilities; every knob is traced, and a row's own.

    logits -> no stop token too early -> / temperature -> top-k -> top-p -> min-p -> draw

The draw is exact and has two stages, a block of columns by its mass, then a column in it: V / block
+ block random numbers instead of V. So a row's columns are read only to weigh the blocks, and a
filter is a cut through their ranking (`cutoff`); nothing is sorted. Work that no row of the batch
asks for is skipped at run time.

Each row owns its key, a function of (run seed, sample id, token position) alone, so a row draws
the same token in any batch, and over any shards of the vocabulary.
"""

import functools
import hashlib
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Float32, Int32, Key, UInt32

from fireopd_jax.rollout import cutoff
from fireopd_jax.rollout.columns import Columns, Weights, weigh
from fireopd_jax.rollout.cutoff import Cut
from fireopd_jax.types import Array, pytree

NO_TOKEN = -1


@pytree
class Sampling:
    """The knobs as arrays: a new value compiles nothing.

    One for all rows (*R is empty), or one for each.
    """

    temperature: Float32[Array, "*R"]
    """0 is greedy: the first of the largest, whatever the filters."""
    top_p: Float32[Array, "*R"]
    top_k: Int32[Array, "*R"]
    min_p: Float32[Array, "*R"]
    stop: Int32[Array, "*R E"]
    """Tokens that end a response, padded with -1."""
    max_tokens: Int32[Array, "*R"]
    min_tokens: Int32[Array, "*R"]
    seed: UInt32[Array, ""]

    @classmethod
    def of(
        cls,
        stop: tuple[int, ...],
        max_tokens: int,
        seed: int,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        min_tokens: int = 0,
        stop_slots: int = 8,
    ) -> "Sampling":
        """Turn plain numbers into arrays for all rows; `stop` may hold up to `stop_slots` ids."""
        if len(stop) > stop_slots:
            raise ValueError(f"at most {stop_slots} stop tokens are supported, not {len(stop)}")
        return cls(
            temperature=jnp.float32(temperature),
            top_p=jnp.float32(top_p),
            top_k=jnp.int32(top_k),
            min_p=jnp.float32(min_p),
            stop=jnp.array([*stop, *[NO_TOKEN] * (stop_slots - len(stop))], jnp.int32),
            max_tokens=jnp.int32(max_tokens),
            min_tokens=jnp.int32(min_tokens),
            seed=jnp.uint32(seed),
        )

    def rows(self, count: int) -> "Sampling":
        """Give each of `count` rows its knobs; the seed stays the run's own."""

        def broadcast(knob: Array, own: int) -> Array:
            return jnp.broadcast_to(knob, (count, *knob.shape[knob.ndim - own :]))

        return Sampling(
            temperature=broadcast(self.temperature, 0),
            top_p=broadcast(self.top_p, 0),
            top_k=broadcast(self.top_k, 0),
            min_p=broadcast(self.min_p, 0),
            stop=broadcast(self.stop, 1),
            max_tokens=broadcast(self.max_tokens, 0),
            min_tokens=broadcast(self.min_tokens, 0),
            seed=self.seed,
        )

    def at_rows(self, row: Int32[Array, " A"]) -> "Sampling":
        """Pick the knobs of rows."""
        knobs = {name: knob for name, knob in vars(self).items() if name != "seed"}
        return Sampling(seed=self.seed, **{name: knob[row] for name, knob in knobs.items()})


def seed_for(seed: int, purpose: str) -> int:
    """Derive the seed of one purpose (rollout, eval, a model's start): 32 bits of its SHA-256."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


class Draw(NamedTuple):
    """One drawn token a row."""

    token: Int32[Array, " B"]
    logprob: Float32[Array, " B"]
    """Of the distribution really drawn from; of the raw model where greedy."""
    model_logprob: Float32[Array, " B"]
    """Of the raw model, at temperature 1."""
    bad: Bool[Array, " B"]
    """Nothing could be drawn: a logit is NaN or +inf, or all are -inf. The rest is 0 then."""


def row_keys(
    seed: UInt32[Array, ""],
    sample_id: Int32[Array, " B"],
    position: Int32[Array, ""] | Int32[Array, " B"],
) -> Key[Array, " B"]:
    """Give each row its key at its response position.

    The generator is threefry by name: other kinds depend on the batch under `vmap`.
    """
    base = jax.random.key(seed, impl="threefry2x32")
    rows = jax.vmap(lambda i: jax.random.fold_in(base, i))(sample_id)
    return jax.vmap(jax.random.fold_in)(rows, jnp.broadcast_to(position, sample_id.shape))


class _Knobs(NamedTuple):
    """What the rows ask for, without what a greedy row ignores."""

    greedy: Bool[Array, " B"]
    coldness: Float32[Array, " B"]
    """1 / temperature. A product is the same wherever it is compiled; a quotient is not, and a cut
    must find the very value that it was made of."""
    top_k: Int32[Array, " B"]
    top_p: Float32[Array, " B"]
    least: Float32[Array, " B"]
    """min-p's logarithm: how far below the largest a logit may lie."""
    barred: Int32[Array, "B E"]
    """Stop tokens that come too early here, padded with -1."""


def _knobs(sampling: Sampling, position: Int32[Array, " B"]) -> _Knobs:
    greedy = sampling.temperature == 0
    early = (position < sampling.min_tokens)[:, None]
    return _Knobs(
        greedy=greedy,
        coldness=1 / jnp.where(greedy, 1, sampling.temperature),
        top_k=jnp.where(greedy, 0, sampling.top_k),
        top_p=jnp.where(greedy, 1, sampling.top_p),
        least=jnp.where(greedy, -jnp.inf, jnp.log(sampling.min_p)),
        barred=jnp.where(early, sampling.stop, NO_TOKEN),
    )


def draw(
    logits: Float[Array, "B W"],
    keys: Key[Array, " B"],
    sampling: Sampling,
    position: Int32[Array, ""] | Int32[Array, " B"],
    axis: str | None = None,
) -> Draw:
    """Draw one token a row, whose `position` counts the response's tokens before it.

    With a mesh `axis`, under `shard_map`, W are this shard's columns of the vocabulary, all else is
    the same on each shard, and so is what comes back. Shards must hold whole blocks of columns.
    """
    rows, width = logits.shape
    columns = Columns(width, axis)
    columns.check()
    knobs = _knobs(sampling.rows(rows), jnp.broadcast_to(position, (rows,)))
    blocks = columns.split(logits.astype(jnp.float32))
    raw = weigh(blocks, columns)
    shaped = (knobs.coldness != 1) | (knobs.barred >= 0).any(axis=1) | _filtered(knobs)
    weights, cut = lax.cond(
        shaped.any(),
        lambda: _shape(blocks, knobs, columns),
        lambda: (raw, cutoff.no_cut(raw.top)),
    )
    token, logit, raw_logit = _two_stages(blocks, weights, cut, keys, knobs, columns)
    model_logprob = raw_logit - raw.top - jnp.log(raw.total)
    logprob = logit - weights.top - jnp.log(weights.total)
    bad = ~jnp.isfinite(raw.total + weights.total)
    return Draw(
        token=jnp.where(bad, 0, token),
        logprob=jnp.where(bad, 0, jnp.where(knobs.greedy, model_logprob, logprob)),
        model_logprob=jnp.where(bad, 0, model_logprob),
        bad=bad,
    )


def _filtered(knobs: _Knobs) -> Bool[Array, " B"]:
    return (knobs.top_k > 0) | (knobs.top_p < 1) | (knobs.least > -jnp.inf)


def _shape(
    blocks: Float32[Array, "B N block"], knobs: _Knobs, columns: Columns
) -> tuple[Weights, Cut]:
    """Weigh the blocks of what is really drawn from, and find its cut."""
    # Two branches that both write: one that passed its operand on would have it copied.
    coldness = knobs.coldness[:, None, None]
    z = lax.cond(
        (knobs.barred >= 0).any(),
        lambda: _bar(blocks, columns.ids(), knobs.barred) * coldness,
        lambda: blocks * coldness,
    )
    weights = weigh(z, columns)

    def filtered() -> tuple[Weights, Cut]:
        cut = lax.cond(
            ((knobs.top_k > 0) | (knobs.top_p < 1)).any(),
            lambda: cutoff.find(z, weights, knobs.top_k, knobs.top_p, columns),
            lambda: cutoff.no_cut(weights.top),
        )
        kept = _keep(z, columns.ids(), weights.top, cut, knobs.least)
        return weigh(kept, columns), cut

    return lax.cond(_filtered(knobs).any(), filtered, lambda: (weights, cutoff.no_cut(weights.top)))


def _bar(z: Array, ids: Array, barred: Int32[Array, "B E"]) -> Array:
    """Put -inf on each row's barred tokens; z is f32[B, *S]."""
    shape = (-1, *[1] * (z.ndim - 1))
    hit = functools.reduce(operator.or_, (ids == stop.reshape(shape) for stop in barred.T))
    return jnp.where(hit, -jnp.inf, z)


def _keep(z: Array, ids: Array, top: Array, cut: Cut, least: Array) -> Array:
    """Put -inf on what lies beyond the cut or too far below the top; z is f32[B, *S]."""
    floor = (top + least).reshape(-1, *[1] * (z.ndim - 1))
    return jnp.where(cut.keeps(z, ids) & (z >= floor), z, -jnp.inf)


def _two_stages(
    blocks: Float32[Array, "B N block"],
    weights: Weights,
    cut: Cut,
    keys: Key[Array, " B"],
    knobs: _Knobs,
    columns: Columns,
) -> tuple[Int32[Array, " B"], Float32[Array, " B"], Float32[Array, " B"]]:
    """Draw a block by its mass, then a token in it; return its logits too, shaped and raw.

    A greedy row takes the block of the largest logit, and in it the largest: no noise.
    """
    size = columns.block
    halves = jax.vmap(jax.random.split)(keys)
    greedy = knobs.greedy[:, None]
    score = jnp.where(greedy, weights.best, jnp.log(weights.mass))
    chosen = _argmax(columns.gather(score), halves[:, 0], greedy)
    raw, here = columns.pick(blocks, chosen)
    ids = chosen[:, None] * size + jnp.arange(size, dtype=jnp.int32)[None]
    z = _bar(raw, ids, knobs.barred) * knobs.coldness[:, None]
    inside = _argmax(_keep(z, ids, weights.top, cut, knobs.least), halves[:, 1], greedy)

    def share(value: Array) -> Array:
        value = jnp.take_along_axis(value, inside[:, None], axis=1)[:, 0]
        return columns.sum(jnp.where(here, value, 0))

    return share(ids), share(z), share(raw)


def _argmax(
    score: Float32[Array, "B N"], keys: Key[Array, " B"], greedy: Bool[Array, "B 1"]
) -> Int32[Array, " B"]:
    """Draw from softmax(score), exactly, by Gumbel noise; the first of the largest where greedy.

    The noise has high resolution: the default never draws tokens less likely than about 1e-7.
    """
    shape = score.shape[1:]
    noise = jax.vmap(lambda key: jax.random.gumbel(key, shape, jnp.float32, mode="high"))(keys)
    return jnp.argmax(score + jnp.where(greedy, 0, noise), axis=1).astype(jnp.int32)
