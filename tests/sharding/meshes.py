"""Meshes of eight devices, models to be sharded over them, and how near two trees are."""

import jax
import numpy as np

from fireopd_jax.models.architecture import MoEConfig
from tests.cases import tiny_model

MESHES = {
    "fsdp": {"fsdp": 8},
    "data": {"data": 8},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
    "tensor": {"data": 2, "tensor": 4},
}
BIASES = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
EXPERTS = MoEConfig(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8)
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
"""Of which four devices have one each, and two of them one key head."""
MODELS = {
    "dense": tiny_model(num_hidden_layers=2, **HEADS, **BIASES),
    "experts": tiny_model(num_hidden_layers=2, **HEADS, moe=EXPERTS),
    # `tensor` divides neither heads, MLP nor token ids.
    "odd": tiny_model(
        31, num_hidden_layers=2, intermediate_size=25, num_attention_heads=3,
        tie_word_embeddings=False, **BIASES,
    ),
    "windows": tiny_model(
        num_hidden_layers=2, sliding_window=3, layer_types=("sliding_attention", "full_attention"),
        post_norms=True, zero_centered_norms=True, scale_embeddings=True,
        final_logit_softcapping=4.0, tie_word_embeddings=True, **HEADS,
    ),
}  # fmt: skip
MODEL = MODELS["dense"]


def assert_close(found, wanted, bound):
    """Check the leaves of two trees, each to a part of its largest element."""
    pairs = zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True)
    for (path, one), other in pairs:
        one, other = np.asarray(one), np.asarray(other)
        assert np.abs(one - other).max() <= bound * np.abs(other).max(), path
