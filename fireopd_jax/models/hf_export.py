"""Write a model as a Hugging Face folder: whole or not at all.

    parameters, tokenizer -> beside: model*.safetensors, their index, config.json,
    generation_config.json, tokenizer, README.md -> renamed

The folder loads in `transformers`, and in whatever else reads such folders, with the same logits.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from fireopd_jax.config import UserError
from fireopd_jax.models.architecture import DecoderConfig
from fireopd_jax.models.hf_config import hf_config_json
from fireopd_jax.models.hf_names import hf_shapes, hf_tensors
from fireopd_jax.models.language_model import Params

MAX_SHARD_BYTES = 4 * 2**30
INDEX = "model.safetensors.index.json"


def export_model(
    to: Path,
    params: Params,
    config: DecoderConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stop: Sequence[int],
    card: str,
    generation: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the folder `to`, which must be new or empty; `dtype` None keeps the parameters' type.

    `stop` are the ids that end a response, `generation` what else generation_config.json says.
    """
    check_target(to)
    dtype = dtype or str(jax.tree.leaves(params)[0].dtype.name)
    rows = len(params["embed_tokens"])
    ids = token_ids(tokenizer, stop, rows)
    # The largest risk first: an architecture that no family can say is refused before any file.
    described = hf_config_json(config, rows, dtype=dtype, **ids)
    to.parent.mkdir(parents=True, exist_ok=True)
    beside = to.with_name(f".writing-{to.name}-{os.getpid()}")
    try:
        beside.mkdir()
        write_json(beside / "config.json", described)
        write_weights(beside, params, config, dtype, max_shard_bytes)
        save_tokenizer(beside, tokenizer)
        write_json(beside / "generation_config.json", {**(generation or {}), **ids})
        (beside / "README.md").write_text(card, encoding="utf-8")
        settle(beside)
        try:
            beside.rename(to)
        except OSError as error:
            raise UserError(f"{to}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_target(to: Path) -> None:
    """Refuse a place where something stands."""
    if to.is_symlink() or (to.exists() and (not to.is_dir() or any(to.iterdir()))):
        raise UserError(f"{to} exists; expected a new or an empty folder, nothing is overwritten")


def token_ids(
    tokenizer: PreTrainedTokenizerBase, stop: Sequence[int], rows: int
) -> dict[str, int | list[int]]:
    """Name the ids that generation needs; one that has no row is left out."""
    ids: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": list(stop) if len(stop) > 1 else stop[0],
        "pad_token_id": tokenizer.pad_token_id,
    }
    return {k: v for k, v in ids.items() if isinstance(v, list) or (v is not None and v < rows)}


def write_weights(
    folder: Path, params: Params, config: DecoderConfig, dtype: str, max_shard_bytes: int
) -> None:
    """Write the tensors in shards of at most so many bytes; one shard at a time is in memory."""
    shapes = hf_shapes(config, len(params["embed_tokens"]))
    sizes = {
        name: jnp.dtype(dtype).itemsize * int(np.prod(shape)) for name, shape in shapes.items()
    }
    shards = list(plan_shards(sizes, max_shard_bytes))
    tensors = hf_tensors(params, config, dtype)
    index = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard = dict(next(tensors) for _ in names)
        assert list(shard) == names, "the tensors came in another order than their names"
        # Readers of the file take "pt" as the sign that its layout is PyTorch's.
        save_file(shard, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = {"total_size": sum(sizes.values())}
        write_json(folder / INDEX, {"metadata": total, "weight_map": index})


def plan_shards(sizes: Mapping[str, int], max_shard_bytes: int) -> Iterator[list[str]]:
    """Cut the names, in their order, into shards; a tensor above the limit has one to itself."""
    shard, filled = [], 0
    for name, size in sizes.items():
        if shard and filled + size > max_shard_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(name)
        filled += size
    yield shard


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save the tokenizer and its chat template, in words that older readers know, too."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    described = json.loads(file.read_text(encoding="utf-8"))
    # Both names are of transformers 5; version 4 fails on them, version 5 reads the older ones.
    if described.get("tokenizer_class") == "TokenizersBackend":
        described["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(extra := described.get("extra_special_tokens"), list):
        del described["extra_special_tokens"]
        described["additional_special_tokens"] = extra
    for name in ("is_local", "local_files_only", "trust_remote_code"):  # how it was read
        described.pop(name, None)
    write_json(file, described)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def settle(folder: Path) -> None:
    """Wait until the files are on the disk; all have the mode of new files."""
    mode = (folder / "config.json").stat().st_mode
    for file in folder.iterdir():
        file.chmod(mode)  # safetensors makes files that nobody else may read
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
