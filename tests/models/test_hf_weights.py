"""Weight files as users have them: two that compete, wrappers' names, value heads, lone shards."""

import json
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from safetensors.numpy import load_file, save_file

from fireopd_jax.config import UserError
from fireopd_jax.models.hf_load import load
from fireopd_jax.models.hf_names import hf_tensors
from fireopd_jax.models.hf_weights import open_folder, refuse_adapters
from tests.cases import random_params, tiny_model

MODEL = tiny_model(num_hidden_layers=2)
UNTIED = tiny_model(num_hidden_layers=2, tie_word_embeddings=False)
PLACE = SingleDeviceSharding(jax.devices()[0])
EMBEDDING = "model.embed_tokens.weight"
INDEX = "model.safetensors.index.json"


def tensors(seed=0, model=MODEL):
    return dict(hf_tensors(random_params(model, seed), model.config))


def shards(folder, seed, count=2):
    """Write shards and their index."""
    named = tensors(seed)
    files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    places = {key: files[i % count] for i, key in enumerate(named)}
    for file in files:
        save_file({k: t for k, t in named.items() if places[k] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    return files


def read(folder, model=MODEL):
    return load(folder, model.config, model.vocab_size, PLACE)


def same(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def broken(folder, model=MODEL):
    with pytest.raises(UserError) as caught:
        read(folder, model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_single_file_is_read_and_the_competing_ones_are_named(tmp_path, caplog):
    files = shards(tmp_path, seed=1)
    assert same(read(tmp_path), random_params(MODEL, 1)) and not caplog.messages
    save_file(tensors(2), tmp_path / "model.safetensors")
    assert open_folder(tmp_path)[EMBEDDING].file.name == "model.safetensors"
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path}: model.safetensors is read, as transformers does; not ")
    assert all(name in message for name in (*files, INDEX))
    assert same(read(tmp_path), random_params(MODEL, 2))


@pytest.mark.parity
def test_transformers_reads_the_single_file_too(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    config = transformers.Qwen3Config(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, intermediate_size=24, tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    shards(tmp_path, seed=1)
    save_file(tensors(2), tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path)
    wanted = theirs.get_input_embeddings().weight.detach().numpy()
    stored = open_folder(tmp_path)[EMBEDDING]
    np.testing.assert_array_equal(stored.rows(0, 32), wanted)


def test_shards_that_the_index_does_not_list_are_named(tmp_path, caplog):
    shards(tmp_path, seed=1)
    shutil.copy(tmp_path / "model-00001-of-00002.safetensors", tmp_path / "model-00003.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "training_args.bin").write_bytes(b"")
    assert same(read(tmp_path), random_params(MODEL, 1))
    (message,) = caplog.messages
    assert message.endswith("not model-00003.safetensors, pytorch_model.bin")


def test_lone_shards_are_named(tmp_path):
    shards(tmp_path, seed=1)
    (tmp_path / INDEX).unlink()
    message = broken(tmp_path)
    assert "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors without" in message
    assert INDEX in message


@pytest.mark.parametrize(
    ("rename", "wrapper"),
    [
        (lambda name: f"_orig_mod.{name}", "_orig_mod. (torch.compile)"),
        (lambda name: f"module.{name}", "module. (DistributedDataParallel)"),
        (lambda name: f"module._orig_mod.{name}", "module. (DistributedDataParallel), _orig_mod."),
        (lambda name: name.replace(".self_attn.", "._orig_mod.self_attn."), "_orig_mod."),
        (lambda name: f"_fsdp_wrapped_module.{name}", "_fsdp_wrapped_module. (FSDP)"),
        (lambda name: f"pretrained_model.{name}", "pretrained_model. (TRL's value head)"),
    ],
)
def test_names_of_wrappers_are_read_without_them(tmp_path, caplog, rename, wrapper):
    named = {rename(name): tensor for name, tensor in tensors().items()}
    save_file(named, tmp_path / "model.safetensors")
    assert same(read(tmp_path), random_params(MODEL))
    (message,) = caplog.messages
    assert f"tensor names are read without {wrapper}" in message


def test_a_tensor_with_and_without_a_wrapper_is_refused(tmp_path):
    named = tensors()
    save_file(named | {f"_orig_mod.{EMBEDDING}": named[EMBEDDING]}, tmp_path / "model.safetensors")
    assert f"two tensors are {EMBEDDING}" in broken(tmp_path)


@pytest.mark.parametrize("model", [MODEL, UNTIED])
def test_files_of_the_model_below_the_head_are_read(tmp_path, model):
    """Embedding models and `AutoModel` save names without `model.`."""
    named = {name.removeprefix("model."): tensor for name, tensor in tensors(0, model).items()}
    save_file(named, tmp_path / "model.safetensors")
    assert same(read(tmp_path, model), random_params(model))


@pytest.mark.parametrize("head", ["v_head.summary.weight", "score.weight", "value_head.0.bias"])
def test_heads_for_values_are_left_out_with_a_note(tmp_path, caplog, head):
    save_file(tensors() | {head: np.zeros((1, 16), np.float32)}, tmp_path / "model.safetensors")
    assert same(read(tmp_path), random_params(MODEL))
    (message,) = caplog.messages
    assert f"{head} not read: a head for values or classes" in message


def test_a_classifier_is_refused_as_one(tmp_path):
    named = tensors(0, UNTIED) | {"score.weight": np.zeros((2, 16), np.float32)}
    del named["lm_head.weight"]
    save_file(named, tmp_path / "model.safetensors")
    message = broken(tmp_path, UNTIED)
    assert "missing tensors: lm_head.weight; score.weight makes it a classifier" in message


def test_adapters_are_refused_with_their_base(tmp_path):
    refuse_adapters(tmp_path)
    given = {"base_model_name_or_path": "Qwen/Qwen3-0.6B", "r": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(given))
    with pytest.raises(UserError, match=r"adapters \(of Qwen/Qwen3-0.6B\).*merge_and_unload") as e:
        refuse_adapters(tmp_path)
    assert "\n" not in str(e.value)


def test_a_missing_wrapped_tensor_is_named_as_the_model_has_it(tmp_path):
    named = {f"module.{name}": tensor for name, tensor in tensors().items()}
    del named["module.model.norm.weight"]
    save_file(named, tmp_path / "model.safetensors")
    assert "missing tensors: model.norm.weight" in broken(tmp_path)
    assert "module.model.norm.weight" not in load_file(tmp_path / "model.safetensors")


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    assert "model.safetensors: a pointer of Git LFS, not the file" in broken(tmp_path)
