"""Hostile models: folders that are damaged, incomplete, of another kind, or made to do harm."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from tests.hostile.case import Case, loaded

Damage = Callable[[Path], object]
WEIGHTS = "model.safetensors"


def write(name: str, content: str | bytes) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def without(*names: str) -> Damage:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def edited(name: str = "config.json", **values: object) -> Damage:
    """Change keys of a JSON file; ... deletes one."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | values
        kept = {key: value for key, value in content.items() if value is not ...}
        (folder / name).write_text(json.dumps(kept))

    return damage


def cut(name: str, count: int) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:count])

    return damage


def tensors(change: Callable[[dict], object]) -> Damage:
    """Change the weights, by a function of the dict of them."""

    def damage(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS)

    return damage


def header(content: dict | bytes, size: int | None = None, data: int = 0) -> Damage:
    """Write a weight file with this header, and a size that need not be its own."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return write(
        WEIGHTS, struct.pack("<Q", len(text) if size is None else size) + text + bytes(data)
    )


def poisoned(value: float) -> Damage:
    def change(weights: dict) -> None:
        weights["model.norm.weight"] = weights["model.norm.weight"].copy()
        weights["model.norm.weight"][3] = value

    return tensors(change)


def both(*damages: Damage) -> Damage:
    def damage(folder: Path) -> None:
        for each in damages:
            each(folder)

    return damage


ONE = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
NORM = "model.norm.weight"

CASES = (
    Case(
        "a folder that is not there",
        "fireopd train small.yaml student.path=DIRR",
        "did you mean 'DIR'",
    ),
    Case("an empty folder", "mkdir E; fireopd train small.yaml student.path=E", "config.json"),
    Case(
        "a file as a model", "fireopd train small.yaml student.path=prompts.jsonl", "prompts.jsonl"
    ),
    Case(
        "a name of the hub without a network",
        "fireopd train small.yaml teacher.path=Qwen/Qwen3-8B",
        "Qwen/Qwen3-8B",
    ),
    Case(
        "a name of the hub with a line break",
        "fireopd train small.yaml teacher.path=$'Qwen/a\\nb'",
        "no such folder",
    ),
    Case(
        "an address as a model",
        "fireopd train small.yaml teacher.path=https://huggingface.co/Qwen/Qwen3-8B",
        "did you mean 'Qwen/Qwen3-8B'",
    ),
    loaded("no config.json", without("config.json"), "config.json"),
    loaded("an empty config.json", write("config.json", ""), "config.json"),
    loaded("a config.json of a list", write("config.json", "[]"), "config.json"),
    loaded("a config.json of 100,000 brackets", write("config.json", "[" * 100_000), "config.json"),
    loaded(
        "a config.json that is not UTF-8",
        write("config.json", b'{"model_type": "\xff"}'),
        "config.json",
    ),
    loaded("no model_type", edited(model_type=...), "", 0),
    loaded("a model_type that is a number", edited(model_type=3), "model_type"),
    loaded("a family that is not there", edited(model_type="gpt2"), "gpt2"),
    loaded("a vision model", edited(model_type="qwen2_vl"), "qwen2_vl"),
    loaded("a negative width", edited(hidden_size=-4), "hidden_size"),
    loaded("no layers", edited(num_hidden_layers=0), "num_hidden_layers"),
    loaded("10^9 layers", edited(num_hidden_layers=10**9), "num_hidden_layers"),
    loaded("a width of 10^12", edited(hidden_size=10**12), "hidden_size"),
    loaded("a width that is a text", edited(hidden_size="64"), "hidden_size"),
    loaded("a width with a fraction", edited(hidden_size=32.5), "hidden_size"),
    loaded("a width that is null", edited(hidden_size=None), "hidden_size"),
    loaded("no vocab_size", edited(vocab_size=...), "vocab_size"),
    loaded("heads that do not divide", edited(num_key_value_heads=3), "num_key_value_heads"),
    loaded("an epsilon that is NaN", edited(rms_norm_eps=float("nan")), "rms_norm_eps"),
    loaded(
        "a RoPE that is not there",
        edited(rope_scaling={"rope_type": "magic", "factor": 2.0}),
        "magic",
    ),
    loaded("a RoPE without a factor", edited(rope_scaling={"rope_type": "yarn"}), "factor"),
    loaded(
        "a RoPE with a factor of 0",
        edited(rope_scaling={"rope_type": "linear", "factor": 0}),
        "factor",
    ),
    loaded("an activation that is not there", edited(hidden_act="relu6"), "relu6"),
    loaded(
        "quantized by AWQ", edited(quantization_config={"quant_method": "awq", "bits": 4}), "awq"
    ),
    loaded("code of its own", edited(auto_map={"AutoModelForCausalLM": "evil.Model"}), "never run"),
    loaded(
        "a key that nobody knows", edited(my_note="hello"), "student.ignore_config_keys=[my_note]"
    ),
    loaded(
        "fewer positions than a row", edited(max_position_embeddings=16), "max_position_embeddings"
    ),
    loaded("no weights", without(WEIGHTS), "safetensors"),
    loaded("weights of 0 bytes", write(WEIGHTS, b""), WEIGHTS),
    loaded("weights of 7 bytes", write(WEIGHTS, b"1234567"), WEIGHTS),
    loaded("weights cut short", cut(WEIGHTS, 2000), WEIGHTS),
    loaded(
        "weights without their last byte",
        lambda f: cut(WEIGHTS, (f / WEIGHTS).stat().st_size - 1)(f),
        WEIGHTS,
    ),
    loaded("a header of 2^62 bytes", header(b"{}", 2**62), WEIGHTS),
    loaded("a header of 2^63 bytes", header(b"{}", 2**63), WEIGHTS),
    loaded("a header that is no JSON", header(b"{nonsense"), WEIGHTS),
    loaded("a header of 100,000 brackets", header(b"[" * 100_000), WEIGHTS),
    loaded("a header of a list", header(b"[]"), WEIGHTS),
    loaded(
        "a tensor beyond the file", header({NORM: ONE | {"data_offsets": [0, 1 << 40]}}), WEIGHTS
    ),
    loaded("a tensor before the file", header({NORM: ONE | {"data_offsets": [-16, 0]}}), WEIGHTS),
    loaded(
        "offsets turned round", header({NORM: ONE | {"data_offsets": [16, 0]}}, data=16), WEIGHTS
    ),
    loaded("a dtype that is not there", header({NORM: ONE | {"dtype": "F7"}}, data=16), WEIGHTS),
    loaded("a shape of 2^40", header({NORM: ONE | {"shape": [1 << 40]}}, data=16), WEIGHTS),
    loaded("a negative shape", header({NORM: ONE | {"shape": [-4]}}, data=16), WEIGHTS),
    loaded("a shape that is a text", header({NORM: ONE | {"shape": "4"}}, data=16), WEIGHTS),
    loaded("tensors that overlap", header({NORM: ONE, "x": ONE}, data=16), WEIGHTS),
    loaded("a tensor that is missing", tensors(lambda w: w.pop(NORM)), NORM),
    loaded(
        "a tensor too many", tensors(lambda w: w.update({"model.extra": w[NORM]})), "model.extra"
    ),
    loaded(
        "a tensor of another shape",
        tensors(lambda w: w.update({NORM: np.ones(5, np.float32)})),
        NORM,
    ),
    loaded(
        "a tensor of integers", tensors(lambda w: w.update({NORM: w[NORM].astype(np.int32)})), NORM
    ),
    loaded(
        "a tensor of float8",
        tensors(lambda w: w.update({NORM: w[NORM].astype(ml_dtypes.float8_e4m3fn)})),
        NORM,
    ),
    loaded("a weight that is NaN", poisoned(float("nan")), NORM),
    loaded("a weight that is infinite", poisoned(float("inf")), NORM),
    loaded(
        "an index to a file outside",
        both(
            write(
                "model.safetensors.index.json",
                json.dumps({"weight_map": {NORM: "../../x.safetensors"}}),
            ),
            without(WEIGHTS),
        ),
        "index.json",
    ),
    loaded(
        "an index to a file that is not there",
        both(
            write(
                "model.safetensors.index.json",
                json.dumps({"weight_map": {NORM: "model-00001.safetensors"}}),
            ),
            without(WEIGHTS),
        ),
        "model-00001",
    ),
    loaded(
        "an index without a map",
        both(write("model.safetensors.index.json", "{}"), without(WEIGHTS)),
        "weight_map",
    ),
    loaded(
        "a pickle in place of weights",
        both(without(WEIGHTS), write("pytorch_model.bin", b"\x80\x04cos\nsystem\n(S'true'\ntR.")),
        "safetensors",
    ),
    loaded(
        "a GGUF in place of weights",
        both(without(WEIGHTS), write("model.gguf", b"GGUF" + bytes(40))),
        "GGUF",
    ),
    loaded(
        "a pointer of Git LFS",
        write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"),
        "LFS",
    ),
    loaded(
        "adapters without their model",
        both(
            without("config.json", WEIGHTS),
            write("adapter_config.json", '{"base_model_name_or_path": "x"}'),
        ),
        "adapter",
    ),
    loaded("no tokenizer", lambda f: [p.unlink() for p in f.glob("*token*")], "tokenizer"),
    loaded("an empty tokenizer.json", write("tokenizer.json", ""), "tokenizer"),
    loaded(
        "a tokenizer.json of another kind",
        write("tokenizer.json", '{"model": {"type": "Magic"}}'),
        "tokenizer",
    ),
    loaded(
        "a template with a mistake",
        write("chat_template.jinja", "{% for m in messages %}"),
        "template",
    ),
    loaded(
        "a template that raises",
        write("chat_template.jinja", "{{ raise_exception('no system role') }}"),
        "no system role",
    ),
    loaded(
        "a template that never ends",
        write("chat_template.jinja", "{% for a in range(10**9) %}{% endfor %}"),
        "template",
    ),
    loaded("a template that grows", write("chat_template.jinja", "{{ 'a' * 10**10 }}"), "template"),
    loaded(
        "a template that looks around",
        write("chat_template.jinja", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
        "template",
    ),
    loaded(
        "a template that leaves out the prompt", write("chat_template.jinja", "hello"), "template"
    ),
    loaded(
        "a template that calls itself",
        write(
            "chat_template.jinja", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}{{ messages }}"
        ),
        "template",
    ),
    loaded(
        "an eos that is a text",
        edited("generation_config.json", eos_token_id="</s>"),
        "eos_token_id",
    ),
    loaded(
        "an eos beyond the vocabulary",
        edited("generation_config.json", eos_token_id=10**6),
        "eos_token_id",
    ),
    loaded("a negative eos", edited("generation_config.json", eos_token_id=-1), "eos_token_id"),
    loaded(
        "a broken generation_config.json",
        write("generation_config.json", "{"),
        "generation_config.json",
    ),
    loaded("a smaller vocabulary than the tokenizer's", edited(vocab_size=100), "vocab"),
    Case(
        "a teacher of another tokenizer",
        "cp -r DIR T; sed -i 's/<|user|>/<|human|>/g' T/*.json T/*.jinja;"
        " fireopd train small.yaml teacher.path=T run.steps=1",
        "<|human|>",
    ),
    Case(
        "weights that nobody may read",
        "rm DIR/model.safetensors; mkdir DIR/model.safetensors; fireopd train small.yaml",
        "model.safetensors",
    ),
    Case(
        "a pipe as weights",
        "rm DIR/model.safetensors; mkfifo DIR/model.safetensors; fireopd train small.yaml",
        "a pipe or a device",
    ),
    Case(
        "a link to nowhere as weights",
        "rm DIR/model.safetensors; ln -s nowhere DIR/model.safetensors; fireopd train small.yaml",
        "model.safetensors",
    ),
    Case(
        "a pipe as config.json",
        "rm DIR/config.json; mkfifo DIR/config.json; fireopd train small.yaml",
        "config.json",
    ),
    Case(
        "a pipe as a template",
        "rm DIR/chat_template.jinja; mkfifo DIR/chat_template.jinja; fireopd train small.yaml",
        "a pipe or a device",
    ),
    Case(
        "weights that change while they are read",
        "(sleep 3; truncate -s 100 DIR/model.safetensors) & fireopd train small.yaml run.steps=1",
        "",
        status=None,
    ),
)
