"""The weight files of a folder that are read, and their tensors by the names of `transformers`.

    folder -> model.safetensors, else the shards of its index -> headers -> names without wrappers
           -> compared with the architecture, before any tensor is read

Files are chosen as `transformers` chooses them; what is left out is logged.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fireopd_jax.config import UserError
from fireopd_jax.models.architecture import DecoderConfig
from fireopd_jax.models.hf_files import Stored, stored_tensors
from fireopd_jax.models.hf_names import hf_shapes
from fireopd_jax.runtime import limits

log = logging.getLogger(__name__)

BLOCK = 2**27
"""Bytes of a tensor that are compared at a time."""
SHOWN = 4
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WRAPPERS = {
    "_orig_mod": "torch.compile",
    "module": "DistributedDataParallel",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "pretrained_model": "TRL's value head",
}
"""Parts of tensor names that PyTorch's wrappers of a model add."""
HEAD = re.compile(r"(v_head|value_head|score|classifier|reward_head|critic_head)\.")
"""Heads for values and classes; a language model is computed without them."""


def open_folder(folder: Path) -> dict[str, Stored]:
    """Return the tensors of a folder by name, from its only file or its index, not read yet.

    Raises UserError if there is no safetensors file, or if index and shards disagree.
    """
    index, single = folder / INDEX, folder / SINGLE
    if single.is_file():
        stored = stored_tensors(single)
    elif index.is_file():
        stored = _indexed(index)
    else:
        raise _no_weights(folder)
    used = {tensor.file.name for tensor in stored.values()} | {single.name}
    used |= set() if single.is_file() else {index.name}
    kinds = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")
    names = {path.name for kind in kinds for path in folder.glob(kind)}
    if others := sorted(names - used):
        read = SINGLE if single.is_file() else INDEX
        log.warning(f"{folder}: {read} is read, as transformers does; not {_some(others)}")
    return _unwrapped(folder, stored)


def _indexed(index: Path) -> dict[str, Stored]:
    """Return the tensors that an index lists, from its shards."""
    folder, places = index.parent, read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise UserError(f"{index}: expected an object weight_map: tensor -> file")
    shards: dict[str, dict[str, Stored]] = {}
    for name in dict.fromkeys(map(str, places.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{index}: names the shard {name}, which is not in the folder")
        shards[name] = stored_tensors(folder / name)
    places = {tensor: str(name) for tensor, name in places.items()}
    for tensor, name in places.items():
        if tensor not in shards[name]:
            raise UserError(f"{index}: {tensor} should be in {name}, but is not")
    return {tensor: shards[name][tensor] for tensor, name in places.items()}


def _no_weights(folder: Path) -> UserError:
    """Return the error for a folder without the weight files that are read."""
    if (folder / SINGLE).is_symlink() or (folder / SINGLE).exists():
        return UserError(f"{folder / SINGLE}: a folder or a link to nothing; expected a file")
    alone = sorted(path.name for path in folder.glob("*.safetensors"))
    if alone:
        return UserError(
            f"{folder}: {_some(alone)} without {INDEX}, the list of which tensor is in which file; "
            f"copy it from where the files are from (or rename a complete file to {SINGLE})"
        )
    other = sorted(path.name for kind in ("*.bin", "*.pt*") for path in folder.glob(kind))
    hint = f" (it has {other[0]}, a format that can run code when read)" if other else ""
    if packed := sorted(path.name for path in folder.glob("*.gguf")):
        hint = f" (it has {packed[0]}; give the folder that the GGUF was made of)"
    return UserError(
        f"{folder}: no {SINGLE} and no {INDEX}; only safetensors files are supported{hint}"
    )


def _unwrapped(folder: Path, stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """Return the tensors by their names in the model class, without those of wrappers around it.

    A file of the model below the language model, without its `model.`, is read as well.
    """
    plain = {
        name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in stored
    }
    base = "model." if "embed_tokens.weight" in plain.values() else ""
    found: dict[str, Stored] = {}
    for name, tensor in stored.items():
        key = plain[name]
        if not key.startswith("lm_head.") and HEAD.match(key) is None:
            key = base + key
        if key in found:
            raise UserError(f"{folder}: two tensors are {key}, one of them named {name}")
        found[key] = tensor
    removed = dict.fromkeys(part for name in stored for part in name.split(".") if part in WRAPPERS)
    if removed:
        named = ", ".join(f"{part}. ({WRAPPERS[part]})" for part in removed)
        log.warning(f"{folder}: tensor names are read without {named}")
    return found


def refuse_adapters(folder: Path) -> None:
    """Raise UserError for a folder with adapters, which `transformers` adds to the weights."""
    file = folder / "adapter_config.json"
    if file.is_file():
        base = read_json(file).get("base_model_name_or_path")
        raise UserError(
            f"{file}: adapters (of {base}) are not read, and weights beside them would be another "
            "model without them; merge them (merge_and_unload of peft), or remove this file if the "
            "weights have them already"
        )


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raise UserError if it holds something else."""
    try:
        values = limits.read_json(file)
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected a JSON object")
    return values


def check_tensors(
    folder: Path, stored: Mapping[str, Stored], config: DecoderConfig, vocab_size: int
) -> None:
    """Raise UserError for missing, unexpected and wrongly shaped tensors, before any is read."""
    expected = hf_shapes(config, vocab_size)
    if missing := [name for name in expected if name not in stored]:
        hint = ""
        if missing == ["lm_head.weight"]:
            hint = "; does config.json lack tie_word_embeddings: true?"
            if heads := [name for name in stored if HEAD.match(name)]:
                hint = f"; {heads[0]} makes it a classifier, not a language model"
        raise UserError(f"{folder}: missing tensors: {_some(missing)}{hint}")
    extra = [name for name in stored if name not in expected]
    extra = [name for name in extra if not name.endswith("rotary_emb.inv_freq")]
    if config.tie_word_embeddings and "lm_head.weight" in extra:
        if not _equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"]):
            raise UserError(
                f"{folder}: lm_head.weight differs from model.embed_tokens.weight, but config.json "
                "has tie_word_embeddings: true"
            )
        extra.remove("lm_head.weight")
    if heads := [name for name in extra if HEAD.match(name)]:
        log.warning(f"{folder}: {_some(heads)} not read: a head for values or classes")
    if extra := [name for name in extra if name not in heads]:
        raise UserError(
            f"{folder}: unexpected tensors for a {config.model_type} model with this config.json: "
            f"{_some(extra)}"
        )
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise UserError(
                f"{stored[name].file}: {name} has shape {list(stored[name].shape)}, "
                f"config.json implies {list(shape)}"
            )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _equal(a: Stored, b: Stored) -> bool:
    """Return whether two tensors are equal, compared block by block."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False

    def blocks(tensor: Stored) -> Iterator[np.ndarray]:
        step = max(1, BLOCK * tensor.shape[0] // max(tensor.bytes, 1))
        for start in range(0, tensor.shape[0], step):
            yield tensor.rows(start, min(start + step, tensor.shape[0]))

    return all(np.array_equal(x, y) for x, y in zip(blocks(a), blocks(b), strict=True))
