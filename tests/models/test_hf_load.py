"""Loading safetensors folders: every tensor, any number of files, and clear errors."""

import json
import os
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from safetensors.numpy import load_file, save_file

from fireopd_jax.config import UserError
from fireopd_jax.models import hf_files, hf_load
from fireopd_jax.models.architecture import DecoderConfig, MoEConfig
from fireopd_jax.models.hf_config import hf_config_json
from fireopd_jax.models.hf_load import load, read_config, resolve
from fireopd_jax.models.hf_names import hf_shapes, hf_tensors
from fireopd_jax.models.quantized import quantize_params
from tests.cases import random_params, same_structure, tiny_model

PLACE = SingleDeviceSharding(jax.devices()[0])
MODELS = {
    "tied": tiny_model(num_hidden_layers=2),
    "untied": tiny_model(
        num_hidden_layers=3, tie_word_embeddings=False, num_attention_heads=4, head_dim=6,
        attention_bias=True, attention_output_bias=True, mlp_bias=True,
    ),
    "experts": tiny_model(
        num_hidden_layers=2, model_type="qwen3_moe",
        moe=MoEConfig(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8),
    ),
    "gemma": tiny_model(
        num_hidden_layers=2, model_type="gemma3_text", zero_centered_norms=True, post_norms=True,
    ),
}  # fmt: skip


def write(folder, name, shards=1, dtype=None):
    """Write a model in Hugging Face's format; return its parameters."""
    model = MODELS[name]
    params = random_params(model)
    tensors = dict(hf_tensors(params, model.config, dtype))
    folder.mkdir(exist_ok=True)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return params
    places = {key: f"model-{i % shards + 1:05}.safetensors" for i, key in enumerate(tensors)}
    for file in set(places.values()):
        save_file({k: t for k, t in tensors.items() if places[k] == file}, folder / file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return params


def read(folder, name, sharding=PLACE, quantized=None, **changes):
    config = DecoderConfig(**vars(MODELS[name].config) | changes)
    return load(folder, config, MODELS[name].vocab_size, sharding, quantized)


def same(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.fixture(params=["host", "device"])
def memory(request, monkeypatch):
    """Run a test with the code for CPUs, and with the code for accelerators."""
    if request.param == "device":
        monkeypatch.setattr(hf_load, "on_cpu", lambda place: False)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("memory")
def test_every_tensor_comes_to_its_place(tmp_path, name, shards):
    params = write(tmp_path / "m", name, shards)
    got = read(tmp_path / "m", name)
    assert same_structure(got, MODELS[name]) and same(got, params)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(got))


def test_names_and_shapes_are_those_of_hugging_face():
    shapes = hf_shapes(MODELS["experts"].config, 32)
    assert shapes["model.layers.1.mlp.experts.2.down_proj.weight"] == (16, 8)
    assert shapes["model.layers.0.mlp.gate.weight"] == (3, 16)
    assert shapes["model.layers.1.self_attn.q_proj.weight"] == (16, 16)
    assert shapes["model.embed_tokens.weight"] == (32, 16)
    assert "lm_head.weight" not in shapes
    assert hf_shapes(MODELS["untied"].config, 32)["model.layers.2.mlp.up_proj.bias"] == (24,)
    assert "model.layers.0.pre_feedforward_layernorm.weight" in hf_shapes(
        MODELS["gemma"].config, 32
    )


@pytest.mark.parametrize("kept", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32"])
@pytest.mark.usefixtures("memory")
def test_types_are_those_asked_for(tmp_path, stored, kept):
    params = write(tmp_path / "m", "tied", 2, stored)
    got = read(tmp_path / "m", "tied", param_dtype=kept)
    wanted = jax.tree.map(lambda leaf: leaf.astype(stored).astype(kept), params)
    assert all(leaf.dtype == jnp.dtype(kept) for leaf in jax.tree.leaves(got))
    assert same(got, wanted)


@pytest.mark.usefixtures("memory")
def test_files_of_several_types_are_read(tmp_path):
    params = write(tmp_path / "m", "tied")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors = {
        key: tensor.astype(jnp.bfloat16 if "proj" in key else np.float32)
        for key, tensor in tensors.items()
    }
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    got = read(tmp_path / "m", "tied")
    assert same(got["embed_tokens"], params["embed_tokens"])
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"].astype(jnp.bfloat16).astype(np.float32)
    assert same(got["layers"]["mlp"]["up_proj"]["kernel"], kernel)


@pytest.mark.usefixtures("memory")
def test_parameters_go_straight_to_their_shardings(tmp_path):
    params = write(tmp_path / "m", "experts", 2)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("fsdp", "tensor"))

    def place(leaf):
        spec = [None] * leaf.ndim
        spec[-1] = "tensor" if leaf.shape[-1] % 2 == 0 else None
        if leaf.ndim > 1 and leaf.shape[-2] % 4 == 0:
            spec[-2] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    places = jax.tree.map(place, params)
    got = read(tmp_path / "m", "experts", places)
    assert same(got, params)
    assert jax.tree.all(
        jax.tree.map(lambda leaf, p: leaf.sharding.is_equivalent_to(p, leaf.ndim), got, places)
    )
    kernel = got["layers"]["mlp"]["experts"]["gate_proj"]
    assert kernel.addressable_shards[0].data.shape == (2, 3, 4, 4)
    whole = read(tmp_path / "m", "experts", NamedSharding(mesh, PartitionSpec()))
    assert same(whole, params)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("memory")
def test_quantised_on_the_way_is_quantised_afterwards(tmp_path, monkeypatch, name, stored):
    write(tmp_path / "m", name, 2, stored)
    monkeypatch.setattr(hf_load, "BLOCK", 100)
    wanted = jax.jit(quantize_params)(read(tmp_path / "m", name))
    got = read(tmp_path / "m", name, quantized="int8")
    assert jax.tree.structure(got) == jax.tree.structure(wanted) and same(got, wanted)


@pytest.mark.usefixtures("memory")
def test_numbers_and_steps_go_to_their_shardings(tmp_path):
    write(tmp_path / "m", "experts", 2)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("fsdp", "tensor"))

    def place(leaf):
        spec = [None] * leaf.ndim
        if leaf.ndim > 2 and leaf.shape[-2] % 4 == 0 and leaf.shape[-1] % 2 == 0:
            spec[-2:] = ["fsdp", "tensor"]
        return NamedSharding(mesh, PartitionSpec(*spec))

    whole = read(tmp_path / "m", "experts")
    got = read(tmp_path / "m", "experts", jax.tree.map(place, whole), quantized="int8")
    assert same(got, jax.jit(quantize_params)(whole))
    kernel = got["layers"]["mlp"]["experts"]["gate_proj"]
    assert kernel.values.addressable_shards[0].data.shape == (2, 3, 4, 4)
    assert kernel.scale.addressable_shards[0].data.shape == (2, 3, 1, 4)


def test_the_host_waits_before_its_buffer_overflows(tmp_path, monkeypatch):
    params = write(tmp_path / "m", "untied")
    monkeypatch.setattr(hf_load, "BUFFER", 1)
    monkeypatch.setattr(hf_load, "on_cpu", lambda place: False)
    assert same(read(tmp_path / "m", "untied"), params)


@pytest.mark.parametrize("name", ["experts", "untied"])
def test_blocks_of_any_size_fill_the_memory(tmp_path, monkeypatch, name):
    params = write(tmp_path / "m", name)
    monkeypatch.setattr(hf_load, "BLOCK", 100)
    assert same(read(tmp_path / "m", name), params)


def test_what_is_loaded_is_never_written_to(tmp_path):
    """Devices may share host memory, and a program may get it as a donated argument."""
    params = write(tmp_path / "m", "tied")
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    got = read(tmp_path / "m", "tied", NamedSharding(mesh, PartitionSpec()))
    leaf = got["embed_tokens"]
    kept = [shard.data for shard in leaf.addressable_shards]
    changed = jax.jit(lambda x: x + 1, donate_argnums=0)(leaf)
    assert all(same(np.asarray(shard.data), params["embed_tokens"] + 1)
               for shard in changed.addressable_shards)  # fmt: skip
    again = jax.device_put(kept[1], jax.devices()[1]) if not kept[1].is_deleted() else None
    assert again is None or same(np.asarray(again), params["embed_tokens"])


def broken(folder, name="untied", **changes):
    with pytest.raises(UserError) as caught:
        read(folder, name, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_missing_and_extra_tensors_are_named(tmp_path):
    write(tmp_path / "m", "untied")
    rewrite(tmp_path / "m", lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    assert "missing tensors: model.layers.1.mlp.up_proj.weight" in broken(tmp_path / "m")
    rewrite(tmp_path / "m", lambda t: [t.pop(k) for k in list(t) if "layers.2" in k])
    assert "and 15 more" in broken(tmp_path / "m")
    write(tmp_path / "m", "untied")
    rewrite(tmp_path / "m", lambda t: t.update({"model.layers.0.router": np.zeros(3)[:0]
                                                .astype(np.float32)}))  # fmt: skip
    message = broken(tmp_path / "m")
    assert "unexpected tensors for a qwen3 model with this config.json: model.layers.0" in message
    write(tmp_path / "m", "tied")
    message = broken(tmp_path / "m", "tied", tie_word_embeddings=False)
    assert "lm_head.weight; does config.json lack tie_word_embeddings: true?" in message


def test_wrong_shapes_are_named_with_both(tmp_path):
    write(tmp_path / "m", "untied")
    message = broken(tmp_path / "m", intermediate_size=20)
    assert "model.layers.0.mlp.gate_proj.weight has shape [24, 16]" in message
    assert message.endswith("config.json implies [20, 16]")


def test_a_tied_head_must_be_the_embedding(tmp_path):
    params = write(tmp_path / "m", "tied")
    head = np.asarray(params["embed_tokens"])
    rewrite(tmp_path / "m", lambda t: t.update({"lm_head.weight": head}))
    assert same(read(tmp_path / "m", "tied"), params)
    rewrite(tmp_path / "m", lambda t: t.update({"lm_head.weight": head + 1}))
    assert "lm_head.weight differs" in broken(tmp_path / "m", "tied")


@pytest.mark.parametrize("cut", [4, 100, -1])
def test_truncated_files_are_noticed_before_anything_is_read(tmp_path, cut):
    write(tmp_path / "m", "untied", 2)
    file = tmp_path / "m" / "model-00002.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    message = broken(tmp_path / "m")
    assert "model-00002.safetensors" in message and "cut off" in message


def test_files_that_are_none(tmp_path):
    write(tmp_path / "m", "untied")
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 8) + b"{nothing" + b"0" * 64)
    assert "not a safetensors file" in broken(tmp_path / "m")
    header = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"0000")
    assert "x is F8_E4M3; expected F32, F16, BF16" in broken(tmp_path / "m")
    header = json.dumps({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 4]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"0000")
    assert "x: shape [4] does not fill its 4 bytes" in broken(tmp_path / "m")
    header = json.dumps({"x": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"0000")
    assert "x: shape and data_offsets are not whole numbers" in broken(tmp_path / "m")
    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"x": one, "y": one}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"0000")
    assert "x and y share bytes" in broken(tmp_path / "m")


def test_an_index_must_tell_the_truth(tmp_path):
    write(tmp_path / "m", "untied", 3)
    index = tmp_path / "m" / "model.safetensors.index.json"
    (tmp_path / "m" / "model-00003.safetensors").rename(tmp_path / "elsewhere")
    assert "names the shard model-00003.safetensors, which is not in" in broken(tmp_path / "m")
    (tmp_path / "elsewhere").rename(tmp_path / "m" / "model-00003.safetensors")
    places = json.loads(index.read_text())
    places["weight_map"]["model.norm.weight"] = "../m/model-00001.safetensors"
    index.write_text(json.dumps(places))
    assert "names the shard ../m/" in broken(tmp_path / "m")
    places["weight_map"] = dict.fromkeys(places["weight_map"], "model-00001.safetensors")
    index.write_text(json.dumps(places))
    assert "should be in model-00001.safetensors, but is not" in broken(tmp_path / "m")
    places["weight_map"] = {name: ["model-00001.safetensors"] for name in places["weight_map"]}
    index.write_text(json.dumps(places))
    assert "names the shard ['model-00001.safetensors'], which is not in" in broken(tmp_path / "m")
    index.write_text("{}")
    assert "expected an object weight_map" in broken(tmp_path / "m")


def test_only_safetensors_are_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "only safetensors files are supported (it has pytorch_model.bin" in broken(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    assert broken(tmp_path).endswith("only safetensors files are supported")


def test_folders_and_names(tmp_path, monkeypatch):
    assert resolve(str(tmp_path)) == tmp_path
    with pytest.raises(UserError, match=r"nowhere: no such folder; expected a folder, or OWNER"):
        resolve("nowhere")
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match=r"no such folder; .* \(did you mean 'model'\?\)"):
        resolve(str(tmp_path / "modle"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: a file; expected a folder"):
        resolve(str(tmp_path / "file"))
    for address in ("https://huggingface.co/o/n", "http://www.huggingface.co/o/n/tree/main"):
        with pytest.raises(UserError, match=r"did you mean 'o/n'\?"):
            resolve(address)
    asked = []

    def snapshot(name, allow_patterns, ignore_patterns):
        asked.append((name, allow_patterns, ignore_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    hf_load._download.cache_clear()
    assert resolve("owner/name") == tmp_path == resolve("owner/name")
    assert len(asked) == 1 and asked[0][0] == "owner/name"
    assert "*.safetensors" in asked[0][1] and not any("bin" in p or "pt" in p for p in asked[0][1])
    hf_load._download.cache_clear()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_a_pipe_in_a_folder_is_never_read(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name}: a pipe or a device; expected a file"):
        resolve(str(tmp_path))


def test_weights_that_are_no_file_are_named(tmp_path):
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "nowhere")
    assert "model.safetensors: a folder or a link to nothing" in broken(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.gguf").touch()
    assert broken(tmp_path).endswith(
        "(it has model.gguf; give the folder that the GGUF was made of)"
    )


def test_a_hub_name_without_a_network_says_so():
    hf_load._download.cache_clear()
    with pytest.raises(UserError, match=r"owner/name: no such folder, .*offline") as e:
        resolve("owner/name")
    assert "\n" not in str(e.value)


def test_config_json_must_be_there_and_be_json(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object"):
        read_config(tmp_path)
    written = hf_config_json(MODELS["experts"].config, 32)
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert read_config(tmp_path).moe == MODELS["experts"].config.moe


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
@pytest.mark.parametrize(("dtype", "quantized"), [("float32", None), ("bfloat16", "int8")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value, dtype, quantized):
    write(tmp_path, "tied", dtype=dtype)
    name = "model.layers.1.mlp.up_proj.weight"

    def spoil(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name][2, 1] = value

    rewrite(tmp_path, spoil)
    where = rf"{tmp_path}/model.safetensors: {name} is not finite: -?(nan|inf) in row 2"
    with pytest.raises(UserError, match=where):
        read(tmp_path, "tied", quantized=quantized)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_the_first_value_that_is_not_finite_is_found(dtype, monkeypatch):
    monkeypatch.setattr(hf_files, "PIECE", 8)
    limits = jnp.finfo(dtype)
    values = np.array([limits.max, limits.min, 0.0, -0.0, limits.tiny, -1.0] * 5, dtype)
    assert hf_files.first_nonfinite(values) is None
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        for place in (0, 17, 29):
            spoilt = values.copy()
            spoilt[place:] = value
            assert hf_files.first_nonfinite(spoilt) == place


def test_a_header_without_bounds_is_no_header(tmp_path):
    file = tmp_path / "model.safetensors"
    with file.open("wb") as out:
        out.write(struct.pack("<Q", 2**30))
        out.truncate(2**31)  # sparse: takes no room
    with pytest.raises(UserError, match="a header of 1,073,741,824 bytes"):
        hf_files.stored_tensors(file)
    deep = b"[" * 100_000
    file.write_bytes(struct.pack("<Q", len(deep)) + deep)
    with pytest.raises(UserError, match="not a safetensors file"):
        hf_files.stored_tensors(file)
