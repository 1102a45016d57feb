"""The supported model families of Hugging Face, and a reader that rejects unknown keys.

config.json -> its family -> every key is used, ignored as harmless, or an error that names it
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fireopd_jax.config import UserError, nearest
from fireopd_jax.models.architecture import Family

Json = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Form:
    """A model family: what `transformers` fixes in code, and its defaults for absent keys."""

    model_type: Family
    architecture: str
    fixed: Mapping[str, Any]
    defaults: Mapping[str, Any]
    keys: frozenset[str] = frozenset()
    """Keys of config.json besides those that all families have."""


PLAIN = {"rope_theta": 10000.0, "tie_word_embeddings": False}
GEMMA = {"zero_centered_norms": True, "post_norms": True, "scale_embeddings": True}
WINDOWS = frozenset({"use_sliding_window", "max_window_layers", "layer_types", "sliding_window"})
MOE_KEYS = frozenset({"num_experts", "num_local_experts", "num_experts_per_tok",
                      "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step",
                      "mlp_only_layers"})  # fmt: skip
GEMMA_KEYS = frozenset({"hidden_activation", "query_pre_attn_scalar", "sliding_window",
                        "layer_types", "sliding_window_pattern", "_sliding_window_pattern",
                        "rope_local_base_freq", "final_logit_softcapping",
                        "attention_bias"})  # fmt: skip

FORMS = (
    Form("qwen3", "Qwen3ForCausalLM", {"qk_norm": True}, PLAIN | {"head_dim": 128},
         WINDOWS | {"attention_bias"}),
    Form("qwen3_moe", "Qwen3MoeForCausalLM", {"qk_norm": True}, PLAIN,
         MOE_KEYS | {"attention_bias", "use_sliding_window", "sliding_window",
                     "max_window_layers"}),
    Form("qwen2", "Qwen2ForCausalLM", {"qk_norm": False}, PLAIN, WINDOWS),
    Form("llama", "LlamaForCausalLM", {"qk_norm": False}, PLAIN,
         frozenset({"attention_bias", "mlp_bias"})),
    Form("mistral", "MistralForCausalLM", {"qk_norm": False}, PLAIN,
         frozenset({"sliding_window", "layer_types"})),
    Form("gemma3_text", "Gemma3ForCausalLM", {"qk_norm": True, **GEMMA},
         {"rope_theta": 1e6, "tie_word_embeddings": True, "head_dim": 256}, GEMMA_KEYS),
)  # fmt: skip

COMMON = frozenset({
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "intermediate_size", "hidden_act", "rms_norm_eps",
    "tie_word_embeddings", "max_position_embeddings", "rope_theta", "rope_scaling",
    "rope_parameters", "torch_dtype", "dtype", "architectures", "model_type",
})  # fmt: skip
# Keys that do not change the results of a forward pass without dropout.
HARMLESS = frozenset({
    "transformers_version", "_name_or_path", "name_or_path", "use_cache", "initializer_range",
    "bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp", "_attn_implementation",
    "_attn_implementation_autoset", "attn_implementation", "cache_implementation",
    "output_router_logits", "router_aux_loss_coef", "return_dict", "output_attentions",
    "output_hidden_states", "chunk_size_feed_forward", "id2label", "label2id", "problem_type",
    "tokenizer_class", "tie_encoder_decoder", "unsloth_fixed", "unsloth_version", "model_name",
    "max_window_layers",
})  # fmt: skip
# Keys of which one value only is supported.
ONLY = {
    "attention_dropout": 0,
    "attn_logit_softcapping": None,
    "use_bidirectional_attention": False,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "partial_rotary_factor": 1,
}
REASONS = {
    "quantization_config": "quantised checkpoints are not supported; use the original one",
    "auto_map": "code in a model folder is never run",
    "vision_config": "only text models are supported",
}


class Reader:
    """The values of one `config.json`, with the defaults of its family."""

    def __init__(self, values: Json, source: str):
        self.source = source
        # `transformers` writes null for a default.
        self.nulls = {key for key, value in values.items() if value is None}
        self.values = {key: value for key, value in values.items() if value is not None}
        self.form = self._form()

    def error(self, key: str, message: str) -> UserError:
        """Return an error that names file and key."""
        return UserError(f"{self.source}: {key}: {message}")

    def _form(self) -> Form:
        supported = ", ".join(form.architecture for form in FORMS)
        named = self.values.get("architectures") or []
        for form in FORMS:
            if named == [form.architecture]:
                if self.values.get("model_type", form.model_type) != form.model_type:
                    break
                return form
            if not named and self.values.get("model_type") == form.model_type:
                return form
        shown = ", ".join(map(str, named)) or self.values.get("model_type", "none is named")
        raise UserError(
            f"{self.source}: architectures: {shown} is not supported; supported are {supported}"
        )

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, else the family's default, else `default`."""
        return self.values.get(key, self.form.defaults.get(key, default))

    def need(self, key: str) -> Any:
        """Return the value of a key; raise UserError if it is absent."""
        if key not in self.values:
            raise self.error(key, "missing; expected a value for it")
        return self.values[key]

    def refuse_others(self) -> None:
        """Raise UserError for the first key that is neither used nor harmless."""
        known = COMMON | self.form.keys
        for key, value in self.values.items():
            if key in known or key in HARMLESS:
                continue
            if key in ONLY:
                if value != ONLY[key]:
                    raise self.error(
                        key, f"only {ONLY[key] if ONLY[key] is not None else 'null'} is supported "
                        f"(it is {value!r})",
                    )  # fmt: skip
                continue
            if key in REASONS:
                raise self.error(key, REASONS[key])
            raise self.error(
                key,
                f"unknown in a {self.form.model_type} model{nearest(key, known)}; it could change "
                f"what the model computes, so it is refused (it is {value!r})",
            )
