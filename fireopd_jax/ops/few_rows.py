"""Products of few rows with a large matrix, as a decoding step has them: a row a slot.

    rows [M, I], matrix [O, I]  ->  rows matrix^T [M, O]

XLA on a CPU rearranges the right operand of every product. Where that is the matrix, it takes up to
twice as long as the product itself with 16 rows; so few rows go right, and the result is transposed. A
barrier keeps the compiler from turning the product back.
"""

import jax
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Float

from fireopd_jax.ops.precision import precision_of
from fireopd_jax.types import Array

MAX_ROWS = 64
"""Rows up to which a CPU is faster with the matrix on the left; with 96 it is not."""


def few_rows_product(
    rows: Float[Array, "M I"], matrix: Float[Array, "O I"], dtype: DTypeLike | None = None
) -> Float[Array, "M O"]:
    """Multiply each row by each row of a matrix; the result is of `dtype`, by default theirs."""

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
