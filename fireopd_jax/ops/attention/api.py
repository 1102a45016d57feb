"""Causal self-attention among the tokens of packed rows: arguments and checks."""

import jax.numpy as jnp
from jaxtyping import Float, Int32

from fireopd_jax.config import nearest
from fireopd_jax.ops.attention.dispatch import IMPLEMENTATIONS, KERNELS, run, shape_of
from fireopd_jax.ops.attention.guard import guarded
from fireopd_jax.ops.attention.masks import Layout
from fireopd_jax.ops.attention.settings import AttentionBlocks, AttentionSettings
from fireopd_jax.types import Array


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    segments: Int32[Array, "B T"],
    *,
    positions: Int32[Array, "B T"] | None = None,
    window: int | Int32[Array, ""] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    blocks: AttentionBlocks | None = None,
    interpret: bool = False,
    local: bool = False,
) -> Float[Array, "B T N H"]:
    """Return softmax(scale q k^T) v over the earlier tokens of each token's segment.

    Each of the K key heads serves N / K query heads; H is the width of a head. `segments` holds the
    segment of each token, 0 for padding; the tokens of a segment are contiguous but for padding,
    and ids that increase along a row let most blocks be skipped. Token i attends to token j if
    j <= i, their segments are equal, and position_i - position_j < `window`, if there is one.
    `positions` count the tokens of a segment, by default the index; only the window reads them.
    `window` may be a traced scalar, larger than any distance for none. `scale` is 1 / sqrt(H) by
    default.

    Products are in the dtype of the operands, statistics and sums in float32. Padding has output
    and gradient 0. What is not finite makes NaN of what attends to it, and of nothing else.

    `implementation` None: chosen by platform and shape, see `dispatch`. A named kernel that cannot
    do the shape raises ValueError; a kernel that is not named gives way to `chunked`. `splash` and
    `triton` need static windows that count indices (`triton`: none at all). `interpret` runs a
    kernel on a CPU, for tests. `local`: the rows are those of one device, as in a
    `shard_map`; other rows of several devices have no kernel, and the compiler shards as it can.

    References: arXiv 2205.14135 (FlashAttention), 2305.13245 (grouped-query attention).
    """
    _check_shapes(q, k, v, segments, positions)
    _check_options(implementation, window, blocks)
    if not q.size:
        return jnp.zeros(q.shape, v.dtype)
    layout = Layout(segments)
    by_index = positions is None
    if window is not None:
        if by_index:
            positions = jnp.broadcast_to(
                jnp.arange(q.shape[1], dtype=jnp.int32)[None], segments.shape
            )
        layout = Layout(segments, positions, jnp.asarray(window, jnp.int32))
    settings = AttentionSettings(
        scale=q.shape[3] ** -0.5 if scale is None else scale,
        window=window if isinstance(window, int) else None,
        by_index=by_index,
        implementation=implementation,
        blocks=blocks or AttentionBlocks(),
        interpret=interpret,
        local=local,
    )
    kernel = KERNELS.get(implementation or "")
    if kernel and (reason := kernel.unsupported_reason(*shape_of(settings, q, k, layout))):
        raise ValueError(f"attention {implementation!r}: {reason}")
    return guarded(run, settings, q, k, v, layout)


def _check_shapes(q: Array, k: Array, v: Array, segments: Array, positions: Array | None) -> None:
    """Raise ValueError for shapes that do not fit, TypeError for segments that are not int32."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    fits = q.ndim == k.ndim == v.ndim == 4 and k.shape == v.shape
    if not fits or (k.shape[0], *k.shape[2:]) != (*q.shape[:2], q.shape[3]):
        raise ValueError(f"attention needs q [B, T, N, H] and k, v [B, K, T, H], got {shapes}")
    if q.shape[2] % k.shape[1]:
        raise ValueError(f"the key heads must divide the query heads: {shapes}")
    for name, array in (("segments", segments), ("positions", positions)):
        if array is None:
            continue
        if array.dtype != jnp.int32:
            raise TypeError(f"{name} must be int32, got {array.dtype.name}")
        if array.shape != q.shape[:2]:
            raise ValueError(
                f"{name} of shape {tuple(array.shape)} must be [B, T] = {tuple(q.shape[:2])}"
            )


def _check_options(
    implementation: str | None, window: int | Array | None, blocks: AttentionBlocks | None
) -> None:
    """Raise ValueError for an unknown implementation, or a window or block below 1."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown attention implementation {implementation!r}"
            f"{nearest(implementation, IMPLEMENTATIONS)}; known: "
            f"{', '.join(sorted(IMPLEMENTATIONS))}"
        )
    if isinstance(window, int) and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    for name in ("queries", "keys"):
        size = getattr(blocks, name, None)
        if size is not None and size < 1:
            raise ValueError(f"blocks.{name} must be at least 1, got {size}")
