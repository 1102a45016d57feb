"""Float32 means float32, on every platform.

GPUs by default multiply it in TF32, of 10 bits, and TPUs in bfloat16, of 7. Who wants that speed
says bfloat16.
"""

from contextlib import AbstractContextManager, nullcontext

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike


def precision_of(dtype: DTypeLike) -> lax.Precision | None:
    """Give the precision of products of this type; None is the platform's own."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def precisely(dtype: DTypeLike) -> AbstractContextManager[None]:
    """Let the products of a library that names no precision have this one."""
    full = jnp.dtype(dtype) == jnp.float32
    return jax.default_matmul_precision("highest") if full else nullcontext()
