"""Matrix products of float32 in full float32 precision, on every platform.

By default GPUs multiply float32 as TF32 (10 bits of mantissa) and TPUs as bfloat16 (7 bits). To get
that speed, choose bfloat16 explicitly.
"""

from contextlib import AbstractContextManager, nullcontext

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike


def precision_of(dtype: DTypeLike) -> lax.Precision | None:
    """Return the precision of products in this dtype; None means the default of the platform."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def precisely(dtype: DTypeLike) -> AbstractContextManager[None]:
    """Return a context that gives `precision_of(dtype)` to products that name no precision."""
    full = jnp.dtype(dtype) == jnp.float32
    return jax.default_matmul_precision("highest") if full else nullcontext()
