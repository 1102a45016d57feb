"""Keys of config.json that no family reads: what cannot change the computation loads."""

import pytest

from fireopd_jax.config import UserError
from fireopd_jax.models.architecture import DecoderConfig
from fireopd_jax.models.hf_config import architecture
from fireopd_jax.models.hf_forms import FORMS, IgnoredKeys
from fireopd_jax.models.hf_keys import COMPUTED, is_elsewhere
from tests.models.published import FULL, PUBLISHED

SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
}
MORE = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    "mistral": {"sliding_window": 3},
}


def values(family, **more):
    form = next(form for form in FORMS if form.model_type == family)
    named = {"architectures": [form.architecture], "model_type": family}
    return named | SIZES | MORE.get(family, {}) | more


def read(family, ignored=(), **more):
    keys = IgnoredKeys(ignored, "student.ignore_config_keys")
    return architecture(values(family, **more), "m/config.json", keys)


def refusal(family, ignored=(), **more):
    with pytest.raises(UserError) as caught:
        read(family, ignored, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_load_as_they_are(name):
    given = PUBLISHED[name]
    config = architecture(given, name)
    assert config.hidden_size == given["hidden_size"] and config.dtype == "bfloat16"
    assert config.head_dim == given.get(
        "head_dim", given["hidden_size"] // given["num_attention_heads"]
    )


@pytest.mark.parametrize(
    ("name", "windows", "turned"),
    [
        ("mistralai/Mistral-7B-v0.1", [4096] * 4, [True] * 4),
        ("mistralai/Mistral-7B-Instruct-v0.3", [None] * 4, [True] * 4),
        ("mistralai/Ministral-8B-Instruct-2410", [None] + [32768] * 3, [True] * 4),
        ("HuggingFaceTB/SmolLM3-3B", [None] * 4, [True] * 3 + [False]),
        ("Qwen/Qwen2.5-7B", [None] * 4, [True] * 4),
        ("google/gemma-3-270m-it", [512] * 4, [True] * 4),
        ("google/gemma-3-1b-it", [512] * 4, [True] * 4),
    ],
)
def test_layers_of_published_models(name, windows, turned):
    kinds = architecture(PUBLISHED[name], name).kinds
    assert [kind.window for kind in kinds[:4]] == windows
    assert [kind.theta is not None for kind in kinds[:4]] == turned
    if "gemma" in name:
        assert kinds[5].window is None and (kinds[0].theta, kinds[5].theta) == (1e4, 1e6)


def test_yarn_of_qwen3_as_its_model_card_gives_it():
    given = PUBLISHED["Qwen/Qwen3-8B"] | {"rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}  # fmt: skip
    config = architecture(given, "x")
    scaling = config.rope_scaling
    assert (scaling.factor, scaling.original_max_position_embeddings) == (4.0, 32768)
    # The card leaves max_position_embeddings at 40960.
    assert (given["max_position_embeddings"], config.max_position_embeddings) == (40960, 131072)


NEUTRAL = [
    ("qwen2", "use_mrope", False),
    ("qwen2", "qkv_bias", True),
    ("llama", "is_llama_config", True),
    ("llama", "rope_interleaved", False),
    ("llama", "use_qk_norm", False),
    ("llama", "qkv_bias", False),
    ("llama", "transformers.js_config", {"dtype": "q4"}),
    ("llama", "onnx_config", {"opset": 14}),
    ("llama", "_anything", 7),
    ("llama", "attention_dropout", 0.1),
    ("llama", "resid_pdrop", 0.1),
    ("llama", "image_token_id", 9),
    ("llama", "z_loss_weight", 1e-4),
    ("llama", "head_bias", False),
    ("llama", "attention_multiplier", 0.5),  # 1 / sqrt(4), what is computed
    ("llama", "logits_scaling", 1),
    ("llama", "residual_multiplier", 1.0),
    ("llama", "layer_types", [FULL] * 4),
    ("llama", "original_max_position_embeddings", 2048),
    ("llama", "num_experts", 0),
    ("llama", "partial_rotary_factor", 1.0),
    ("llama", "is_decoder", True),
    ("llama", "seq_aux", True),
    ("llama", "use_fused_rmsnorm", True),
    ("llama", "use_rope_scaling", False),
    ("llama", "rope_ratio", 1),
    ("llama", "no_such_key", None),
    ("llama", "no_such_key", False),
    ("llama", "no_such_key", 0),
    ("llama", "no_such_key", []),
    ("llama", "no_such_key", {}),
    ("llama", "no_such_key", ""),
    ("qwen3", "use_qk_norm", True),
    ("qwen3_moe", "use_qk_norm", True),
    ("qwen3_moe", "shared_expert_intermediate_size", 0),
    ("qwen3_moe", "n_shared_experts", 0),
    ("mistral", "attention_bias", False),
    ("mistral", "use_sliding_window", True),
    ("gemma3_text", "embedding_multiplier", 4.0),  # sqrt(16), what Gemma computes
    ("gemma3_text", "attn_logit_softcapping", None),
]


@pytest.mark.parametrize(("family", "key", "value"), NEUTRAL)
def test_keys_that_change_nothing_load(family, key, value):
    assert read(family, **{key: value}) == read(family)


HARMFUL = [
    ("qwen3", "use_qk_norm", False, "a qwen3 model is computed as with True"),
    ("llama", "use_qk_norm", True, "as with False"),
    ("qwen2", "qkv_bias", False, "as with True"),
    ("llama", "attention_multiplier", 0, "as with 0.5"),
    ("llama", "attention_multiplier", 0.0078125, "as with 0.5"),
    ("llama", "logits_scaling", 0, "as with 1"),
    ("llama", "logits_scaling", 8.0, "as with 1"),
    ("llama", "embedding_multiplier", 0, "as with 1"),
    ("llama", "attn_logit_softcapping", 0, "is computed without it"),
    ("gemma3_text", "attn_logit_softcapping", 50.0, "is computed without it"),
    ("llama", "clip_qkv", 0, "is computed without it"),
    ("llama", "key_multiplier", 0, "unknown in a llama model"),
    ("llama", "use_rope", False, "as with True"),
    ("llama", "use_rmsnorm", False, "as with True"),
    ("llama", "use_block_norm", False, "unknown in a llama model"),
    ("llama", "is_causal", False, "as with True"),
    ("llama", "rope_interleaved", True, "as with False"),
    ("llama", "use_mrope", True, "unknown in a llama model"),
    ("llama", "num_experts", 8, "as with 0"),
    ("llama", "sliding_window", 4096, "is computed without it"),
    ("llama", "is_llama_config", False, "as with True"),
    ("llama", "layer_types", [FULL, FULL, FULL, "sliding_attention"], "as with"),
    ("mistral", "use_window_layers", False, "unknown in a mistral model"),
    ("mistral", "use_sliding_window", False, "as with True"),
    ("qwen2", "dense_bias", False, "unknown in a qwen2 model"),
    ("qwen3_moe", "shared_expert_intermediate_size", 512, "unknown in a qwen3_moe model"),
    ("gemma3_text", "use_bidirectional_attention", True, "as with False"),
    ("gemma3_text", "scale_embeddings", False, "as with True"),
    ("llama", "text_config", {"hidden_size": 4}, "unknown in a llama model"),
    ("llama", "auto_map", {"AutoModel": "x.Y"}, "code in a model folder is never run"),
]


@pytest.mark.parametrize(("family", "key", "value", "reason"), HARMFUL)
def test_keys_that_could_change_the_computation_are_refused_with_the_way_around(
    family, key, value, reason
):
    message = refusal(family, **{key: value})
    assert message.startswith(f"m/config.json: {key}: ") and reason in message, message
    assert f"(it is {value!r})" in message
    assert message.endswith(f"give student.ignore_config_keys=[{key}]")
    assert read(family, [key], **{key: value}) == read(family)


def test_a_known_length_before_scaling_is_compared():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert read("qwen3", rope_scaling=scaling, original_max_position_embeddings=64)
    message = refusal("qwen3", rope_scaling=scaling, original_max_position_embeddings=32)
    assert "original_max_position_embeddings: a qwen3 model is computed as with 64" in message


def test_parts_of_the_scaling_are_judged_too():
    scaling = {"type": "linear", "factor": 2.0, "finetuned": True, "something": None, "more": False}
    assert read("llama", rope_scaling=scaling).rope_scaling.factor == 2.0
    scaling |= {"colour": 1}
    message = refusal("llama", rope_scaling=scaling)
    assert "rope_scaling.colour: unknown with rope_type linear (it is 1)" in message
    assert message.endswith("give student.ignore_config_keys=[rope_scaling.colour]")
    assert read("llama", ["rope_scaling.colour"], rope_scaling=scaling).rope_scaling.factor == 2.0


def test_keys_to_ignore_must_be_in_the_file_and_unused():
    message = refusal("llama", ["use_mrop"], use_mrope=True)
    assert message.startswith("student.ignore_config_keys: m/config.json has no key 'use_mrop'")
    assert "did you mean 'use_mrope'?" in message
    assert "no key 'rope_scaling.x'" in refusal("llama", ["rope_scaling.x"])
    message = refusal("llama", ["rope_theta"], rope_theta=1e4)
    assert "'rope_theta' is used: a llama model is computed by it" in message
    assert read("llama", ["use_mrope"], use_mrope=None) == read("llama")


def test_the_way_around_keeps_the_keys_already_given():
    message = refusal("llama", ["use_mrope"], use_mrope=True, kv_lora_rank=3)
    assert message.endswith("student.ignore_config_keys=[use_mrope, kv_lora_rank]")
    option = IgnoredKeys(("a",), "--ignore-config-keys")
    assert option.remedy("b") == "--ignore-config-keys a,b"


def test_settings_of_generation_are_those_of_transformers():
    generation = pytest.importorskip("transformers").GenerationConfig().to_dict()
    changed = [key for key in generation if not key.startswith("_")]
    assert len(changed) > 40
    assert [key for key in changed if not is_elsewhere(key, 0.5)] == []


@pytest.mark.parametrize("key", sorted(COMPUTED))
def test_every_known_meaning_has_a_value_of_the_right_kind(key):
    """A meaning must not accept a value of another JSON type, such as 1 for true."""
    for family in ("llama", "qwen3_moe", "gemma3_text"):
        accepted = COMPUTED[key](read(family))
        assert all(type(each) in (bool, int, float, str, list, object) for each in accepted)


def test_an_embedded_architecture_can_have_layers_without_rope():
    config = DecoderConfig(num_hidden_layers=2, no_rope_layers=(1, 0))
    assert [kind.theta for kind in config.kinds] == [1e4, None]
    with pytest.raises(ValueError, match="no_rope_layers names 1 layers"):
        DecoderConfig(num_hidden_layers=2, no_rope_layers=(1,))
