"""The head implementations by name, and the choice of the default one.

    TPU            -> pallas_tpu  } if the shape is large enough and the kernel supports it
    one H100, H200 -> pallas_gpu  }
    else           -> chunked

The choice is made when a program is lowered, by the platform it is lowered for: a program compiled
for a TPU on a machine without one gets the TPU kernel. For GPUs the platform is not enough, since
the kernel needs the Hopper generation: the process must have exactly one GPU, of that generation,
because the kernel was not run on several. It was timed at N = 4096, D = 4096, V = 151936, K = 16.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from fireopd_jax.ops import chunked, pallas_gpu, pallas_gpu_rows, pallas_tpu
from fireopd_jax.ops.logits import HeadSettings
from fireopd_jax.ops.partials import Forward, HeadPartials
from fireopd_jax.runtime.target import devices, platform
from fireopd_jax.types import Array

FEWEST_TOKENS = 256
SMALLEST_VOCABULARY = 4096
"""Below either limit a kernel has too little work to fill its blocks."""

PLAIN = "reference"
"""Full logits, differentiated by JAX, without sharding."""
KERNELS = {"pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu, "pallas_gpu_rows": pallas_gpu_rows}
"""Modules with a `forward`, and an `unsupported_reason` for the shapes that it does not support."""
PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "gpu", "pallas_gpu_rows": "gpu"}
"""Platform that a kernel needs outside its interpreter; other implementations run anywhere."""


def forward(
    hidden: Array,
    head: Array,
    ids: Array,
    support_ids: Array,
    scale: Array,
    limit: Array | None,
    settings: HeadSettings,
    weight_inputs: tuple[Array, Array] | None = None,
) -> HeadPartials:
    """Return the partials from the default implementation of the platform and shape.

    See `partials.Forward`.
    """
    operands = (hidden, head, ids, support_ids, scale, limit, weight_inputs)

    def bind(implementation: Forward) -> Callable[..., HeadPartials]:
        def run(hidden, head, ids, support_ids, scale, limit, weight_inputs) -> HeadPartials:
            return implementation(
                hidden, head, ids, support_ids, scale, limit, settings, weight_inputs
            )

        return run

    kernels = default_kernels(*_shape(settings, hidden, head, support_ids.shape[1]))
    if not kernels:
        return bind(chunked.forward)(*operands)
    branches = {platform: bind(kernel.forward) for platform, kernel in kernels.items()}
    return lax.platform_dependent(*operands, **branches, default=bind(chunked.forward))


def default_kernels(
    tokens: int, width: int, vocabulary: int, support: int, k: int, dtype: DTypeLike
) -> dict[str, Any]:
    """Return the kernel module of each platform that has one worth using for the shape."""
    if tokens < FEWEST_TOKENS or vocabulary < SMALLEST_VOCABULARY:
        return {}
    kernels: dict[str, Any] = {"tpu": pallas_tpu}
    if has_one_hopper_gpu():
        kernels["cuda"] = pallas_gpu
    shape = (tokens, width, vocabulary, support, k, dtype)
    return {name: each for name, each in kernels.items() if not each.unsupported_reason(*shape)}


def has_one_hopper_gpu() -> bool:
    """Return whether this process has exactly one GPU, of compute capability 9.0 (WGMMA)."""
    if platform() != "gpu" or len(devices()) > 1:
        return False
    return getattr(devices()[0], "compute_capability", None) == "9.0"


def _shape(settings: HeadSettings, hidden: Array, head: Array, support: int) -> tuple:
    """Return the arguments of `unsupported_reason`: N, D, V, support size, K, dtype."""
    dtype = jnp.promote_types(hidden.dtype, head.dtype)
    return *hidden.shape, settings.vocabulary, support, settings.k, dtype


FORWARDS: dict[str | None, Forward] = {
    None: forward,
    "chunked": chunked.forward,
    **{name: kernel.forward for name, kernel in KERNELS.items()},
}
IMPLEMENTATIONS = (PLAIN, *(name for name in FORWARDS if name))


def check_supported(settings: HeadSettings, hidden: Array, head: Array, support: int) -> None:
    """Raise ValueError, with the reason, if the named implementation cannot run this."""
    name = settings.implementation
    if name == PLAIN and settings.sharding:
        raise ValueError(
            f"implementation {PLAIN!r} computes full logits and does not support sharding"
        )
    kernel = KERNELS.get(name or "")
    if kernel and (reason := kernel.unsupported_reason(*_shape(settings, hidden, head, support))):
        raise ValueError(f"implementation {name!r}: {reason}")
