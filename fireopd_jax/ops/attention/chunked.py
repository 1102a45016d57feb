"""Attention in linear memory by plain XLA, on any platform, and its gradient.

    forward   for each query block: key blocks are folded into (m, mass, total), an online softmax
    backward  for each query block: scores are recomputed block by block from q, k and the
              log-sum-exp; d k and d v are accumulated in float32

Only key blocks that causality, the window or the segments do not exclude are visited; a loop's
bounds are the union over the rows. Heads that share keys are rows of one matrix, as in `attend`.

References: arXiv 2205.14135 (FlashAttention), 2307.08691 (its backward pass).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Float32

from fireopd_jax.ops.attention.masks import Layout, Tokens, allowed, block_of, tokens_of
from fireopd_jax.ops.attention.masks import needed_blocks as needed
from fireopd_jax.ops.attention.settings import AttentionSettings, default_blocks
from fireopd_jax.ops.precision import precision_of
from fireopd_jax.types import Array

MASKED = -1e30
"""Score of a key that is not attended to."""
LOWEST = -1e29
"""Where a running maximum starts: exp(MASKED - LOWEST) is 0, without a second mask."""
Softmax = tuple[Array, Array, Array]
"""An online softmax: maximum and mass [B, K, M], weighted sum of values [B, K, M, H]; float32."""


def forward(
    settings: AttentionSettings,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    layout: Layout,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B N T"]]:
    """Return the output in the dtype of v, and the log-sum-exp of each query's scores.

    A query that attends to nothing has output 0 and a log-sum-exp of 0.
    """
    cut = _Cut(settings, q, k, layout)
    keys, values = cut.padded(k), cut.padded(v)

    def of_block(block: tuple) -> tuple[Array, Array]:
        q, queries, first, end = block

        def fold(j: Array, carry: Softmax) -> Softmax:
            at = j * cut.keys
            scores = product("bkth,bksh->bkts", q, _slice(keys, at, cut.keys))
            mask = allowed(queries, block_of(cut.tokens, at, cut.keys), layout.window)
            scores = cut.apart(scores, 2)
            scores = jnp.where(mask[:, None, None], scores * settings.scale, MASKED)
            scores = cut.together(scores, 2)
            return folded(carry, scores, _slice(values, at, cut.keys))

        m, mass, total = lax.fori_loop(first, end, fold, nothing(q))
        some = jnp.where(mass > 0, mass, 1.0)
        out = (total / some[..., None]).astype(v.dtype)
        return out, jnp.where(mass > 0, m + jnp.log(some), 0.0)

    out, logsumexp = lax.map(of_block, (cut.blocks(q), cut.queries, cut.first, cut.end))
    return cut.whole(out), cut.whole_statistics(logsumexp)


def backward(
    settings: AttentionSettings,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    layout: Layout,
    out: Float[Array, "B T N H"],
    logsumexp: Float32[Array, "B N T"],
    d_out: Float[Array, "B T N H"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B K T H"], Float[Array, "B K T H"]]:
    """Return d q, d k, d v in the dtypes of q, k, v.

    With p = exp(s - logsumexp), s = scale q k^T and D = sum_h d out * out:
    d v = p^T d out, d s = p (d out v^T - D), d q = scale d s k, d k = scale d s^T q.
    """
    cut = _Cut(settings, q, k, layout)
    keys, values = cut.padded(k), cut.padded(v)
    # Scores are computed transposed, [keys, queries]: then four of the five products need no
    # transpose, and the fifth none of a large operand. XLA:CPU takes twice as long for those.
    turned = keys.swapaxes(2, 3)
    dot_out = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=3).swapaxes(1, 2)

    def of_block(sums: tuple, block: tuple) -> tuple[tuple, Array]:
        q, d_out, logsumexp, dot_out, queries, first, end = block

        def add(j: Array, carry: tuple) -> tuple:
            d_q, d_k, d_v = carry
            at = j * cut.keys
            scores = product("bksh,bkth->bkst", _slice(keys, at, cut.keys), q)
            mask = allowed(queries, block_of(cut.tokens, at, cut.keys), layout.window)
            mask = mask.swapaxes(1, 2)[:, None, :, None]
            p = jnp.exp(scores * settings.scale - logsumexp[:, :, None])
            p = cut.together(jnp.where(mask, cut.apart(p, 3), 0.0), 3)
            d_p = product("bksh,bkth->bkst", _slice(values, at, cut.keys), d_out)
            d_s = (p * (d_p - dot_out[:, :, None])).astype(q.dtype)
            d_v = _add(d_v, at, product("bkst,bkth->bksh", p.astype(d_out.dtype), d_out))
            d_k = _add(d_k, at, product("bkst,bkth->bksh", d_s, q))
            columns = lax.dynamic_slice_in_dim(turned, at, cut.keys, axis=3)
            return d_q + product("bkhs,bkst->bkht", columns, d_s), d_k, d_v

        zero = jnp.zeros((*q.shape[:2], q.shape[3], q.shape[2]), jnp.float32)
        d_q, d_k, d_v = lax.fori_loop(first, end, add, (zero, *sums))
        return (d_k, d_v), (d_q * settings.scale).swapaxes(2, 3).astype(q.dtype)

    zeros = (jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32))
    statistics = (cut.blocks_of_statistics(each) for each in (logsumexp, dot_out))
    blocks = (cut.blocks(q), cut.blocks(d_out), *statistics, cut.queries, cut.first, cut.end)
    (d_k, d_v), d_q = lax.scan(of_block, zeros, blocks)
    length = k.shape[2]
    d_k = (d_k[:, :, :length] * settings.scale).astype(k.dtype)
    return cut.whole(d_q), d_k, d_v[:, :, :length].astype(v.dtype)


def nothing(q: Float[Array, "B K M H"]) -> Softmax:
    """Return the online softmax of queries that have attended to nothing yet."""
    none = jnp.zeros(q.shape[:3], jnp.float32)
    return none + LOWEST, none, jnp.zeros(q.shape, jnp.float32)


def folded(
    carry: Softmax, scores: Float32[Array, "B K M S"], values: Float[Array, "B K S H"]
) -> Softmax:
    """Return an online softmax with S more keys; a key with the score `MASKED` changes nothing."""
    m, mass, total = carry
    top = jnp.maximum(m, scores.max(axis=3))
    p = jnp.exp(scores - top[..., None])
    decay = jnp.exp(m - top)
    more = product("bkts,bksh->bkth", p.astype(values.dtype), values)
    return top, decay * mass + p.sum(axis=3), decay[..., None] * total + more


def product(subscripts: str, a: Array, b: Array) -> Float32[Array, "B K M N"]:
    """Return a batch of matrix products in the dtype of the operands, float32 out."""
    precision = precision_of(jnp.promote_types(a.dtype, b.dtype))
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32, precision=precision)


def _slice(x: Array, first: Array, size: int) -> Array:
    return lax.dynamic_slice_in_dim(x, first, size, axis=2)


def _add(total: Array, first: Array, more: Array) -> Array:
    """Return the sums with `more` added from `first` on; in place inside a loop."""
    old = _slice(total, first, more.shape[2])
    return lax.dynamic_update_slice_in_dim(total, old + more, first, axis=2)


class _Cut:
    """How queries and keys are cut into blocks: sizes, tokens, and bounds of the inner loop.

    A block of queries is [B, K, G Q, H]: the G = N / K queries of a key head together.
    """

    def __init__(self, settings: AttentionSettings, q: Array, k: Array, layout: Layout):
        self.rows, self.length, heads, self.width = q.shape
        self.shared = k.shape[1]
        self.group = heads // self.shared
        self.size, self.keys = default_blocks(self.length, settings.blocks)
        self.count = -(-self.length // self.size)
        padded = self.count * self.size, -(-self.length // self.keys) * self.keys
        self.tokens = tokens_of(layout, padded[1])
        self.queries: Tokens = jax.tree.map(self._stacked, tokens_of(layout, padded[0]))
        self.first, self.end = needed(layout, padded, (self.size, self.keys))
        self.extra = tuple(total - self.length for total in padded)

    def _stacked(self, leaf: Array) -> Array:
        cut = leaf.reshape(*leaf.shape[:-1], self.count, self.size)
        return jnp.moveaxis(cut, -2, 0)

    def padded(self, x: Array) -> Array:
        """Return keys or values [B, K, T, H] with zeros up to a whole number of blocks."""
        return jnp.pad(x, ((0, 0), (0, 0), (0, self.extra[1]), (0, 0))) if self.extra[1] else x

    def blocks(self, x: Array) -> Array:
        """Return blocks [count, B, K, G Q, H] of an array like q."""
        x = jnp.pad(x, ((0, 0), (0, self.extra[0]), (0, 0), (0, 0))) if self.extra[0] else x
        x = x.reshape(self.rows, self.count, self.size, self.shared, self.group, self.width)
        x = x.transpose(1, 0, 3, 4, 2, 5)
        return x.reshape(self.count, self.rows, self.shared, -1, self.width)

    def whole(self, blocks: Array) -> Array:
        """Return [B, T, N, H]: the inverse of `blocks`."""
        x = blocks.reshape(
            self.count, self.rows, self.shared, self.group, self.size, self.width
        ).transpose(1, 0, 4, 2, 3, 5)
        return x.reshape(self.rows, -1, self.shared * self.group, self.width)[:, : self.length]

    def blocks_of_statistics(self, x: Array) -> Array:
        """Return blocks [count, B, K, G Q] of an array [B, N, T]."""
        x = jnp.pad(x, ((0, 0), (0, 0), (0, self.extra[0]))) if self.extra[0] else x
        x = x.reshape(self.rows, self.shared, self.group, self.count, self.size)
        return x.transpose(3, 0, 1, 2, 4).reshape(self.count, self.rows, self.shared, -1)

    def whole_statistics(self, blocks: Array) -> Array:
        """Return [B, N, T]: the inverse of `blocks_of_statistics`."""
        x = blocks.reshape(self.count, self.rows, self.shared, self.group, self.size)
        x = x.transpose(1, 2, 3, 0, 4).reshape(self.rows, self.shared * self.group, -1)
        return x[:, :, : self.length]

    def apart(self, x: Array, axis: int) -> Array:
        """Return x with its axis of G Q queries as two axes."""
        return x.reshape(*x.shape[:axis], self.group, self.size, *x.shape[axis + 1 :])

    def together(self, x: Array, axis: int) -> Array:
        """Return x with its two axes of queries, from `axis` on, as one."""
        return x.reshape(*x.shape[:axis], self.group * self.size, *x.shape[axis + 2 :])


Forward = Callable[..., tuple[Array, Array]]
"""(settings, q, k, v, layout) -> output [B, T, N, H] in v's dtype, log-sum-exp f32[B, N, T]."""
Backward = Callable[..., tuple[Array, Array, Array]]
"""(settings, q, k, v, layout, output, log-sum-exp, d output) -> d q, d k, d v."""
