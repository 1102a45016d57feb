"""Write a model as a Hugging Face folder, atomically: it is complete or absent.

    parameters, tokenizer -> temporary folder: model*.safetensors, their index, config.json,
    generation_config.json, tokenizer, README.md -> renamed

The folder loads in `transformers` and in programs that read such folders, with the same logits.
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
    """Write the folder `to`, which must be new or empty; `dtype` None keeps the parameters' dtype.

    `stop` are the token ids that end a response, `generation` other keys of generation_config.json.

    Raises UserError if `to` is not empty or cannot be written, or if no Hugging Face family can
    express the architecture.
    """
    check_target(to)
    dtype = dtype or str(jax.tree.leaves(params)[0].dtype.name)
    rows = len(params["embed_tokens"])
    ids = token_ids(tokenizer, stop, rows)
    # First, because an architecture that its family cannot express must fail before any file.
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
    """Raise UserError unless `to` is absent or an empty folder."""
    if to.is_symlink() or (to.exists() and (not to.is_dir() or any(to.iterdir()))):
        raise UserError(f"{to} exists; expected a new or an empty folder, nothing is overwritten")


def token_ids(
    tokenizer: PreTrainedTokenizerBase, stop: Sequence[int], rows: int
) -> dict[str, int | list[int]]:
    """Return the special token ids of the config files; ids outside the vocabulary are left out."""
    ids: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": list(stop) if len(stop) > 1 else stop[0],
        "pad_token_id": tokenizer.pad_token_id,
    }
    return {k: v for k, v in ids.items() if isinstance(v, list) or (v is not None and v < rows)}


def write_weights(
    folder: Path, params: Params, config: DecoderConfig, dtype: str, max_shard_bytes: int
) -> None:
    """Write the tensors in shards of at most `max_shard_bytes`, one shard in memory at a time."""
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
        assert list(shard) == names, "hf_tensors and hf_shapes disagree about the order of tensors"
        # `transformers` requires this metadata to load the file.
        save_file(shard, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = {"total_size": sum(sizes.values())}
        write_json(folder / INDEX, {"metadata": total, "weight_map": index})


def plan_shards(sizes: Mapping[str, int], max_shard_bytes: int) -> Iterator[list[str]]:
    """Yield the names of each shard, in order; a tensor above the limit has its own shard."""
    shard, filled = [], 0
    for name, size in sizes.items():
        if shard and filled + size > max_shard_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(name)
        filled += size
    yield shard


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save the tokenizer and its chat template so that `transformers` 4 and 5 can read them."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    described = json.loads(file.read_text(encoding="utf-8"))
    # transformers 4 fails on these two names of version 5, which also reads the older ones.
    if described.get("tokenizer_class") == "TokenizersBackend":
        described["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(extra := described.get("extra_special_tokens"), list):
        del described["extra_special_tokens"]
        described["additional_special_tokens"] = extra
    for name in ("is_local", "local_files_only", "trust_remote_code"):  # local loading options
        described.pop(name, None)
    write_json(file, described)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def settle(folder: Path) -> None:
    """Flush all files to disk, with the permissions of config.json."""
    mode = (folder / "config.json").stat().st_mode
    for file in folder.iterdir():
        file.chmod(mode)  # safetensors writes files that only the owner may read
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
