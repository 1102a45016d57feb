"""Weights of a frozen model in eight bits: a whole number for each, a float32 step a column.

    W [I, O]  ->  s_o = max_i |W_io| / 127,  q_io = round(W_io / s_o)        x W  ~  (x q) s

A `Quantized` stands among the parameters where a kernel would; whatever multiplies by a kernel
takes either. The numbers q are exact in bfloat16, too, so the product runs in the model's type and
s comes after it: a weight is never rounded a second time.

Quantised are the linear maps of every layer, each expert's own. Embedding and head are not: the
head's statistics take a float matrix, and its errors would reach the log-probs undamped. Routers
and norms are not: they are small, and a router's choice jumps.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Float, Float32, Int, Int8

from fireopd_jax.models.lora import TARGETS
from fireopd_jax.ops.precision import precision_of
from fireopd_jax.types import Array, pytree

Quantize = Literal["int8"]
LEVELS = 127
# Multiplied, not divided, here and by the step's inverse: XLA may do so itself, and weights of few
# bits lie half-way between two numbers often enough for the host to come to others.
STEP = np.float32(1 / LEVELS)
NOTHING = 1e-37
"""A step whose inverse would overflow: what is below it becomes zero."""


@pytree
class Quantized:
    """A kernel, or a stack of kernels."""

    values: Int8[Array, "*L I O"]
    scale: Float32[Array, "*L 1 O"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        return self.values.shape

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.values.size

    def __getitem__(self, index: int | tuple[int, ...]) -> "Quantized":
        """Pick from the leading axes."""
        return jax.tree.map(lambda leaf: leaf[index], self)


def is_quantized(leaf: Any) -> bool:
    """Tell a quantised kernel, which counts as one leaf, from arrays."""
    return isinstance(leaf, Quantized)


def quantizable(path: tuple[str, ...]) -> bool:
    """Tell whether the parameter of this path is a kernel that is quantised."""
    name = path[-2] if path[-1] == "kernel" else path[-1]
    return path[0] == "layers" and name in TARGETS


def quantize(kernel: Float[Array, "*L I O"]) -> Quantized:
    """Round a kernel, each column to steps of a 127th of its largest weight."""
    wide = jnp.asarray(kernel).astype(jnp.float32)
    scale = jnp.abs(wide).max(axis=-2, keepdims=True) * STEP
    inverse = jnp.where(scale > NOTHING, 1 / scale, 0)
    return Quantized(jnp.rint(wide * inverse).astype(jnp.int8), scale)


def quantize_rows(
    rows: Float[np.ndarray, "O I"],
) -> tuple[Int8[np.ndarray, "O I"], Float32[np.ndarray, "O 1"]]:
    """Do what `quantize` does, on the host, to some columns of a kernel that lies transposed."""
    wide = rows.astype(np.float32)
    scale = np.abs(wide).max(axis=1, keepdims=True) * STEP
    # What is not finite shows in the scale, as it would in the weights.
    with np.errstate(invalid="ignore", divide="ignore"):
        wide *= np.where(scale > NOTHING, 1 / scale, np.float32(0))
        return np.rint(wide, out=wide).astype(np.int8), scale


def dequantize(kernel: Quantized) -> Float32[Array, "*L I O"]:
    """Give the kernel that is computed with: q s."""
    return kernel.values.astype(np.float32) * kernel.scale


def quantize_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Quantise a model's kernels; those that are already, and all else, stay as they are."""

    def each(path: tuple, leaf: Any) -> Any:
        names = tuple(str(key.key) for key in path)
        return quantize(leaf) if quantizable(names) and not is_quantized(leaf) else leaf

    return jax.tree.map_with_path(each, params, is_leaf=is_quantized)


def multiply(
    x: Float[Array, "N I"], kernel: Quantized, dtype: jax.typing.DTypeLike
) -> Float[Array, "N O"]:
    """Multiply rows by a kernel, in `dtype` with float32 sums."""
    out = jnp.matmul(
        jnp.asarray(x, dtype),
        kernel.values.astype(dtype),
        preferred_element_type=jnp.float32,
        precision=precision_of(dtype),
    )
    return (out * kernel.scale).astype(dtype)


def ragged_multiply(
    x: Float[jax.Array, "N I"],
    kernels: Quantized,
    sizes: Int[jax.Array, " E"],
    expert: Int[jax.Array, " N"],
) -> Float[Array, "N O"]:
    """Multiply rows, sorted by expert, each by its own expert's kernel."""
    values = jnp.asarray(kernels.values, x.dtype)
    out = jax.lax.ragged_dot(
        x, values, sizes, precision_of(x.dtype), preferred_element_type=jnp.float32
    )
    return (out * kernels.scale[expert, 0]).astype(x.dtype)


def scale_place(place: Sharding, axes: int) -> Sharding:
    """Give the sharding of the scale of a kernel with so many axes: it has one row."""
    if not isinstance(place, NamedSharding):
        return place
    spec = [*place.spec, *[None] * (axes - len(place.spec))]
    return NamedSharding(place.mesh, PartitionSpec(*spec[:-2], None, spec[-1]))
