"""Product of few rows with a large matrix, as in a decode step with one row per slot.

    rows [M, I], matrix [O, I]  ->  rows matrix^T [M, O]

XLA on a CPU repacks the right operand of every product. If that is the matrix, repacking 16 rows'
product takes up to twice as long as the product itself; so for few rows the matrix is the left
operand and the result is transposed. A barrier keeps the compiler from swapping the operands back.
"""

import jax
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Float

from fireopd_jax.ops.precision import precision_of
from fireopd_jax.types import Array

MAX_ROWS = 64
"""Largest number of rows at which a CPU is faster with the matrix on the left; at 96 it is not."""


def few_rows_product(
    rows: Float[Array, "M I"], matrix: Float[Array, "O I"], dtype: DTypeLike | None = None
) -> Float[Array, "M O"]:
    """Return rows matrix^T in `dtype`, by default in the operands' dtype.

    float32 operands are multiplied in full float32 precision on every platform.
    """

    def product(left: Array, right: Array) -> jax.Array:
        return lax.dot_general(
            left,
            right,
            (((1,), (1,)), ((), ())),
            precision=precision_of(left.dtype),
            preferred_element_type=dtype,
        )

    def transposed(rows: Array, matrix: Array) -> jax.Array:
        return lax.optimization_barrier(product(matrix, rows)).T

    if rows.shape[0] > MAX_ROWS:
        return product(rows, matrix)
    return lax.platform_dependent(rows, matrix, cpu=transposed, default=product)
