"""config.json: both spellings, each family's rules, and errors that name file and key."""

import pytest

from fireopd_jax.config import UserError
from fireopd_jax.models.architecture import DecoderConfig, MoEConfig
from fireopd_jax.models.hf_config import architecture, hf_config_json
from fireopd_jax.models.hf_forms import FORMS
from fireopd_jax.models.rope import LinearRope, Llama3Rope, YarnRope

SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "rms_norm_eps": 1e-5,
}
NAMES = {form.model_type: form.architecture for form in FORMS}
FULL, SLIDING = "full_attention", "sliding_attention"
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}


def values(family, **more):
    extra = {"gemma3_text": {"sliding_window": 6}, "qwen3_moe": EXPERTS}.get(family, {})
    return {"architectures": [NAMES[family]], "model_type": family} | SIZES | extra | more


def read(family, **more):
    return architecture(values(family, **more), "folder/config.json")


def refusal(family, **more):
    with pytest.raises(UserError) as caught:
        read(family, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "theta", "scaling"),
    [
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
         {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}, 5e5, Llama3Rope(**LLAMA3)),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_type": "linear", "factor": 2},
         1e4, LinearRope(factor=2.0)),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 32},
         {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 1e4,
         YarnRope(factor=4.0, original_max_position_embeddings=32)),
        ({}, {}, 1e4, None),
    ],
)  # fmt: skip
def test_both_spellings_of_the_rotation(old, new, theta, scaling):
    for spelling in (old, {"rope_parameters": new}):
        config = read("llama", **spelling)
        assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


def test_mscale_becomes_the_factor_of_attention():
    given = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8,
             "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip
    assert read("qwen3", rope_scaling=given).rope_scaling.attention_factor == 1.0


@pytest.mark.parametrize(
    ("key", "name", "type_"),
    [("torch_dtype", "bfloat16", "bfloat16"), ("dtype", "bfloat16", "bfloat16"),
     ("torch_dtype", "torch.bfloat16", "bfloat16"), ("dtype", "float16", "float32"),
     ("torch_dtype", "float32", "float32")],
)  # fmt: skip
def test_both_spellings_of_the_type(key, name, type_):
    assert read("qwen3", **{key: name}).dtype == type_


def test_the_width_of_a_head_is_the_familys_where_the_file_is_silent():
    assert [read(f).head_dim for f in ("qwen2", "llama", "qwen3", "gemma3_text")] == [
        4,
        4,
        128,
        256,
    ]
    assert read("llama", head_dim=10).head_dim == 10
    assert read("llama", num_key_value_heads=None).num_key_value_heads == 4


@pytest.mark.parametrize(
    ("family", "more", "biases"),
    [("qwen2", {}, (True, False, False)), ("qwen3", {}, (False, False, False)),
     ("qwen3", {"attention_bias": True}, (True, True, False)),
     ("llama", {"attention_bias": True, "mlp_bias": True}, (True, True, True))],
)  # fmt: skip
def test_biases(family, more, biases):
    config = read(family, **more)
    assert (config.attention_bias, config.attention_output_bias, config.mlp_bias) == biases


@pytest.mark.parametrize(
    ("family", "more", "windows"),
    [
        ("mistral", {"sliding_window": 3}, [3, 3, 3, 3]),
        ("mistral", {"sliding_window": None}, [None] * 4),
        ("qwen3", {"sliding_window": 3}, [None] * 4),  # use_sliding_window is false
        ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 3},
         [None, None, None, 3]),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 3,
                   "layer_types": [SLIDING, FULL, FULL, SLIDING]}, [3, None, None, 3]),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 3}, [3] * 4),
        ("gemma3_text", {"sliding_window_pattern": 2}, [6, None, 6, None]),
        ("gemma3_text", {}, [6, 6, 6, 6]),
        ("llama", {}, [None] * 4),
    ],
)  # fmt: skip
def test_windows_of_each_layer(family, more, windows):
    assert [kind.window for kind in read(family, **more).kinds] == windows


def test_gemma_turns_its_sliding_layers_by_a_base_of_their_own():
    old = {"sliding_window_pattern": 2, "rope_theta": 1e6, "rope_local_base_freq": 500.0,
           "rope_scaling": {"rope_type": "linear", "factor": 8.0}}  # fmt: skip
    new = {"layer_types": [SLIDING, FULL] * 2, "rope_parameters": {
        FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        SLIDING: {"rope_type": "default", "rope_theta": 500.0}}}  # fmt: skip
    assert read("gemma3_text", **old) == read("gemma3_text", **new)
    sliding, full = read("gemma3_text", **old).kinds[:2]
    assert (sliding.theta, sliding.scaling) == (500.0, None)
    assert (full.theta, full.scaling) == (1e6, LinearRope(factor=8.0))
    config = read("gemma3_text", final_logit_softcapping=30.0)
    assert config.final_logit_softcapping == 30.0 and config.query_pre_attn_scalar == 256
    assert config.post_norms and config.zero_centered_norms and config.scale_embeddings


def test_experts():
    assert read("qwen3_moe").moe == MoEConfig(**EXPERTS, norm_topk_prob=False)
    renamed = values("qwen3_moe", num_local_experts=4, norm_topk_prob=True)
    del renamed["num_experts"]
    assert architecture(renamed, "x").moe == MoEConfig(**EXPERTS, norm_topk_prob=True)
    assert read("qwen3_moe", mlp_only_layers=[0, 1, 2, 3]).moe is None
    assert "mlp_only_layers: layers with and without" in refusal("qwen3_moe", mlp_only_layers=[1])
    assert "decoder_sparse_step: layers with" in refusal("qwen3_moe", decoder_sparse_step=2)


@pytest.mark.parametrize(
    ("family", "more", "message"),
    [
        ("qwen3", {"kv_lora_rank": 3}, "kv_lora_rank: unknown in a qwen3 model"),
        ("qwen3", {"slidng_window": 3}, "did you mean 'sliding_window'?"),
        ("llama", {"sliding_window": 3}, "sliding_window: a llama model is computed without it"),
        ("qwen3", {"quantization_config": {"bits": 4}}, "quantization_config: quantised"),
        ("qwen3", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map: code in a model folder is"),
        ("qwen3", {"hidden_act": "relu"}, "hidden_act: expected silu or gelu_pytorch_tanh"),
        ("llama", {"hidden_size": "wide"}, "hidden_size: expected a whole number"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers: expected a whole number"),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling: expected an object"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers: expected a list of 4 layers"),
        ("smollm3", {"no_rope_layers": [2, 1, 1, 1]}, "no_rope_layers: expected a list of 4"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
         "rope_scaling.rope_type: expected default, linear, llama3, yarn (it is 'dynamic')"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
         "rope_parameters.low_freq_factor: missing"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "colour": 1}},
         "rope_scaling.colour: unknown with rope_type linear"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": -2.0}}, "rope_scaling.factor"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
         "partial_rotary_factor: only 1"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0},
                   "rope_parameters": {"rope_type": "default"}}, "rope_parameters differs from it"),
        ("qwen3", {"rope_parameters": {FULL: {"rope_theta": 1e4}}}, "only a gemma3_text model"),
        ("mistral", {"sliding_window": 3, "layer_types": [FULL, SLIDING] * 2},
         "layer_types: a mistral model slides in every layer or in none"),
        ("qwen3", {"layer_types": [SLIDING] * 4}, "layer_types: sliding layers without"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 4}, "'chunked_attention' is not"),
        ("qwen3", {"hidden_size": None}, "hidden_size: missing"),
        ("qwen3", {"num_key_value_heads": 3}, "3 does not divide 4"),
        ("qwen3", {"hidden_size": "wide"}, "hidden_size: "),
        ("qwen3", {"dtype": "float8"}, "dtype: expected float32, bfloat16 or float16"),
    ],
)  # fmt: skip
def test_what_would_be_another_model_is_refused_by_name(family, more, message):
    refused = refusal(family, **more)
    assert refused.startswith("folder/config.json: ") and message in refused, refused


@pytest.mark.parametrize(
    "named", [{"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"},
              {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"},
              {"architectures": ["Qwen3ForSequenceClassification"]}, {"model_type": "gpt2",
              "architectures": None}],
)  # fmt: skip
def test_other_architectures_are_answered_with_those_supported(named):
    message = refusal("qwen3", **named)
    known = NAMES.values() if named["architectures"] else NAMES
    assert all(name in message for name in known) and "is not supported" in message


def test_a_family_that_is_not_that_of_the_architecture_is_named():
    message = refusal("qwen3", model_type="gpt2")
    assert message.endswith("model_type: 'gpt2' is not supported; expected qwen3")
    assert "model_type: missing" in refusal("qwen3", model_type=None, architectures=None)


EMBEDDED = {
    "quickstart": DecoderConfig(rope_theta=100.0),
    "windows": DecoderConfig(sliding_window=4, layer_types=(FULL, SLIDING, FULL)),
    "biases": DecoderConfig(attention_bias=True, attention_output_bias=True),
    "yarn": DecoderConfig(rope_scaling=YarnRope(), max_position_embeddings=131072),
    "moe": DecoderConfig(model_type="qwen3_moe", moe=MoEConfig()),
    "dense_moe": DecoderConfig(model_type="qwen3_moe"),
    "qwen2": DecoderConfig(model_type="qwen2", qk_norm=False, attention_bias=True,
                           hidden_size=128, head_dim=32),
    "llama": DecoderConfig(model_type="llama", qk_norm=False, mlp_bias=True,
                           rope_scaling=Llama3Rope()),
    "mistral": DecoderConfig(model_type="mistral", qk_norm=False, sliding_window=4),
    "ministral": DecoderConfig(model_type="ministral", qk_norm=False, sliding_window=4,
                               layer_types=(FULL, SLIDING, SLIDING)),
    "smollm3": DecoderConfig(model_type="smollm3", qk_norm=False, no_rope_layers=(1, 0, 1)),
    "smollm3_rope": DecoderConfig(model_type="smollm3", qk_norm=False, sliding_window=4,
                                  layer_types=(FULL, SLIDING, FULL)),
    "gemma": DecoderConfig(model_type="gemma3_text", hidden_act="gelu_pytorch_tanh",
                           zero_centered_norms=True, post_norms=True, scale_embeddings=True,
                           sliding_window=4, layer_types=(FULL, SLIDING, FULL),
                           rope_local_theta=50.0, rope_scaling=LinearRope(factor=2.0)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama", "architectures", 5),
        ("llama", "rope_theta", "x"),
        ("llama", "rope_theta", float("inf")),
        ("llama", "rope_parameters.rope_type", ["linear"]),
        ("llama", "rope_parameters.factor", "x"),
        ("gemma3_text", "rope_parameters.full_attention", 5),
        ("gemma3_text", "rope_local_base_freq", "x"),
        ("gemma3_text", "query_pre_attn_scalar", "x"),
        ("gemma3_text", "sliding_window_pattern", 0),
        ("gemma3_text", "sliding_window_pattern", "x"),
        ("qwen2", "layer_types", 5),
        ("qwen2", "layer_types", {FULL: 1}),
        ("qwen2", "max_window_layers", "x"),
        ("smollm3", "no_rope_layer_interval", 0),
        ("qwen3_moe", "decoder_sparse_step", 0),
        ("qwen3_moe", "mlp_only_layers", 5),
        ("qwen3_moe", "num_experts", "x"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_file_and_key(family, key, value):
    name, _, part = key.partition(".")
    more = {name: {"rope_type": "linear", "factor": 2.0, part: value} if part else value}
    slides = {"use_sliding_window": True, "sliding_window": 8} if family == "qwen2" else {}
    assert refusal(family, **slides, **more).startswith(f"folder/config.json: {key}: ")


def test_a_value_without_effect_may_be_of_any_kind():
    assert read("qwen2", use_sliding_window=False, max_window_layers="x").sliding_window is None
    assert read("gemma3_text", layer_types=[FULL] * 4, sliding_window_pattern="x").kinds


@pytest.mark.parametrize("name", EMBEDDED)
def test_what_is_written_reads_back_as_the_same_model(name):
    config = EMBEDDED[name]
    written = hf_config_json(config, 77, dtype="bfloat16", eos_token_id=3, pad_token_id=None)
    assert written["eos_token_id"] == 3 and "pad_token_id" not in written
    assert written["architectures"] == [NAMES[config.model_type]]
    again = architecture(written, "x")
    assert again.vocab_size == 77 and again.dtype == "bfloat16"
    assert again.kinds == config.kinds
    assert hf_config_json(again, 77) == hf_config_json(config, 77)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"qk_norm": False}, "qk_norm=False"), ({"moe": MoEConfig()}, "moe="),
     ({"model_type": "llama"}, "qk_norm=True"),
     ({"attention_bias": True}, "attention_output_bias=False"),
     ({"post_norms": True}, "post_norms=True"),
     ({"model_type": "qwen2", "qk_norm": False}, "attention_bias=False"),
     ({"final_logit_softcapping": 3.0}, "final_logit_softcapping=3.0"),
     ({"no_rope_layers": (1, 0, 1)}, "no_rope_layers="),
     ({"model_type": "mistral", "qk_norm": False, "sliding_window": 4,
       "layer_types": (FULL, SLIDING, FULL)}, "sliding_window=")],
)  # fmt: skip
def test_what_no_family_can_say_is_not_written(fields, message):
    with pytest.raises(UserError, match=f"cannot have {message}"):
        hf_config_json(DecoderConfig(**fields), 48)
