"""Int8 weights of frozen models: an 8-bit integer for each weight, a float32 scale for each column.

    W [I, O]  ->  s_o = max_i |W_io| / 127,  q_io = round(W_io / s_o)        x W  ~  (x q) s

A `Quantized` replaces a kernel among the parameters; all code that multiplies by a kernel accepts
either. The integers q are exact in bfloat16, too, so the product runs in the model's dtype and is
multiplied by s afterwards: no weight is rounded twice.

The linear maps of every layer are quantised, each expert's separately. Embedding and head are not:
the head statistics take a float matrix, and quantisation errors of the head would enter the
log-probabilities directly. Routers and norms are not: they are small, and a small error can change
which expert a router chooses.
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
# The host must round as XLA does. XLA may replace a division by a product with the inverse, which
# rounds weights half-way between two integers differently, and bfloat16 weights often are: so both
# use products with inverses.
STEP = np.float32(1 / LEVELS)
NOTHING = 1e-37
"""Scales up to this have an inverse that overflows; their columns become zero."""


@pytree
class Quantized:
    """An int8 kernel or a stack of them: `values * scale`, one float32 scale for each column."""

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
        """Index the leading axes of values and scales."""
        return jax.tree.map(lambda leaf: leaf[index], self)


def is_quantized(leaf: Any) -> bool:
    """Return whether a leaf of the parameters is a quantised kernel; for `is_leaf` of jax.tree."""
    return isinstance(leaf, Quantized)


def quantizable(path: tuple[str, ...]) -> bool:
    """Return whether the parameter at this path is a linear map of a layer."""
    name = path[-2] if path[-1] == "kernel" else path[-1]
    return path[0] == "layers" and name in TARGETS


def quantize(kernel: Float[Array, "*L I O"]) -> Quantized:
    """Return the kernel in int8; the scale of a column is its largest |weight| / 127."""
    wide = jnp.asarray(kernel).astype(jnp.float32)
    scale = jnp.abs(wide).max(axis=-2, keepdims=True) * STEP
    inverse = jnp.where(scale > NOTHING, 1 / scale, 0)
    return Quantized(jnp.rint(wide * inverse).astype(jnp.int8), scale)


def quantize_rows(
    rows: Float[np.ndarray, "O I"],
) -> tuple[Int8[np.ndarray, "O I"], Float32[np.ndarray, "O 1"]]:
    """Quantise rows of a transposed kernel on the host; bit-identical to `quantize`."""
    wide = rows.astype(np.float32)
    scale = np.abs(wide).max(axis=1, keepdims=True) * STEP
    # A weight that is not finite makes its scale not finite, so the error is not hidden.
    with np.errstate(invalid="ignore", divide="ignore"):
        wide *= np.where(scale > NOTHING, 1 / scale, np.float32(0))
        return np.rint(wide, out=wide).astype(np.int8), scale


def dequantize(kernel: Quantized) -> Float32[Array, "*L I O"]:
    """Return the kernel in float32: q s."""
    return kernel.values.astype(np.float32) * kernel.scale


def quantize_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters with all quantisable kernels in int8; other leaves are unchanged."""

    def each(path: tuple, leaf: Any) -> Any:
        names = tuple(str(key.key) for key in path)
        return quantize(leaf) if quantizable(names) and not is_quantized(leaf) else leaf

    return jax.tree.map_with_path(each, params, is_leaf=is_quantized)


def multiply(
    x: Float[Array, "N I"], kernel: Quantized, dtype: jax.typing.DTypeLike
) -> Float[Array, "N O"]:
    """Return x W for rows x: the product in `dtype`, accumulated and scaled in float32."""
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
    """Return each row times its expert's kernel; rows are sorted by expert, `sizes` rows each."""
    values = jnp.asarray(kernels.values, x.dtype)
    out = jax.lax.ragged_dot(
        x, values, sizes, precision_of(x.dtype), preferred_element_type=jnp.float32
    )
    return (out * kernels.scale[expert, 0]).astype(x.dtype)


def scale_place(place: Sharding, axes: int) -> Sharding:
    """Return the sharding of a kernel's scale, whose input axis has size 1: that axis unsharded.

    `axes` is the number of axes of the kernel.
    """
    if not isinstance(place, NamedSharding):
        return place
    spec = [*place.spec, *[None] * (axes - len(place.spec))]
    return NamedSharding(place.mesh, PartitionSpec(*spec[:-2], None, spec[-1]))
