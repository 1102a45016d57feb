"""The architecture of a decoder as data: every family is a choice of these fields.

The names are those of Hugging Face's `config.json`; what a family fixes in code there (biases,
normalised queries, extra norms) is a field here.
"""

import dataclasses
from typing import Literal

from pydantic import PositiveFloat, PositiveInt, model_validator

from fireopd_jax.config import config
from fireopd_jax.models.rope import LinearRope, Llama3Rope, RopeScaling, YarnRope

Family = Literal["qwen3", "qwen3_moe", "qwen2", "llama", "mistral", "gemma3_text"]
LayerType = Literal["full_attention", "sliding_attention"]


@config
class MoEConfig:
    """A mixture of experts in the place of every MLP."""

    num_experts: PositiveInt = 8
    """Experts of a layer."""
    num_experts_per_tok: PositiveInt = 2
    """Experts that a token is sent to."""
    moe_intermediate_size: PositiveInt = 128
    """Width of an expert's gated MLP."""
    norm_topk_prob: bool = True
    """The probabilities of the chosen experts sum to one."""

    @model_validator(mode="after")
    def check_experts(self):
        """Refuse to choose more experts than there are."""
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than "
                f"num_experts={self.num_experts}"
            )
        return self


@dataclasses.dataclass(frozen=True)
class AttentionKind:
    """What layers may differ in, besides their parameters."""

    window: int | None
    theta: float
    scaling: LinearRope | Llama3Rope | YarnRope | None


@config
class DecoderConfig:
    """Architecture of an embedded model, in the names of Hugging Face's `config.json`."""

    model_type: Family = "qwen3"
    """Family that the model is exported as."""
    vocab_size: PositiveInt | None = None
    """Rows of the embedding and of the head; by default the tokenizer's size."""
    hidden_size: PositiveInt = 128
    """Width of the residual stream."""
    num_hidden_layers: PositiveInt = 3
    """Decoder layers."""
    num_attention_heads: PositiveInt = 4
    """Query heads."""
    num_key_value_heads: PositiveInt = 2
    """Key and value heads; divides the query heads."""
    head_dim: PositiveInt = 32
    """Width of a head; even."""
    intermediate_size: PositiveInt = 384
    """Width of the gated MLP."""
    hidden_act: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    """Activation of the gate."""
    moe: MoEConfig | None = None
    """Experts in the place of the MLP; null is none."""
    attention_bias: bool = False
    """Queries, keys and values have a bias."""
    attention_output_bias: bool = False
    """The output of attention has a bias."""
    mlp_bias: bool = False
    """The MLP's maps have a bias."""
    qk_norm: bool = True
    """Queries and keys are normalised before their rotation."""
    query_pre_attn_scalar: PositiveFloat | None = None
    """Scores are divided by its root; by default head_dim."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary embedding."""
    rope_scaling: RopeScaling | None = None
    """Stretching of the rotary embedding to longer texts; null is none."""
    rope_local_theta: PositiveFloat | None = None
    """Base in sliding layers, which are not stretched then; by default as in the others."""
    sliding_window: PositiveInt | None = None
    """Tokens that a sliding layer sees, itself included; null: every layer sees all."""
    layer_types: tuple[LayerType, ...] | None = None
    """Kind of each layer; by default all slide where sliding_window is given."""
    max_position_embeddings: PositiveInt | None = None
    """Longest text that the model is made for; null is any."""
    rms_norm_eps: PositiveFloat = 1e-6
    """Added to the mean square before its root."""
    zero_centered_norms: bool = False
    """Norms multiply by 1 + w instead of w."""
    post_norms: bool = False
    """What attention and MLP give is normalised too."""
    scale_embeddings: bool = False
    """Embeddings are multiplied by the root of the width."""
    tie_word_embeddings: bool = True
    """The head is the embedding."""
    final_logit_softcapping: PositiveFloat | None = None
    """Logits are bent by c tanh(z / c); null is not."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; statistics and losses are float32."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that the parameters are kept in."""

    @model_validator(mode="after")
    def check_heads(self):
        """Refuse head counts and widths that no attention can have, and windows without use."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads "
                f"({self.num_key_value_heads} does not divide {self.num_attention_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (it is {self.head_dim})")
        if self.layer_types is not None:
            if len(self.layer_types) != self.num_hidden_layers:
                raise ValueError(
                    f"layer_types names {len(self.layer_types)} layers, num_hidden_layers is "
                    f"{self.num_hidden_layers}"
                )
            if ("sliding_attention" in self.layer_types) != (self.sliding_window is not None):
                raise ValueError(
                    "layer_types has sliding layers if and only if sliding_window is given"
                )
        if self.rope_local_theta is not None and self.sliding_window is None:
            raise ValueError("rope_local_theta has no effect without sliding_window")
        return self

    @property
    def kinds(self) -> tuple[AttentionKind, ...]:
        """Tell the kind of each layer."""
        plain = "full_attention" if self.sliding_window is None else "sliding_attention"
        types = self.layer_types or (plain,) * self.num_hidden_layers
        full = AttentionKind(None, self.rope_theta, self.rope_scaling)
        sliding = dataclasses.replace(full, window=self.sliding_window)
        if self.rope_local_theta is not None:
            sliding = AttentionKind(self.sliding_window, self.rope_local_theta, None)
        return tuple(sliding if kind == "sliding_attention" else full for kind in types)
