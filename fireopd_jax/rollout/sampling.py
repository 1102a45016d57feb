"""Sampling from logits: one token for each row, with its log-probabilities and its own settings.

    logits -> ban early stop tokens -> / temperature -> top-k -> top-p -> min-p -> sample

Sampling is exact and has two stages: a block of vocabulary columns by its probability mass, then a
column in it. That takes V / block + block random numbers instead of V, and reads the columns only
to sum each block. Filters are a threshold in the ranking of tokens (`cutoff`); nothing is sorted.
All settings are traced; work that no row of the batch needs is skipped at run time.

The random key of a row is a function of (run seed, sample id, token position) alone, so a row has
the same token in any batch and for any sharding of the vocabulary.
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
from fireopd_jax.rollout.columns import BlockMass, Columns, block_mass
from fireopd_jax.rollout.cutoff import Cut
from fireopd_jax.types import Array, pytree

NO_TOKEN = -1
Totals = tuple[Float32[Array, " B"], Float32[Array, " B"]]
"""Largest logit, and sum of exp(logit - largest), of each row's policy over the vocabulary."""


@pytree
class Sampling:
    """Sampling settings as arrays, so that new values compile nothing.

    One for all rows (*R is empty) or one for each row.
    """

    temperature: Float32[Array, "*R"]
    """0 is greedy: the smallest id among the largest logits; filters do not apply."""
    top_p: Float32[Array, "*R"]
    top_k: Int32[Array, "*R"]
    min_p: Float32[Array, "*R"]
    stop: Int32[Array, "*R E"]
    """Token ids that end a response, padded with -1."""
    max_tokens: Int32[Array, "*R"]
    min_tokens: Int32[Array, "*R"]
    seed: UInt32[Array, ""]
    entropy: Bool[Array, "*R"]
    """Whether `Draw.policy_entropy` is computed: one more pass over the logits."""

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
        entropy: bool = False,
        stop_slots: int = 8,
    ) -> "Sampling":
        """Return the settings, the same for all rows; `stop` has at most `stop_slots` ids."""
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
            entropy=jnp.bool_(entropy),
        )

    def rows(self, count: int) -> "Sampling":
        """Return the settings broadcast to `count` rows; the seed stays a scalar."""

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
            entropy=broadcast(self.entropy, 0),
        )

    def at_rows(self, row: Int32[Array, " A"]) -> "Sampling":
        """Return the settings of some rows."""
        knobs = {name: knob for name, knob in vars(self).items() if name != "seed"}
        return Sampling(seed=self.seed, **{name: knob[row] for name, knob in knobs.items()})


def seed_for(seed: int, purpose: str) -> int:
    """Return the seed of one purpose ("rollout", "eval", ...): 32 bits of a SHA-256 hash."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


class Draw(NamedTuple):
    """One sampled token for each row."""

    token: Int32[Array, " B"]
    logprob: Float32[Array, " B"]
    """Of the distribution that was sampled, after temperature and filters; greedy: as below."""
    model_logprob: Float32[Array, " B"]
    """Of the model at temperature 1, without filters."""
    policy_logprob: Float32[Array, " B"]
    """Of the policy: the model at the row's temperature, without filters and bans; greedy: at 1."""
    policy_entropy: Float32[Array, " B"]
    """Entropy of the policy over the vocabulary, in nats; 0 where `Sampling.entropy` is false."""
    bad: Bool[Array, " B"]
    """No token could be sampled: a logit is NaN or +inf, or all are -inf. Other fields are 0."""


def row_keys(
    seed: UInt32[Array, ""],
    sample_id: Int32[Array, " B"],
    position: Int32[Array, ""] | Int32[Array, " B"],
) -> Key[Array, " B"]:
    """Return each row's key at its response position.

    The generator is always threefry: results of others depend on the batch under `vmap`.
    """
    base = jax.random.key(seed, impl="threefry2x32")
    rows = jax.vmap(lambda i: jax.random.fold_in(base, i))(sample_id)
    return jax.vmap(jax.random.fold_in)(rows, jnp.broadcast_to(position, sample_id.shape))


class _Knobs(NamedTuple):
    """Settings of the rows at their positions, with filters off in greedy rows."""

    greedy: Bool[Array, " B"]
    inverse_temperature: Float32[Array, " B"]
    """1 / temperature. Products have the same bits in every compiled context, quotients may not,
    and a threshold must equal the value it was taken from."""
    top_k: Int32[Array, " B"]
    top_p: Float32[Array, " B"]
    log_min_p: Float32[Array, " B"]
    """Log of min-p: the smallest allowed difference of a logit to the largest."""
    banned: Int32[Array, "B E"]
    """Stop tokens that are not allowed yet at this position, padded with -1."""


def _knobs(sampling: Sampling, position: Int32[Array, " B"]) -> _Knobs:
    greedy = sampling.temperature == 0
    early = (position < sampling.min_tokens)[:, None]
    return _Knobs(
        greedy=greedy,
        inverse_temperature=1 / jnp.where(greedy, 1, sampling.temperature),
        top_k=jnp.where(greedy, 0, sampling.top_k),
        top_p=jnp.where(greedy, 1, sampling.top_p),
        log_min_p=jnp.where(greedy, -jnp.inf, jnp.log(sampling.min_p)),
        banned=jnp.where(early, sampling.stop, NO_TOKEN),
    )


def draw(
    logits: Float[Array, "B W"],
    keys: Key[Array, " B"],
    sampling: Sampling,
    position: Int32[Array, ""] | Int32[Array, " B"],
    axis: str | None = None,
) -> Draw:
    """Sample one token for each row; `position` is its index in the response.

    With a mesh `axis`, inside `shard_map`, W is the number of columns of this shard; all other
    arguments and the results are the same on every shard. Shards must consist of whole blocks.
    """
    rows, width = logits.shape
    columns = Columns(width, axis)
    columns.check()
    sampling = sampling.rows(rows)
    knobs = _knobs(sampling, jnp.broadcast_to(position, (rows,)))
    blocks = columns.split(logits.astype(jnp.float32))
    raw = block_mass(blocks, columns)
    shaped = (knobs.inverse_temperature != 1) | (knobs.banned >= 0).any(axis=1) | _filtered(knobs)
    weights, cut, policy = lax.cond(
        shaped.any(),
        lambda: _shape(blocks, knobs, columns),
        lambda: (raw, cutoff.no_cut(raw.top), (raw.top, raw.total)),
    )
    token, logit, raw_logit = _two_stages(blocks, weights, cut, keys, knobs, columns)
    model_logprob = raw_logit - raw.top - jnp.log(raw.total)
    logprob = logit - weights.top - jnp.log(weights.total)
    top, total = policy
    policy_logprob = raw_logit * knobs.inverse_temperature - top - jnp.log(total)
    entropy = lax.cond(
        sampling.entropy.any(),
        lambda: _entropy(blocks, knobs, top, total, columns),
        lambda: jnp.zeros_like(top),
    )
    bad = ~jnp.isfinite(raw.total + weights.total)
    return Draw(
        token=jnp.where(bad, 0, token),
        logprob=jnp.where(bad, 0, jnp.where(knobs.greedy, model_logprob, logprob)),
        model_logprob=jnp.where(bad, 0, model_logprob),
        policy_logprob=jnp.where(bad, 0, policy_logprob),
        policy_entropy=jnp.where(bad | ~sampling.entropy, 0, entropy),
        bad=bad,
    )


def _filtered(knobs: _Knobs) -> Bool[Array, " B"]:
    return (knobs.top_k > 0) | (knobs.top_p < 1) | (knobs.log_min_p > -jnp.inf)


def _shape(
    blocks: Float32[Array, "B N block"], knobs: _Knobs, columns: Columns
) -> tuple[BlockMass, Cut, Totals]:
    """Return block masses and threshold of the distribution to sample, and the policy's totals."""
    # Both branches compute a new array: XLA copies an operand that a branch returns unchanged.
    inverse_temperature = knobs.inverse_temperature[:, None, None]
    z = lax.cond(
        (knobs.banned >= 0).any(),
        lambda: _ban(blocks, columns.ids(), knobs.banned) * inverse_temperature,
        lambda: blocks * inverse_temperature,
    )
    weights = block_mass(z, columns)
    top, total = lax.cond(
        (knobs.banned >= 0).any(),
        lambda: _totals(block_mass(blocks * inverse_temperature, columns)),
        lambda: _totals(weights),
    )

    def filtered() -> tuple[BlockMass, Cut]:
        cut = lax.cond(
            ((knobs.top_k > 0) | (knobs.top_p < 1)).any(),
            lambda: cutoff.find_cut(z, weights, knobs.top_k, knobs.top_p, columns),
            lambda: cutoff.no_cut(weights.top),
        )
        kept = _keep(z, columns.ids(), weights.top, cut, knobs.log_min_p)
        return block_mass(kept, columns), cut

    weights, cut = lax.cond(
        _filtered(knobs).any(), filtered, lambda: (weights, cutoff.no_cut(weights.top))
    )
    return weights, cut, (top, total)


def _totals(weights: BlockMass) -> Totals:
    return weights.top, weights.total


def _entropy(
    blocks: Float32[Array, "B N block"],
    knobs: _Knobs,
    top: Float32[Array, " B"],
    total: Float32[Array, " B"],
    columns: Columns,
) -> Float32[Array, " B"]:
    """Return H = log Z - sum_v e^(z_v - top) (z_v - top) / Z, Z the sum of e^(z_v - top)."""
    below = blocks * knobs.inverse_temperature[:, None, None] - top[:, None, None]
    # exp(-128) is 0 in float32, and 0 times -inf is NaN.
    terms = jnp.exp(below) * jnp.maximum(below, -128)
    return jnp.log(total) - columns.sum(terms.sum(axis=-1).sum(axis=-1)) / total


def _ban(z: Array, ids: Array, banned: Int32[Array, "B E"]) -> Array:
    """Return z with -inf at each row's banned tokens; z is f32[B, *S]."""
    shape = (-1, *[1] * (z.ndim - 1))
    hit = functools.reduce(operator.or_, (ids == stop.reshape(shape) for stop in banned.T))
    return jnp.where(hit, -jnp.inf, z)


def _keep(z: Array, ids: Array, top: Array, cut: Cut, log_min_p: Array) -> Array:
    """Return z with -inf below the threshold and below min-p; z is f32[B, *S]."""
    floor = (top + log_min_p).reshape(-1, *[1] * (z.ndim - 1))
    return jnp.where(cut.keeps(z, ids) & (z >= floor), z, -jnp.inf)


def _two_stages(
    blocks: Float32[Array, "B N block"],
    weights: BlockMass,
    cut: Cut,
    keys: Key[Array, " B"],
    knobs: _Knobs,
    columns: Columns,
) -> tuple[Int32[Array, " B"], Float32[Array, " B"], Float32[Array, " B"]]:
    """Sample a block by its mass, then a token in it; return its id and its logits.

    The logits are those after temperature and filters, then the original ones. Greedy rows take the
    block with the largest logit and the largest logit in it, without noise.
    """
    size = columns.block
    halves = jax.vmap(jax.random.split)(keys)
    greedy = knobs.greedy[:, None]
    score = jnp.where(greedy, weights.best, jnp.log(weights.mass))
    chosen = _argmax(columns.gather(score), halves[:, 0], greedy)
    raw, here = columns.pick(blocks, chosen)
    ids = chosen[:, None] * size + jnp.arange(size, dtype=jnp.int32)[None]
    z = _ban(raw, ids, knobs.banned) * knobs.inverse_temperature[:, None]
    inside = _argmax(_keep(z, ids, weights.top, cut, knobs.log_min_p), halves[:, 1], greedy)

    def share(value: Array) -> Array:
        value = jnp.take_along_axis(value, inside[:, None], axis=1)[:, 0]
        return columns.sum(jnp.where(here, value, 0))

    return share(ids), share(z), share(raw)


def _argmax(
    score: Float32[Array, "B N"], keys: Key[Array, " B"], greedy: Bool[Array, "B 1"]
) -> Int32[Array, " B"]:
    """Sample from softmax(score), exactly, by Gumbel noise; greedy rows: the first maximum.

    The noise has high resolution; the default noise never selects probabilities below about 1e-7.
    """
    shape = score.shape[1:]
    noise = jax.vmap(lambda key: jax.random.gumbel(key, shape, jnp.float32, mode="high"))(keys)
    return jnp.argmax(score + jnp.where(greedy, 0, noise), axis=1).astype(jnp.int32)
