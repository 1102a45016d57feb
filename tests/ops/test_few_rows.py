"""Products of few rows: right for any number of rows, and on a CPU with the matrix on the left."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireopd_jax.ops.few_rows import MAX_ROWS, few_rows_product

OUTPUTS, INPUTS = 24, 40


def operands(rows, dtype="float32"):
    rng = np.random.default_rng(rows)
    return (jnp.asarray(rng.normal(size=(n, INPUTS)), dtype) for n in (rows, OUTPUTS))


@pytest.mark.parametrize("rows", [0, 1, 16, MAX_ROWS, MAX_ROWS + 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_the_product(rows, dtype):
    x, matrix = operands(rows, dtype)
    wanted = np.asarray(x, np.float64) @ np.asarray(matrix, np.float64).T
    got = jax.jit(few_rows_product)(x, matrix)
    assert got.shape == (rows, OUTPUTS) and got.dtype == dtype
    tolerance = 1e-5 if dtype == "float32" else 0.1
    np.testing.assert_allclose(np.asarray(got, np.float64), wanted, atol=tolerance)
    wide = few_rows_product(x, matrix, jnp.float32)
    assert wide.dtype == jnp.float32
    np.testing.assert_allclose(wide, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "shape"),
    [(16, f"f32[{OUTPUTS},16]"), (MAX_ROWS + 1, f"f32[{MAX_ROWS + 1},{OUTPUTS}]")],
)
def test_a_cpu_has_the_matrix_on_the_left_of_few_rows(rows, shape):
    program = jax.jit(few_rows_product).lower(*operands(rows)).compile().as_text()
    products = [line for line in program.splitlines() if " dot(" in line]
    assert len(products) == 1 and f"= {shape}" in products[0], products


def test_other_platforms_do_not_transpose_the_product():
    lowered = jax.jit(few_rows_product).trace(*operands(16)).lower(lowering_platforms=("tpu",))
    assert "optimization_barrier" not in lowered.as_text()
    here = jax.jit(few_rows_product).lower(*operands(16)).as_text()
    assert "optimization_barrier" in here
