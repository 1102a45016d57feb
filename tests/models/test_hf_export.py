"""Exported folders: complete or absent, sharded, and the same model in `transformers`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from fireopd_jax.config import UserError
from fireopd_jax.models import hf_export
from fireopd_jax.models.hf_export import export_model, plan_shards
from fireopd_jax.models.hf_names import hf_shapes, hf_tensors
from fireopd_jax.text.chat import stop_ids
from fireopd_jax.text.tokenizer import BUILTIN, load_tokenizer, read_generation
from tests.cases import random_params, tiny_model

VOCABULARY = 264
TOKENIZER = load_tokenizer(BUILTIN)
TWO_LAYERS = tiny_model(VOCABULARY, num_hidden_layers=2, tie_word_embeddings=False)


def export(to, model=TWO_LAYERS, **options):
    params = random_params(model)
    settings = {"stop": (257,), "card": "# a model\n"}
    export_model(to, params, model.config, TOKENIZER, **settings | options)
    return params


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_shards_hold_every_tensor_and_the_index_says_where(tmp_path):
    params = export(tmp_path / "out", max_shard_bytes=20_000)
    index = read(tmp_path / "out", "model.safetensors.index.json")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert sorted(set(index["weight_map"].values())) == files
    wanted = dict(hf_tensors(params, TWO_LAYERS.config))
    assert index["weight_map"].keys() == wanted.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in wanted.values())
    for name, file in index["weight_map"].items():
        written = load_file(tmp_path / "out" / file)
        np.testing.assert_array_equal(written[name], wanted[name], strict=True)
        assert len(written) == 1 or sum(t.nbytes for t in written.values()) <= 20_000


def test_shards_are_filled_in_order():
    sizes = {"a": 3, "b": 4, "c": 9, "d": 1, "e": 2}
    assert list(plan_shards(sizes, 7)) == [["a", "b"], ["c"], ["d", "e"]]
    assert list(plan_shards(sizes, 1)) == [["a"], ["b"], ["c"], ["d"], ["e"]]
    assert list(plan_shards(sizes, 99)) == [["a", "b", "c", "d", "e"]]


def test_one_file_needs_no_index(tmp_path):
    export(tmp_path / "deep" / "out")
    names = {path.name for path in (tmp_path / "deep" / "out").iterdir()}
    assert names == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json",
        "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    with safe_open(tmp_path / "deep" / "out" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(hf_shapes(TWO_LAYERS.config, VOCABULARY))
    modes = {path.stat().st_mode for path in (tmp_path / "deep" / "out").iterdir()}
    assert len(modes) == 1


def test_the_type_is_that_of_the_parameters_or_the_one_asked_for(tmp_path):
    export(tmp_path / "kept")
    export(tmp_path / "halved", dtype="bfloat16")
    halved = load_file(tmp_path / "halved" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "kept" / "model.safetensors").items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(halved[name], tensor.astype(jnp.bfloat16))
    assert read(tmp_path / "kept", "config.json")["torch_dtype"] == "float32"
    assert read(tmp_path / "halved", "config.json")["torch_dtype"] == "bfloat16"


def test_the_configs_name_the_ends_of_a_response(tmp_path):
    generation = {"temperature": 0.6, "eos_token_id": 3}
    export(tmp_path / "out", stop=(257, 10), generation=generation)
    config = read(tmp_path / "out", "config.json")
    written = read_generation(tmp_path / "out")
    assert config["eos_token_id"] == written["eos_token_id"] == [257, 10]
    assert stop_ids(TOKENIZER, written) == (257, 10)
    assert (written["pad_token_id"], written["temperature"]) == (256, 0.6)
    assert "bos_token_id" not in written
    # A padding id without a row would be an error in transformers.
    small = tiny_model(200)
    export(tmp_path / "small", model=small, stop=(5,))
    assert "pad_token_id" not in read(tmp_path / "small", "config.json")


def test_the_tokenizer_comes_along(tmp_path):
    export(tmp_path / "out")
    for loaded in (load_tokenizer(str(tmp_path / "out")), AutoTokenizer.from_pretrained(
        str(tmp_path / "out"))):  # fmt: skip
        assert loaded.get_vocab() == TOKENIZER.get_vocab()
        assert loaded.all_special_ids == TOKENIZER.all_special_ids
        assert loaded.chat_template == TOKENIZER.chat_template
        text = " a é\n<|end|> 12"
        assert loaded.encode(text) == TOKENIZER.encode(text)
    # The names that transformers 4 knows.
    described = read(tmp_path / "out", "tokenizer_config.json")
    assert described["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in described
    hf_export.save_tokenizer(tmp_path, load_tokenizer(str(tmp_path / "out")))
    assert read(tmp_path, "tokenizer_config.json") == described


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "empty").mkdir()
    export(tmp_path / "empty")
    before = (tmp_path / "empty" / "config.json").read_bytes()
    (tmp_path / "file").write_text("mine")
    for name in ("empty", "file"):
        with pytest.raises(UserError, match="exists; expected a new or an empty folder"):
            export(tmp_path / name)
    assert (tmp_path / "empty" / "config.json").read_bytes() == before
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("step", ["save_file", "save_tokenizer", "settle"])
def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch, step):
    def fail(*_, **__):
        raise OSError("the disk is full")

    monkeypatch.setattr(hf_export, step, fail)
    with pytest.raises(OSError, match="the disk is full"):
        export(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_made_meanwhile_is_kept(tmp_path, monkeypatch):
    def made(folder):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("mine")

    monkeypatch.setattr(hf_export, "settle", made)
    with pytest.raises(UserError, match="cannot be written"):
        export(tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


@pytest.mark.parity
@pytest.mark.parametrize(
    "architecture",
    [
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": False, "rope_theta": 1e6, "num_attention_heads": 4},
        {"model_type": "llama", "qk_norm": False},
        {"model_type": "qwen2", "qk_norm": False, "attention_bias": True},
        {
            "model_type": "qwen3_moe",
            "moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
        },
    ],
)
def test_transformers_reads_the_same_model(tmp_path, architecture):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = tiny_model(VOCABULARY, num_hidden_layers=2, **architecture)
    params = export(tmp_path / "out", model=model, max_shard_bytes=20_000)
    theirs, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(loading.values()), loading
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCABULARY, (2, 7)).astype(np.int32)
    positions = np.tile(np.arange(7, dtype=np.int32), (2, 1))
    decoder = model.bind(params)
    hidden = jax.jit(decoder.__call__)(tokens, positions, np.ones((2, 7), np.int32))
    logits = np.asarray(hidden @ decoder.head.T)
    with torch.no_grad():
        wanted = theirs.eval()(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    assert np.abs(logits - wanted).max() < 2e-5 * np.abs(wanted).max()
