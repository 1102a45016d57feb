"""Attention of training, scoring and prefill (`attention`), and over cached slots (`attend`).

    q, k, v, segments -> guard -> reference | chunked | splash | triton -> guard -> output

`attention` is causal self-attention among the tokens of packed rows; its implementations but
`reference` need memory linear in the length. `attend` is masked attention over given keys.
"""

from fireopd_jax.ops.attention.api import attention
from fireopd_jax.ops.attention.dispatch import IMPLEMENTATIONS, KERNELS, PLAIN, PLATFORMS
from fireopd_jax.ops.attention.settings import AttentionBlocks
from fireopd_jax.ops.attention.slots import attend

__all__ = [
    "IMPLEMENTATIONS",
    "KERNELS",
    "PLAIN",
    "PLATFORMS",
    "AttentionBlocks",
    "attend",
    "attention",
]
