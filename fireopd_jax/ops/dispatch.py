"""The implementations bind name, and which one serves where none is named.

    TPU            -> pallas_tpu  } where the shape is worth a kernel and it can do it
    one H100, H200 -> pallas_gpu  }
    else           -> chunked

The choice falls when a program is lowered, bind the platform it is lowered for: a program for a TPU
that is compiled on a laptop gets the TPU's. Of GPUs that is not enough, the kernel is written for
one generation: the GPU of this process must be of it, and the only one, as the kernel was not run
on several. It was timed at 4096 tokens of width 4096, 151936 words and K = 16.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from fireopd_jax.ops import chunked, pallas_gpu, pallas_gpu_rows, pallas_tpu
from fireopd_jax.ops.logits import HeadSettings
from fireopd_jax.ops.partials import Forward, HeadPartials
from fireopd_jax.types import Array

FEWEST_TOKENS = 256
SMALLEST_VOCABULARY = 4096
"""Below these a kernel has too little work to fill its blocks."""

PLAIN = "reference"
"""Full logits: no forward, no shards, its own gradient."""
KERNELS = {"pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu, "pallas_gpu_rows": pallas_gpu_rows}
"""Modules with a `forward` for some shapes, and a `unsupported_reason` for the others."""
PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "gpu", "pallas_gpu_rows": "gpu"}
"""What a kernel runs on, outside its interpreter; the others run anywhere."""


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
    """Run the implementation that fits the platform and the shape; see `partials.Forward`."""
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
    """Give each platform's kernel, where one is worth it and can do the shape."""
    if tokens < FEWEST_TOKENS or vocabulary < SMALLEST_VOCABULARY:
        return {}
    kernels: dict[str, Any] = {"tpu": pallas_tpu}
    if has_one_hopper_gpu():
        kernels["cuda"] = pallas_gpu
    shape = (tokens, width, vocabulary, support, k, dtype)
    return {name: each for name, each in kernels.items() if not each.unsupported_reason(*shape)}


def has_one_hopper_gpu() -> bool:
    """Tell whether this process has one GPU, of the generation that has WGMMA."""
    if jax.default_backend() != "gpu" or len(jax.devices()) > 1:
        return False
    return getattr(jax.devices()[0], "compute_capability", None) == "9.0"


def _shape(settings: HeadSettings, hidden: Array, head: Array, support: int) -> tuple:
    """Give what a `unsupported_reason` wants to know: tokens, width, vocabulary, support, K, type."""
    dtype = jnp.promote_types(hidden.dtype, head.dtype)
    return *hidden.shape, settings.vocabulary, support, settings.k, dtype


FORWARDS: dict[str | None, Forward] = {
    None: forward,
    "chunked": chunked.forward,
    **{name: kernel.forward for name, kernel in KERNELS.items()},
}
IMPLEMENTATIONS = (PLAIN, *(name for name in FORWARDS if name))


def check_supported(settings: HeadSettings, hidden: Array, head: Array, support: int) -> None:
    """Raise if the named implementation cannot do this, with its reason."""
    name = settings.implementation
    if name == PLAIN and settings.sharding:
        raise ValueError(f"implementation {PLAIN!r} holds full logits and takes no sharding")
    kernel = KERNELS.get(name or "")
    if kernel and (reason := kernel.unsupported_reason(*_shape(settings, hidden, head, support))):
        raise ValueError(f"implementation {name!r}: {reason}")
