"""The supported model families of Hugging Face, and a reader of their `config.json`.

config.json -> its family -> Reader: values with the family's defaults -> errors that name keys
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fireopd_jax.config import UserError, nearest
from fireopd_jax.models.architecture import DecoderConfig, Family
from fireopd_jax.models.hf_keys import is_off, objection

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
SLIDING = PLAIN | {"sliding_window": 4096}
GEMMA = {"zero_centered_norms": True, "post_norms": True, "scale_embeddings": True}
WINDOWS = frozenset({"use_sliding_window", "max_window_layers", "layer_types", "sliding_window"})
BIASES = frozenset({"attention_bias", "mlp_bias"})
MOE_KEYS = frozenset({"num_experts", "num_local_experts", "num_experts_per_tok",
                      "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step",
                      "mlp_only_layers"})  # fmt: skip
GEMMA_KEYS = frozenset({"hidden_activation", "query_pre_attn_scalar", "sliding_window",
                        "layer_types", "sliding_window_pattern", "_sliding_window_pattern",
                        "rope_local_base_freq", "final_logit_softcapping",
                        "attention_bias"})  # fmt: skip

FORMS = (
    Form("qwen3", "Qwen3ForCausalLM", {"qk_norm": True}, SLIDING | {"head_dim": 128},
         WINDOWS | {"attention_bias"}),
    Form("qwen3_moe", "Qwen3MoeForCausalLM", {"qk_norm": True}, SLIDING,
         MOE_KEYS | {"attention_bias", "use_sliding_window", "sliding_window",
                     "max_window_layers"}),
    Form("qwen2", "Qwen2ForCausalLM", {"qk_norm": False}, SLIDING, WINDOWS),
    Form("llama", "LlamaForCausalLM", {"qk_norm": False}, PLAIN, BIASES),
    Form("smollm3", "SmolLM3ForCausalLM", {"qk_norm": False},
         {"rope_theta": 2e6, "tie_word_embeddings": True},
         BIASES | {"use_sliding_window", "sliding_window", "layer_types", "no_rope_layers",
                   "no_rope_layer_interval"}),
    Form("mistral", "MistralForCausalLM", {"qk_norm": False}, SLIDING,
         frozenset({"sliding_window", "layer_types"})),
    Form("ministral", "MinistralForCausalLM", {"qk_norm": False}, SLIDING,
         frozenset({"sliding_window", "layer_types"})),
    Form("gemma3_text", "Gemma3ForCausalLM", {"qk_norm": True, **GEMMA},
         {"rope_theta": 1e6, "tie_word_embeddings": True, "head_dim": 256,
          "sliding_window": 4096}, GEMMA_KEYS),
)  # fmt: skip

COMMON = frozenset({
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "intermediate_size", "hidden_act", "rms_norm_eps",
    "tie_word_embeddings", "max_position_embeddings", "rope_theta", "rope_scaling",
    "rope_parameters", "torch_dtype", "dtype", "architectures", "model_type",
})  # fmt: skip
LARGEST = 1e300
"""A number beyond this is none of a model."""
SHOWN = 80
"""Characters of a value in an error."""


@dataclasses.dataclass(frozen=True)
class IgnoredKeys:
    """Keys of a `config.json` that the user wants ignored, though they could change logits."""

    keys: Sequence[str] = ()
    setting: str = "ignore_config_keys"
    """Where the user gives them: "student.ignore_config_keys", or an option of a command."""

    def remedy(self, key: str) -> str:
        """Return what to set so that one more key is ignored."""
        if self.setting.startswith("--"):
            return f"{self.setting} {','.join([*self.keys, key])}"
        return f"{self.setting}=[{', '.join([*self.keys, key])}]"


NONE_IGNORED = IgnoredKeys()


class Reader:
    """The values of one `config.json`, with the defaults of its family."""

    def __init__(self, values: Json, source: str, ignored: IgnoredKeys = NONE_IGNORED):
        self.source, self.ignored = source, ignored
        # `transformers` writes null for a default.
        self.nulls = {key for key, value in values.items() if value is None}
        self.values = {key: value for key, value in values.items() if value is not None}
        self.form = self._form()
        self._check_ignored()

    def error(self, key: str, message: str) -> UserError:
        """Return an error that names file and key."""
        return UserError(f"{self.source}: {key}: {message}")

    def _form(self) -> Form:
        named = self.listed("architectures", self.values.get("architectures") or [])
        kind = self.values.get("model_type")
        if not named and kind is None:
            raise self.error("model_type", "missing; expected a family, such as qwen3 or llama")
        fitting = [form for form in FORMS if named in ([], [form.architecture])]
        if not fitting:
            supported = ", ".join(form.architecture for form in FORMS)
            shown = ", ".join(map(str, named))
            raise self.error(
                "architectures", f"{shown} is not supported; supported are {supported}"
            )
        form = next((form for form in fitting if kind in (None, form.model_type)), None)
        if form is None:
            expected = ", ".join(form.model_type for form in fitting)
            raise self.error("model_type", f"{_short(kind)} is not supported; expected {expected}")
        return form

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, else the family's default, else `default`."""
        return self.values.get(key, self.form.defaults.get(key, default))

    def need(self, key: str) -> Any:
        """Return the value of a key; raise UserError if it is absent."""
        if key not in self.values:
            raise self.error(key, "missing; expected a value for it")
        return self.values[key]

    def integer(self, key: str) -> int:
        """Return a number of the architecture; raise UserError if it is absent or none."""
        value = self.need(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(key, f"expected a whole number of 1 or more (it is {value!r})")
        return value

    def whole(self, key: str, default: int, least: int = 1) -> int:
        """Return a whole number that has a default; raise UserError for another value."""
        value = self.get(key, default)
        if type(value) is not int or value < least:
            raise self.error(key, f"expected a whole number of {least} or more (it is {value!r})")
        return value

    def positive(self, key: str, value: Any) -> float:
        """Return the value of a key as a number above 0; raise UserError for another value."""
        if type(value) not in (int, float) or not 0 < value < LARGEST:
            raise self.error(key, f"expected a number above 0 (it is {_short(value)})")
        return float(value)

    def listed(self, key: str, value: Any) -> list[Any]:
        """Return the value of a key as a list; raise UserError for another value."""
        if not isinstance(value, list):
            raise self.error(key, f"expected a list (it is {_short(value)})")
        return value

    def table(self, key: str) -> dict[str, Any]:
        """Return an object without its nulls; {} where the file has none."""
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            raise self.error(key, f"expected an object (it is {value!r})")
        return {name: each for name, each in value.items() if each is not None}

    def refuse_others(self, config: DecoderConfig) -> None:
        """Raise UserError for the first key that is not used and could change the computation."""
        for key, value in self.values.items():
            if key in self.known or key in self.ignored.keys:
                continue
            if reason := objection(key, value, config, self.known):
                raise self.refusal(key, value, reason)

    def refuse_parts(self, key: str, given: Json, known: Sequence[str], what: str) -> None:
        """Raise UserError for a part of an object that is neither known nor neutral."""
        for part, value in given.items():
            name = f"{key}.{part}"
            if part in known or name in self.ignored.keys or is_off(part, value, None):
                continue
            raise self.refusal(name, value, f"unknown with {what}{nearest(part, known)}")

    def refusal(self, key: str, value: Any, reason: str) -> UserError:
        """Return the error for a key that could change the computation, with the way around it."""
        return self.error(
            key,
            f"{reason} (it is {_short(value)}); to load the model without this "
            f"key, give {self.ignored.remedy(key)}",
        )

    @property
    def known(self) -> frozenset[str]:
        """The keys that the family's architecture is read from."""
        return COMMON | self.form.keys

    def _check_ignored(self) -> None:
        """Raise UserError for a key to ignore that the file lacks, or that is used."""
        for key in self.ignored.keys:
            name, _, part = key.partition(".")
            inner = self.values.get(name)
            nested = bool(part) and isinstance(inner, Mapping) and part in inner
            if key not in self.values and key not in self.nulls and not nested:
                raise UserError(
                    f"{self.ignored.setting}: {self.source} has no key {key!r}"
                    f"{nearest(key, self.values)}; expected keys of that file"
                )
            if key in self.known:
                raise UserError(
                    f"{self.ignored.setting}: {key!r} is used: a {self.form.model_type} model is "
                    f"computed by it, so {self.source} is not read without it"
                )


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
