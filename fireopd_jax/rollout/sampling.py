"""From logits to one token a row and its log-probabilities; every knob is traced.

    logits / temperature -> top-k -> top-p -> min-p -> draw

Each row owns its key, a function of (run seed, sample id, token position) alone, so a row draws
the same token in any batch.
"""

import hashlib
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int32, Key, UInt32
from pydantic import Field, NonNegativeInt, PositiveInt

from fireopd_jax.config import UnitInterval, config
from fireopd_jax.types import Array, pytree

NO_TOKEN = -1


@config
class RolloutConfig:
    """How responses are drawn in training."""

    batch_size: PositiveInt = 64
    """Responses a step."""
    group_size: PositiveInt = 1
    """Responses of each prompt; divides the batch size."""
    max_tokens: PositiveInt = 512
    """Longest response, its end-of-sequence token included."""
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Divides the logits; models score at it too. 0 is greedy."""
    top_p: UnitInterval = 1.0
    """Smallest set of tokens with at least this mass."""
    top_k: NonNegativeInt = 0
    """Most likely tokens to draw from; 0 is off."""
    min_p: UnitInterval = 0.0
    """Least probability, relative to the most likely token's."""


@pytree
class Sampling:
    """The knobs as arrays: a new value compiles nothing."""

    temperature: Float32[Array, ""]
    top_p: Float32[Array, ""]
    top_k: Int32[Array, ""]
    min_p: Float32[Array, ""]
    stop: Int32[Array, " E"]
    """Tokens that end a response, padded with -1."""
    max_tokens: Int32[Array, ""]
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
        stop_slots: int = 8,
    ) -> "Sampling":
        """Turn plain numbers into arrays; `stop` may hold up to `stop_slots` ids."""
        if len(stop) > stop_slots:
            raise ValueError(f"at most {stop_slots} stop tokens are supported, not {len(stop)}")
        return cls(
            temperature=jnp.float32(temperature),
            top_p=jnp.float32(top_p),
            top_k=jnp.int32(top_k),
            min_p=jnp.float32(min_p),
            stop=jnp.array([*stop, *[NO_TOKEN] * (stop_slots - len(stop))], jnp.int32),
            max_tokens=jnp.int32(max_tokens),
            seed=jnp.uint32(seed),
        )


def stream(seed: int, purpose: str) -> int:
    """Derive the seed of one purpose (rollout, eval, a model's start): 32 bits of its SHA-256."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


class Draw(NamedTuple):
    """One drawn token a row."""

    token: Int32[Array, " B"]
    logprob: Float32[Array, " B"]
    model_logprob: Float32[Array, " B"]


def row_keys(
    seed: UInt32[Array, ""], sample_id: Int32[Array, " B"], position: Int32[Array, ""]
) -> Key[Array, " B"]:
    """Give each row its key at this response position.

    The generator is threefry by name: other kinds depend on the batch under `vmap`.
    """
    base = jax.random.key(seed, impl="threefry2x32")
    rows = jax.vmap(lambda i: jax.random.fold_in(base, i))(sample_id)
    return jax.vmap(lambda key: jax.random.fold_in(key, position))(rows)


def block_gumbel(keys: Key[Array, " B"], logits: Float32[Array, "B V"]) -> Int32[Array, " B"]:
    """Draw exactly from softmax(logits): first a block of columns by its mass, then a column in it.

    V / block + block random words a row instead of V. The noise is drawn at high resolution: the
    default never draws tokens less likely than about 1e-7.
    """
    rows, vocabulary = logits.shape
    block = 128 if vocabulary >= 4096 else 16
    count = -(-vocabulary // block)
    padding = ((0, 0), (0, count * block - vocabulary))
    blocks = jnp.pad(logits, padding, constant_values=-jnp.inf).reshape(rows, count, block)
    top = logits.max(axis=-1)
    mass = jnp.exp(blocks - top[:, None, None]).sum(axis=-1)

    def argmax(key: Array, values: Array) -> Array:
        noise = jax.random.gumbel(key, values.shape, jnp.float32, mode="high")
        return jnp.argmax(values + noise)

    halves = jax.vmap(jax.random.split)(keys)
    chosen = jax.vmap(argmax)(halves[:, 0], jnp.log(mass))
    inside = jnp.take_along_axis(blocks, chosen[:, None, None], axis=1)[:, 0]
    return (chosen * block + jax.vmap(argmax)(halves[:, 1], inside)).astype(jnp.int32)


def filter_logits(logits: Float32[Array, "B V"], sampling: Sampling) -> Float32[Array, "B V"]:
    """Put -inf on what top-k, then top-p of what is left, then min-p exclude.

    Equal logits are ranked by token id, so top-k leaves exactly k and one token is always left.
    """
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    k = jnp.where(sampling.top_k > 0, sampling.top_k, logits.shape[-1])
    ranked = jnp.where(jnp.arange(logits.shape[-1])[None] < k, ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    keep = (before < sampling.top_p) | (sampling.top_p >= 1)
    keep &= probability >= sampling.min_p * probability[:, :1]
    keep = keep.at[:, 0].set(True) & jnp.isfinite(ranked)
    rank = jnp.argsort(order, axis=-1)
    return jnp.where(jnp.take_along_axis(keep, rank, axis=-1), logits, -jnp.inf)


def draw(logits: Float[Array, "B V"], keys: Key[Array, " B"], sampling: Sampling) -> Draw:
    """Draw one token a row; its log-probs are of what was really sampled and of the raw model.

    A greedy token's log-prob is the raw model's.
    """
    logits = logits.astype(jnp.float32)
    greedy = sampling.temperature == 0
    filtered = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
    scaled = logits / jnp.where(greedy, 1.0, sampling.temperature)
    scaled = jax.lax.cond(
        filtered & ~greedy, lambda z: filter_logits(z, sampling), lambda z: z, scaled
    )
    token = jnp.where(
        greedy, jnp.argmax(logits, axis=-1).astype(jnp.int32), block_gumbel(keys, scaled)
    )

    def logprob(z: Array) -> Array:
        return jnp.take_along_axis(z, token[:, None], axis=1)[:, 0] - jax.nn.logsumexp(z, axis=1)

    model_logprob = logprob(logits)
    return Draw(token, jnp.where(greedy, model_logprob, logprob(scaled)), model_logprob)
