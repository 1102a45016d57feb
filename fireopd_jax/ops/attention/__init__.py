"""Attention among the tokens of rows (`attention`) and over a cache (`attend`, ...).

    q, k, v, segments -> guard -> reference | chunked | splash | triton -> guard -> output

`attention` is causal self-attention among the tokens of packed rows; its implementations but
`reference` need memory linear in the length. `attend` is masked attention over given keys,
`attend_to_past` that of a piece of a prompt to itself and to what the cache holds before it,
`attend_step` that of one decoded token to what its cache holds.
"""

from fireopd_jax.ops.attention.api import attention
from fireopd_jax.ops.attention.dispatch import IMPLEMENTATIONS, KERNELS, PLAIN, PLATFORMS, SAVED
from fireopd_jax.ops.attention.settings import AttentionBlocks
from fireopd_jax.ops.attention.slots import attend, attend_step, attend_to_past, visible_keys

__all__ = [
    "IMPLEMENTATIONS",
    "KERNELS",
    "PLAIN",
    "PLATFORMS",
    "SAVED",
    "AttentionBlocks",
    "attend",
    "attend_step",
    "attend_to_past",
    "attention",
    "visible_keys",
]
