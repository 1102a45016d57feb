"""The architecture of a decoder as data: every model family is a choice of these fields.

Fields are named as in Hugging Face's `config.json`. Properties that `transformers` fixes in the
code of a family (biases, query and key norms, extra norms) are fields, too.
"""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from fireopd_jax.config import config
from fireopd_jax.models.rope import LinearRope, Llama3Rope, RopeScaling, YarnRope

Family = Literal[
    "qwen3", "qwen3_moe", "qwen2", "llama", "smollm3", "mistral", "ministral", "gemma3_text"
]
# No model is larger; a misprint, or a stranger's file, must not be counted to or allocated.
Size = Annotated[int, Field(gt=0, le=2**24)]
MOST_LAYERS = 2**12
Layers = Annotated[int, Field(gt=0, le=MOST_LAYERS)]
LayerType = Literal["full_attention", "sliding_attention"]


@config
class MoEConfig:
    """A mixture of experts in place of the MLP of every layer."""

    num_experts: Size = 8
    """Experts in each layer."""
    num_experts_per_tok: PositiveInt = 2
    """Experts that each token is routed to."""
    moe_intermediate_size: Size = 128
    """Width of each expert's gated MLP."""
    norm_topk_prob: bool = True
    """Renormalise the probabilities of the chosen experts to sum to one."""

    @model_validator(mode="after")
    def check_experts(self):
        """Raise ValueError if tokens are routed to more experts than there are."""
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than "
                f"num_experts={self.num_experts}"
            )
        return self


@dataclasses.dataclass(frozen=True)
class AttentionKind:
    """A layer type: window and RoPE, all that layers may differ in besides their parameters."""

    window: int | None
    theta: float | None
    """Base of RoPE; None: no RoPE, the layer knows positions by its mask alone."""
    scaling: LinearRope | Llama3Rope | YarnRope | None


@config
class DecoderConfig:
    """Architecture of a model, with the names of Hugging Face's `config.json`."""

    model_type: Family = "qwen3"
    """Model family of Hugging Face that the model is exported as."""
    vocab_size: Size | None = None
    """Rows of the embedding and of the head; by default the size of the tokenizer."""
    hidden_size: Size = 128
    """Width of the residual stream."""
    num_hidden_layers: Layers = 3
    """Decoder layers."""
    num_attention_heads: Size = 4
    """Query heads."""
    num_key_value_heads: Size = 2
    """Key and value heads; divides the query heads."""
    head_dim: Size = 32
    """Width of a head; even."""
    intermediate_size: Size = 384
    """Width of the gated MLP."""
    hidden_act: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    """Activation of the gate."""
    moe: MoEConfig | None = None
    """Mixture of experts in place of the MLP; null: a plain MLP."""
    attention_bias: bool = False
    """The query, key and value projections have a bias."""
    attention_output_bias: bool = False
    """The output projection of attention has a bias."""
    mlp_bias: bool = False
    """The linear maps of the MLP have a bias."""
    qk_norm: bool = True
    """Queries and keys pass an RMS norm before RoPE."""
    query_pre_attn_scalar: PositiveFloat | None = None
    """Attention scores are divided by its square root; by default head_dim."""
    rope_theta: PositiveFloat = 10000.0
    """Base (theta) of RoPE."""
    rope_scaling: RopeScaling | None = None
    """Scaling of RoPE for longer texts; null: none."""
    rope_local_theta: PositiveFloat | None = None
    """Base of RoPE in sliding layers, then without scaling; by default as in other layers."""
    sliding_window: PositiveInt | None = None
    """Tokens that a sliding layer attends to, the current one included; null: no sliding layers."""
    layer_types: tuple[LayerType, ...] | None = None
    """Attention type of each layer; by default all slide if sliding_window is given."""
    no_rope_layers: tuple[Literal[0, 1], ...] | None = None
    """For each layer 1 with RoPE, 0 without; null: every layer has it."""
    max_position_embeddings: PositiveInt | None = None
    """Longest text that the model supports, in tokens; null: any."""
    rms_norm_eps: PositiveFloat = 1e-6
    """Added to the mean square in RMS norms."""
    zero_centered_norms: bool = False
    """RMS norms multiply by 1 + w instead of w."""
    post_norms: bool = False
    """The outputs of attention and MLP pass an RMS norm, too."""
    scale_embeddings: bool = False
    """Embeddings are multiplied by sqrt(hidden_size)."""
    tie_word_embeddings: bool = True
    """The head matrix is the embedding matrix."""
    final_logit_softcapping: PositiveFloat | None = None
    """Logits z become c tanh(z / c) with this c; null: no softcapping."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the forward and backward pass; statistics and losses are float32."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the parameters."""

    @model_validator(mode="after")
    def check_heads(self):
        """Raise ValueError for head counts, layer types or windows that contradict each other."""
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
        if self.no_rope_layers is not None and len(self.no_rope_layers) != self.num_hidden_layers:
            raise ValueError(
                f"no_rope_layers names {len(self.no_rope_layers)} layers, num_hidden_layers is "
                f"{self.num_hidden_layers}"
            )
        if self.rope_local_theta is not None and self.sliding_window is None:
            raise ValueError("rope_local_theta has no effect without sliding_window")
        return self

    @property
    def kinds(self) -> tuple[AttentionKind, ...]:
        """Layer type of each layer."""
        plain = "full_attention" if self.sliding_window is None else "sliding_attention"
        types = self.layer_types or (plain,) * self.num_hidden_layers
        full = AttentionKind(None, self.rope_theta, self.rope_scaling)
        sliding = dataclasses.replace(full, window=self.sliding_window)
        if self.rope_local_theta is not None:
            sliding = AttentionKind(self.sliding_window, self.rope_local_theta, None)
        kinds = [sliding if kind == "sliding_attention" else full for kind in types]
        turned = self.no_rope_layers or (1,) * self.num_hidden_layers
        return tuple(
            kind if turns else dataclasses.replace(kind, theta=None, scaling=None)
            for kind, turns in zip(kinds, turned, strict=True)
        )
