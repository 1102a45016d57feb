"""Tiny random models saved by `transformers` and loaded here give the same logits."""

import functools
import json

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from fireopd_jax.models.hf_config import hf_config_json
from fireopd_jax.models.hf_load import load, read_config
from fireopd_jax.models.hf_names import hf_shapes, hf_tensors
from fireopd_jax.models.language_model import LanguageModel
from fireopd_jax.rollout.kv_dense import Dense
from tests.cases import through_cache

pytestmark = pytest.mark.parity

VOCABULARY, WIDTH, LENGTH = 48, 12, np.array([12, 1, 7], np.int32)
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 32}  # fmt: skip
FULL, SLIDING = "full_attention", "sliding_attention"
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8}


def rope(theta, **more):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}


CASES = {
    "qwen3": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True, **rope(1e4)}),
    "qwen3_wide_heads": ("Qwen3", {"head_dim": 12, "attention_bias": True, **rope(5e6)}),
    "qwen3_windows": ("Qwen3", {"head_dim": 8, "use_sliding_window": True, "sliding_window": 3,
                                "max_window_layers": 1, **rope(1e6)}),
    "qwen3_yarn": ("Qwen3", {"head_dim": 8, "rope_parameters": YARN,
                             "max_position_embeddings": 128}),
    "qwen3_moe": ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": True, **rope(1e6)}),
    "qwen3_moe_plain": ("Qwen3Moe", {**EXPERTS, "num_experts_per_tok": 3, "norm_topk_prob": False,
                                     "tie_word_embeddings": True, **rope(1e4)}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, **rope(1e6)}),
    "qwen2_windows": ("Qwen2", {"layer_types": [SLIDING, FULL, SLIDING], "sliding_window": 4,
                                "use_sliding_window": True, **rope(100.0)}),
    "llama": ("Llama", {"head_dim": 6, **rope(1e4)}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True,
                         "tie_word_embeddings": True, "max_position_embeddings": 128}),
    "llama_linear": ("Llama", rope(1e4) | {"rope_parameters": {
        "rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "mistral": ("Mistral", {"head_dim": 8, "sliding_window": 3, **rope(1e6)}),
    "mistral_full": ("Mistral", {"sliding_window": None, "num_key_value_heads": 1, **rope(1e4)}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1], "pad_token_id": None,
                            "bos_token_id": None, "eos_token_id": None, **rope(5e3)}),
    "smollm3_windows": ("SmolLM3", {"no_rope_layer_interval": 3, "use_sliding_window": True,
                                    "sliding_window": 3, "tie_word_embeddings": False,
                                    "attention_bias": True, "pad_token_id": None, **rope(1e4)}),
    "smollm3_yarn": ("SmolLM3", {"no_rope_layers": [0, 1, 1], "pad_token_id": None,
                                 "rope_parameters": YARN, "max_position_embeddings": 128}),
    "ministral": ("Ministral", {"head_dim": 8, "sliding_window": 3,
                                "layer_types": [FULL, SLIDING, SLIDING], **rope(1e6)}),
    "gemma3": ("Gemma3Text", {"head_dim": 8, "sliding_window": 3, "query_pre_attn_scalar": 20,
                              "layer_types": [SLIDING, SLIDING, FULL], "rope_parameters": {
        FULL: {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        SLIDING: {"rope_type": "default", "rope_theta": 1e3}}}),
    "gemma3_softcap": ("Gemma3Text", {"head_dim": 8, "sliding_window": 100,
                                      "final_logit_softcapping": 3.0}),
}  # fmt: skip


def make(family, settings, seed=0):
    """Return a model of `transformers` with random weights, also of its norms."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    name = family.removesuffix("Text")
    config = getattr(transformers, f"{family}Config")(**BASE | settings)
    config._attn_implementation = config._experts_implementation = "eager"
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            scale = 2.0 if "mlp.gate.weight" in weight_name else 0.4
            weight.copy_(1 + 0.2 * noise if "norm" in weight_name else scale * noise)
    return model


@functools.cache
def case(name, tmp):
    """Write a model once; return its module, the folder, our model of it, and a batch of rows."""
    reference = make(*CASES[name])
    folder = tmp / name
    reference.save_pretrained(folder)
    config = read_config(folder)
    params = load(folder, config, VOCABULARY, SingleDeviceSharding(jax.devices()[0]))
    return reference, folder, config, params


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    return tmp_path_factory.mktemp("parity")


def tokens(seed=1):
    return np.random.default_rng(seed).integers(0, VOCABULARY, (3, WIDTH)).astype(np.int32)


def wanted_logits(reference, ids, length):
    """Return the logits of `transformers` for each row alone, without padding."""
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return [
            reference(torch.tensor(row[None, :n], dtype=torch.long)).logits[0].float().numpy()
            for row, n in zip(ids, length, strict=True)
        ]


def bent(config, logits):
    cap = config.final_logit_softcapping
    return np.asarray(logits if cap is None else cap * np.tanh(logits / cap))


def full(config, params, ids, length):
    """Return our logits of all rows in one right-padded batch."""
    positions = np.broadcast_to(np.arange(WIDTH, dtype=np.int32), ids.shape)
    segments = (np.arange(WIDTH)[None] < length[:, None]).astype(np.int32)

    @jax.jit
    def run(params):
        decoder = LanguageModel(config, VOCABULARY).bind(params)
        return (decoder(ids, positions, segments) @ decoder.head.T).astype("float32")

    return bent(config, run(params))


def check(got, wanted, length, bound):
    for row, reference, n in zip(got, wanted, length, strict=True):
        gap = np.abs(row[:n] - reference).max() / np.abs(reference).max()
        assert gap <= bound, gap


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name, tmp):
    reference, _, config, params = case(name, tmp)
    ids = tokens()
    got = full(config, params, ids, LENGTH)
    check(got, wanted_logits(reference, ids, LENGTH), LENGTH, 2e-5)


def test_the_bound_is_missed_with_another_base(tmp):
    _, _, config, params = case("llama", tmp)
    got = full(config, params, tokens(), LENGTH)
    other = type(config)(**vars(config) | {"rope_theta": config.rope_theta * 1.1})
    gap = np.abs(full(other, params, tokens(), LENGTH)[0] - got[0]).max() / np.abs(got[0]).max()
    assert gap > 1e-3, gap


@pytest.mark.parametrize("name", CASES)
def test_decoding_through_the_cache_equals_transformers(name, tmp):
    reference, _, config, params = case(name, tmp)
    ids, prompt = tokens(2), np.array([6, 1, 4], np.int32)
    width, room = 6, 6
    model = LanguageModel(config, VOCABULARY)
    rows = [np.concatenate([ids[i, : prompt[i]], ids[i, width:]]) for i in range(3)]
    head = np.asarray(model.bind(params).head, np.float32)
    hidden = through_cache(model, params, rows, prompt, Dense())
    for i, wanted in enumerate(wanted_logits(reference, rows, prompt + room)):
        got = bent(config, hidden[i] @ head.T)
        assert np.abs(got - wanted).max() / np.abs(wanted).max() <= 2e-5


def test_the_router_of_the_test_is_uneven(tmp):
    _, _, config, params = case("qwen3_moe", tmp)
    model = LanguageModel(config, VOCABULARY)
    layer = model.bind_decode(model.to_decode_layout(params))[1][0]
    x = model.bind(params).embed(tokens())
    gate = np.asarray(layer.mlp.gate(layer.post_attention_layernorm(x)))
    chosen = np.argsort(-gate, axis=-1)[..., :2]
    count = np.bincount(chosen.ravel(), minlength=6)
    assert count.max() > 2 * count.min(), count


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "qwen2", "llama3", "mistral", "gemma3",
                                  "smollm3"])  # fmt: skip
def test_bfloat16_stays_within_its_tolerance(name, tmp):
    torch = pytest.importorskip("torch")
    reference = make(*CASES[name])
    exact = wanted_logits(reference, tokens(), LENGTH)
    folder = tmp / f"{name}_bfloat16"
    half = reference.to(torch.bfloat16)
    half.save_pretrained(folder)
    config = read_config(folder)
    assert config.dtype == "bfloat16"
    config = type(config)(**vars(config) | {"param_dtype": "bfloat16"})
    params = load(folder, config, VOCABULARY, SingleDeviceSharding(jax.devices()[0]))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    got = full(config, params, tokens(), LENGTH)
    theirs = wanted_logits(half, tokens(), LENGTH)
    # In units of the logits' spread; a router tie that resolves to another expert counts more.
    for row, reference_row, own, n in zip(got, exact, theirs, LENGTH, strict=True):
        spread = reference_row.std()
        ours = np.sqrt(np.mean((row[:n] - reference_row) ** 2)) / spread
        torchs = np.sqrt(np.mean((own - reference_row) ** 2)) / spread
        assert 0 < ours < max(0.05, 1.5 * torchs), (ours, torchs)


def respelled(values):
    """Return a config.json in the older spelling."""
    values = dict(values)
    given = values.pop("rope_parameters")
    values["torch_dtype"] = values.pop("dtype")
    if FULL in given:
        values["rope_local_base_freq"] = given[SLIDING]["rope_theta"]
        given = given[FULL]
    given = dict(given)
    values["rope_theta"] = given.pop("rope_theta")
    kind = given.pop("rope_type")
    values["rope_scaling"] = None if kind == "default" else {"type": kind, **given}
    return values


@pytest.mark.parametrize("name", CASES)
def test_both_spellings_and_our_own_config_say_the_same(name, tmp):
    _, folder, config, _ = case(name, tmp)
    values = json.loads((folder / "config.json").read_text())
    other = tmp / f"{name}_respelled"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(respelled(values)))
    assert read_config(other) == config
    ours = hf_config_json(config, VOCABULARY, eos_token_id=[1, 2])
    assert ours["eos_token_id"] == [1, 2]
    (other / "config.json").write_text(json.dumps(ours))
    again = read_config(other)
    assert again.kinds == config.kinds
    assert hf_config_json(again, VOCABULARY) == hf_config_json(config, VOCABULARY)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.from_pretrained(other)
    assert theirs.model_type == values["model_type"]
    wanted = transformers.AutoConfig.from_pretrained(folder).rope_parameters
    # Our file also has the keys that theirs omits as defaults.
    assert wanted.items() <= theirs.rope_parameters.items()


@pytest.mark.parametrize("name", CASES)
def test_exported_tensors_are_theirs_bit_for_bit(name, tmp):
    from safetensors.numpy import load_file

    _, folder, config, params = case(name, tmp)
    stored = load_file(folder / "model.safetensors")
    exported = dict(hf_tensors(params, config))
    assert exported.keys() == stored.keys() == hf_shapes(config, VOCABULARY).keys()
    for key, tensor in exported.items():
        np.testing.assert_array_equal(tensor, stored[key], err_msg=key)
        assert tensor.flags.c_contiguous


def test_tied_files_may_hold_the_head_again(tmp):
    from safetensors.numpy import load_file, save_file

    _, folder, config, params = case("qwen3", tmp)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    other = tmp / "tied_twice"
    other.mkdir()
    save_file(tensors, other / "model.safetensors")
    again = load(other, config, VOCABULARY, SingleDeviceSharding(jax.devices()[0]))
    assert jax.tree.all(jax.tree.map(np.array_equal, again, params))
