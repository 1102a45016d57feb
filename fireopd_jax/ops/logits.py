"""Logits of some columns of the vocabulary, as all implementations of `head.py` compute them.

hidden [N, D], rows [C, D] of the head -> z = scale * cap(hidden @ rows.T), float32 [N, C]
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Float32, Int32

from fireopd_jax.ops.blocks import Blocks
from fireopd_jax.ops.precision import precision_of
from fireopd_jax.types import Array


@dataclasses.dataclass(frozen=True)
class HeadSharding:
    """Mesh axes over which the tokens and the vocabulary are sharded."""

    mesh: Mesh
    tokens: tuple[str, ...] = ()
    """Axes that shard the tokens."""
    vocabulary: str | None = None
    """Axis that shards the columns of the head, padded where it does not divide them."""
    width: str | None = None
    """One of `tokens`: the axis over which the width of the head's gradient lies, if it divides it:
    the sum over the tokens is a reduce-scatter."""
    own_tokens: bool = False
    """Whether the caller's tokens are sharded over `vocabulary`, too: the sum of the gradient of
    the states is a reduce-scatter."""

    @property
    def token_shards(self) -> int:
        """Number of shards of the tokens."""
        size = 1
        for axis in self.tokens:
            size *= self.mesh.shape[axis]
        return size

    @property
    def vocabulary_shards(self) -> int:
        """Number of shards of the vocabulary."""
        return self.mesh.shape[self.vocabulary] if self.vocabulary else 1

    @property
    def token_multiple(self) -> int:
        """What the number of tokens is padded to a multiple of."""
        return self.token_shards * (self.vocabulary_shards if self.own_tokens else 1)


@dataclasses.dataclass(frozen=True)
class HeadSettings:
    """Static arguments of one compilation of a head function."""

    vocabulary: int
    """Number of token ids; a padded head has more rows."""
    chunk: int
    """Vocabulary columns at a time, where an implementation works in chunks."""
    backward_chunk: int | None = None
    """The same in the backward pass; None means `chunk`."""
    softcap: float | None = None
    k: int = 0
    """Length of the top-K list; 0 means none."""
    transposed: bool = False
    """Whether the head is [D, V]."""
    sharding: HeadSharding | None = None
    implementation: str | None = None
    """As the caller named it."""
    blocks: Blocks | None = None
    """Block sizes of a kernel; None means its own default."""
    interpret: bool = False
    """Run a kernel on a CPU, in the interpreter of its platform; for tests."""


def as_vd(head: Array, settings: HeadSettings) -> Float[Array, "V D"]:
    """Return the head in the layout [V, D]."""
    return head.T if settings.transposed else head


def head_rows(
    head: Array, first: Array | int, width: int, settings: HeadSettings
) -> Float[Array, "C D"]:
    """Return the head's rows [C, D] for the columns [first, first + width)."""
    part = lax.dynamic_slice_in_dim(head, first, width, axis=int(settings.transposed))
    return as_vd(part, settings)


def dot(left: Array, right: Array, contract: tuple[int, int]) -> Array:
    """Return the product over one axis of each, accumulated in float32."""
    dtype = jnp.promote_types(left.dtype, right.dtype)
    return lax.dot_general(
        left.astype(dtype),
        right.astype(dtype),
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision_of(dtype),
        preferred_element_type=jnp.float32,
    )


def logits(
    hidden: Float[Array, "N D"],
    rows: Float[Array, "C D"],
    scale: Float32[Array, ""],
    softcap: float | None,
) -> tuple[Float32[Array, "N C"], Array]:
    """Return z = scale * cap(hidden @ rows.T), and dz/dx, x = hidden @ rows.T, broadcastable to z.

    The cap belongs to the model, the scale to the sampler: z = scale * c tanh(x / c).
    """
    x = dot(hidden, rows, (1, 1))
    if softcap is None:
        return x * scale, scale
    capped = jnp.tanh(x / softcap)
    return softcap * capped * scale, scale * (1.0 - capped * capped)


def with_rows(head: Array, rows: int, transposed: bool) -> Array:
    """Return a head with so many token ids: cut off, or padded with zeros."""
    axis, missing = int(transposed), rows - head.shape[int(transposed)]
    if missing <= 0:
        return lax.slice_in_dim(head, 0, rows, axis=axis) if missing else head
    padding = [(0, 0), (0, 0)]
    padding[axis] = (0, missing)
    return jnp.pad(head, padding)


def exists(ids: Int32[Array, "*N"], vocabulary: int | Array) -> Bool[Array, "*N"]:
    """Return the mask of the ids in [0, vocabulary)."""
    return (ids >= 0) & (ids < vocabulary)
