"""Logits of some columns of the vocabulary: what every implementation of `head.py` shares.

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
    """Where tokens and vocabulary lie on a mesh."""

    mesh: Mesh
    tokens: tuple[str, ...] = ()
    """Axes that the tokens are split over."""
    vocabulary: str | None = None
    """Axis that the columns of the head are split over."""

    @property
    def token_shards(self) -> int:
        """Parts that the tokens are in."""
        size = 1
        for axis in self.tokens:
            size *= self.mesh.shape[axis]
        return size

    @property
    def vocabulary_shards(self) -> int:
        """Parts that the vocabulary is in."""
        return self.mesh.shape[self.vocabulary] if self.vocabulary else 1


@dataclasses.dataclass(frozen=True)
class HeadSettings:
    """What one compilation is fixed to."""

    vocabulary: int
    """Columns that exist; a padded head has more rows."""
    chunk: int
    """Columns of logits at a time, where an implementation works in chunks."""
    backward_chunk: int | None = None
    """The same in the backward pass; by default equal."""
    softcap: float | None = None
    k: int = 0
    """Length of the top-K list; 0 where none is asked for."""
    transposed: bool = False
    """The head is [D, V]."""
    sharding: HeadSharding | None = None
    implementation: str | None = None
    """As it was asked for."""
    blocks: Blocks | None = None
    """Of a kernel, where its own formula shall not choose."""
    interpret: bool = False
    """Run a kernel in the interpreter of its platform, on a CPU: for tests."""


def as_vd(head: Array, settings: HeadSettings) -> Float[Array, "V D"]:
    """Give the head one row a word, for implementations that want no other."""
    return head.T if settings.transposed else head


def head_rows(
    head: Array, first: Array | int, width: int, settings: HeadSettings
) -> Float[Array, "C D"]:
    """Read the rows of the columns [first, first + width)."""
    part = lax.dynamic_slice_in_dim(head, first, width, axis=int(settings.transposed))
    return as_vd(part, settings)


def dot(left: Array, right: Array, contract: tuple[int, int]) -> Array:
    """Multiply over one axis of each, accumulating in float32."""
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
    """Return z, and its slope to the bare product, which broadcasts to z.

    The cap belongs to the model, the scale to the sampler: z = scale * c tanh(x / c).
    """
    x = dot(hidden, rows, (1, 1))
    if softcap is None:
        return x * scale, scale
    capped = jnp.tanh(x / softcap)
    return softcap * capped * scale, scale * (1.0 - capped * capped)


def exists(ids: Int32[Array, "*N"], vocabulary: int | Array) -> Bool[Array, "*N"]:
    """Tell ids of the vocabulary from padding and nonsense."""
    return (ids >= 0) & (ids < vocabulary)
