"""From a folder or a hub name to parameters: safetensors, tensor by tensor, to their places.

    name -> folder -> config.json -> architecture
    folder -> index, headers -> names and shapes checked -> each tensor -> its slice on the devices

The host holds one tensor and a small buffer; what a stack of layers takes, it takes on the devices.
Where these are CPUs, a stack is filled in memory and given to them as it is, block by block.
What is quantised is so tensor by tensor, before it joins its stack.
Nothing is unpickled and no code of a folder is run.
"""

import functools
import itertools
import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from fireopd_jax.config import UserError
from fireopd_jax.models.architecture import DecoderConfig
from fireopd_jax.models.hf_config import architecture
from fireopd_jax.models.hf_files import (
    Slices,
    Stored,
    allocate,
    copy_rows,
    quantize_into,
    stored_tensors,
)
from fireopd_jax.models.hf_names import Weight, flat, hf_shapes, indices, weights
from fireopd_jax.models.language_model import Params
from fireopd_jax.models.quantized import Quantize, Quantized, quantizable, quantize, scale_place

BUFFER = 2**27
"""Bytes that are read ahead of their use."""
READERS = 2
BLOCK = 2**21
"""Bytes that are read at a time into the memory of a CPU device."""
SHOWN = 4
Index = tuple[int, ...]
Bounds = tuple[tuple[int, int], ...]
"""Start and end along each axis."""
WANTED = ("*.safetensors", "*.json", "*.jinja", "tokenizer*", "vocab*", "merges.txt")
UNWANTED = ("*/*", "consolidated*")


def resolve(name: str) -> Path:
    """Find a local folder, or fetch `owner/name` from the hub: weights, configs, tokenizer."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is None:
        raise UserError(f"{name}: no such folder; expected a folder, or OWNER/NAME of the hub")
    return _download(name)


@functools.cache
def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(name, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED))
    except Exception as error:  # its own errors, and those of three network libraries
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{name}: no such folder here, and the Hugging Face hub does not give it "
            f"(offline, misspelt, or gated?): {reason[:300]}"
        ) from error
    return Path(found)


def read_config(folder: Path) -> DecoderConfig:
    """Read the architecture of a folder."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder}: no config.json; expected a model folder of Hugging Face")
    return architecture(_read_json(file), str(file))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected a JSON object")
    return values


def load(
    folder: Path,
    config: DecoderConfig,
    vocab_size: int,
    sharding: Any,
    quantized: Quantize | None = None,
) -> Params:
    """Read the parameters of a folder in `config.param_dtype`; with `quantized`, kernels in that.

    `sharding` is one for all, or a tree of them like the parameters before they are quantised.
    """
    stored = open_folder(folder)
    _check(folder, stored, config, vocab_size)
    places: Mapping = {}
    if not isinstance(sharding, Sharding):
        places = {flat(path): leaf for path, leaf in jax.tree.leaves_with_path(sharding)}
    params: Params = {}
    with ThreadPoolExecutor(READERS) as pool:
        for row, ours in weights(config, vocab_size):
            place = sharding if isinstance(sharding, Sharding) else places[row.path]
            *sections, last = row.path
            section = params
            for name in sections:
                section = section.setdefault(name, {})
            whole = quantized is None or not quantizable(row.path)
            if on_cpu(place):
                fill = _in_memory if whole else _quantized_in_memory
            else:
                fill = _on_devices if whole else _quantized_on_devices
            section[last] = fill(row, ours, place, stored, pool)
    return params


def on_cpu(place: Sharding) -> bool:
    """Tell whether the memory of the devices is that of the host."""
    return all(device.platform == "cpu" for device in place.device_set)


def _in_memory(
    row: Weight,
    ours: jax.ShapeDtypeStruct,
    place: Sharding,
    stored: Mapping[str, Stored],
    pool: ThreadPoolExecutor,
) -> jax.Array:
    """Fill one parameter's memory."""
    memory = _Memory(ours.shape, np.dtype(ours.dtype), place)
    blocks = [block for item in memory.parts.items() for block in _blocks(row, *item, stored)]
    for done in [pool.submit(copy_rows, *block) for block in blocks]:
        done.result()
    return memory.lent()


def _quantized_in_memory(
    row: Weight,
    ours: jax.ShapeDtypeStruct,
    place: Sharding,
    stored: Mapping[str, Stored],
    pool: ThreadPoolExecutor,
) -> Quantized:
    """Fill the memory of one kernel's numbers and steps; a block of their rows has its own."""
    values = _Memory(ours.shape, np.dtype(np.int8), place)
    shape = (*ours.shape[:-2], 1, ours.shape[-1])
    scale = _Memory(shape, np.dtype(np.float32), scale_place(place, len(shape)))
    waiting = []
    for bounds, part in values.parts.items():
        steps = scale.parts[(*bounds[:-2], (0, 1), bounds[-1])]
        for block, (*_, target) in zip(
            _blocks(row, bounds, part, stored),
            _blocks(row, (*bounds[:-2], (0, 1), bounds[-1]), steps, stored),
            strict=True,
        ):
            waiting.append(pool.submit(quantize_into, *block, target))
    for done in waiting:
        done.result()
    return Quantized(values.lent(), scale.lent())


class _Memory:
    """Memory of one array: each part that a device here holds, once."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, place: Sharding):
        self.shape, self.place = shape, place
        self.parts: dict[Bounds, np.ndarray] = {}
        self.on_device = []
        for device, index in place.addressable_devices_indices_map(shape).items():
            assert index is not None
            bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
            if bounds not in self.parts:
                self.parts[bounds] = allocate(tuple(b - a for a, b in bounds), dtype)
            self.on_device.append((device, bounds))

    def lent(self) -> jax.Array:
        """Give it to the devices as it is."""
        # Devices may share a part: what the host has lent, a program never writes to.
        pieces = [jax.device_put(self.parts[bounds], d) for d, bounds in self.on_device]
        return jax.make_array_from_single_device_arrays(self.shape, self.place, pieces)


def _blocks(
    row: Weight, bounds: Bounds, part: np.ndarray, stored: Mapping[str, Stored]
) -> Iterator[tuple[Stored, int, int, Slices, np.ndarray]]:
    """Cut what a part needs of the files into blocks of rows, each with where it belongs."""
    layers, own = bounds[: row.axes], bounds[row.axes :]
    if row.transposed:
        own = own[::-1]
    (first, last), *others = own
    columns = tuple(slice(*each) for each in others)
    for index in itertools.product(*(range(*each) for each in layers)):
        tensor = stored[row.theirs(index)]
        target = part[tuple(i - start for i, (start, _) in zip(index, layers, strict=True))]
        target = target.T if row.transposed else target
        step = max(1, BLOCK * tensor.shape[0] // max(tensor.bytes, 1))
        for start in range(first, last, step):
            stop = min(start + step, last)
            yield tensor, start, stop, columns, target[start - first : stop - first]


def _on_devices(
    row: Weight,
    ours: jax.ShapeDtypeStruct,
    place: Sharding,
    stored: Mapping[str, Stored],
    pool: ThreadPoolExecutor,
) -> jax.Array:
    """Put the tensors of one parameter where they belong, one after another."""
    axes = row.axes
    piece_place = _of_piece(row, ours, place)

    def laid(piece: jax.Array) -> jax.Array:
        return (piece.T if row.transposed else piece).astype(ours.dtype)

    if not axes:
        piece = stored[row.name].place(piece_place)
        plain = piece.dtype == ours.dtype and not row.transposed
        return piece if plain else jax.jit(laid, out_shardings=place)(piece)

    return _stacked(row, ours, place, laid, stored, pool)


def _quantized_on_devices(
    row: Weight,
    ours: jax.ShapeDtypeStruct,
    place: Sharding,
    stored: Mapping[str, Stored],
    pool: ThreadPoolExecutor,
) -> Quantized:
    """Put the tensors of one kernel where they belong, each quantised there."""
    return _stacked(row, ours, place, lambda piece: quantize(piece.T), stored, pool)


def _stacked(
    row: Weight,
    ours: jax.ShapeDtypeStruct,
    place: Sharding,
    laid: Callable[[jax.Array], Any],
    stored: Mapping[str, Stored],
    pool: ThreadPoolExecutor,
) -> Any:
    """Stack tensors on the devices, each as `laid` lays it: an array, or a tree of arrays."""
    axes = row.axes
    piece = jax.ShapeDtypeStruct(row.shape(ours.shape), ours.dtype)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((*ours.shape[:axes], *leaf.shape), leaf.dtype),
        jax.eval_shape(laid, piece),
    )
    places = jax.tree.map(
        lambda leaf: place if leaf.shape == ours.shape else scale_place(place, len(ours.shape)),
        shapes,
    )

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=places)
    def put(stack: Any, piece: jax.Array, index: jax.Array) -> Any:
        start = (*index, *[0] * (len(ours.shape) - axes))
        return jax.tree.map(
            lambda whole, part: jax.lax.dynamic_update_slice(whole, part[(None,) * axes], start),
            stack,
            laid(piece),
        )

    def zeros() -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    stack = jax.jit(zeros, out_shardings=places)()
    every = [(index, stored[row.theirs(index)]) for index in indices(row, ours.shape)]
    for index, piece in _ahead(every, _of_piece(row, ours, place), pool):
        stack = put(stack, piece, np.array(index, np.int32))
    return jax.block_until_ready(stack)


def _ahead(
    tensors: Sequence[tuple[Index, Stored]], place: Sharding, pool: ThreadPoolExecutor
) -> Iterator[tuple[Index, jax.Array]]:
    """Read tensors in order, some ahead of their use, within the buffer."""
    coming: deque[tuple[Index, int, Future[jax.Array]]] = deque()

    def first() -> tuple[Index, jax.Array]:
        index, _, piece = coming.popleft()
        return index, jax.block_until_ready(piece.result())

    for index, tensor in tensors:
        while coming and sum(size for _, size, _ in coming) + tensor.bytes > BUFFER:
            yield first()
        coming.append((index, tensor.bytes, pool.submit(tensor.place, place)))
    while coming:
        yield first()


def _of_piece(row: Weight, ours: jax.ShapeDtypeStruct, place: Sharding) -> Sharding:
    """Give the sharding of one of their tensors, so that devices get what they will keep."""
    if not isinstance(place, NamedSharding):
        return place
    spec = [*place.spec, *[None] * (len(ours.shape) - len(place.spec))][row.axes :]
    return NamedSharding(place.mesh, PartitionSpec(*(spec[::-1] if row.transposed else spec)))


def open_folder(folder: Path) -> dict[str, Stored]:
    """List the tensors of a folder: by its index, or of its only file."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.is_file():
        if single.is_file():
            return stored_tensors(single)
        other = sorted(path.name for path in folder.glob("*.bin"))
        other += sorted(path.name for path in folder.glob("*.pt*"))
        hint = f" (it holds {other[0]}, which could run code when read)" if other else ""
        raise UserError(
            f"{folder}: no model.safetensors and no model.safetensors.index.json; only "
            f"safetensors are read{hint}"
        )
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise UserError(f"{index}: expected an object weight_map: tensor -> file")
    shards: dict[str, dict[str, Stored]] = {}
    for name in dict.fromkeys(places.values()):
        if Path(str(name)).name != name or not (folder / name).is_file():
            raise UserError(f"{index}: names the shard {name}, which is not in the folder")
        shards[name] = stored_tensors(folder / name)
    for tensor, name in places.items():
        if tensor not in shards[name]:
            raise UserError(f"{index}: {tensor} should be in {name}, but is not")
    return {tensor: shards[name][tensor] for tensor, name in places.items()}


def _check(
    folder: Path, stored: Mapping[str, Stored], config: DecoderConfig, vocab_size: int
) -> None:
    """Refuse missing, extra and wrongly shaped tensors before any is read."""
    expected = hf_shapes(config, vocab_size)
    if missing := [name for name in expected if name not in stored]:
        hint = ""
        if missing == ["lm_head.weight"]:
            hint = "; does config.json lack tie_word_embeddings: true?"
        raise UserError(f"{folder}: missing tensors: {_some(missing)}{hint}")
    extra = [name for name in stored if name not in expected]
    extra = [name for name in extra if not name.endswith("rotary_emb.inv_freq")]
    if config.tie_word_embeddings and "lm_head.weight" in extra:
        if not _equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"]):
            raise UserError(
                f"{folder}: lm_head.weight differs from model.embed_tokens.weight, but config.json "
                "says tie_word_embeddings: true"
            )
        extra.remove("lm_head.weight")
    if extra:
        raise UserError(
            f"{folder}: tensors that a {config.model_type} model of this config.json does not "
            f"have: {_some(extra)}"
        )
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise UserError(
                f"{stored[name].file}: {name} has the shape {list(stored[name].shape)}, "
                f"config.json asks for {list(shape)}"
            )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _equal(a: Stored, b: Stored) -> bool:
    """Compare two tensors block by block."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False

    def blocks(tensor: Stored) -> Iterator[np.ndarray]:
        step = max(1, BUFFER * tensor.shape[0] // max(tensor.bytes, 1))
        for start in range(0, tensor.shape[0], step):
            yield tensor.rows(start, min(start + step, tensor.shape[0]))

    return all(np.array_equal(x, y) for x, y in zip(blocks(a), blocks(b), strict=True))
