"""Logits of some columns of the vocabulary: what every implementation of `head.py` shares.

hidden [N, D], rows [C, D] of the head -> z = scale * cap(hidden @ rows.T), float32 [N, C]
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Float32, Int32

from fireopd_jax.ops.blocks import Blocks
from fireopd_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Settings:
    """What one compilation is fixed to."""

    vocabulary: int
    """Columns that exist; a padded head has more rows."""
    chunk: int
    """Columns of logits at a time, where an implementation works in chunks."""
    softcap: float | None = None
    k: int = 0
    """Length of the top-K list; 0 where none is asked for."""
    blocks: Blocks | None = None
    """Of a kernel, where its own formula shall not choose."""
    interpret: bool = False
    """Run a kernel in the interpreter of its platform, on a CPU: for tests."""


def dot(left: Array, right: Array, contract: tuple[int, int]) -> Array:
    """Multiply over one axis of each, accumulating in float32."""
    dtype = jnp.promote_types(left.dtype, right.dtype)
    # Who passes float32 asks for float32, not for the TF32 or bfloat16 passes of some accelerators.
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return lax.dot_general(
        left.astype(dtype),
        right.astype(dtype),
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision,
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
    bent = jnp.tanh(x / softcap)
    return softcap * bent * scale, scale * (1.0 - bent * bent)


def exists(ids: Int32[Array, "*N"], vocabulary: int) -> Bool[Array, "*N"]:
    """Tell ids of the vocabulary from padding and nonsense."""
    return (ids >= 0) & (ids < vocabulary)
