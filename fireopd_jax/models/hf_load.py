"""Load parameters from a folder or a hub name: safetensors files, tensor by tensor, sharded.

    name -> folder -> config.json -> architecture
    folder -> index, headers -> names and shapes checked -> each tensor -> its shards on the devices

On accelerators the host holds a few tensors at a time, and layers are stacked on the devices. On
CPU devices the memory of each stacked parameter is filled in place, block by block, and passed to
the devices without a copy. Kernels are quantised tensor by tensor, before they are stacked.
Nothing is unpickled, and no code in a folder is run.
"""

import fnmatch
import functools
import itertools
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

from fireopd_jax.config import UserError, nearest
from fireopd_jax.models.architecture import DecoderConfig
from fireopd_jax.models.hf_config import architecture
from fireopd_jax.models.hf_files import Slices, Stored, allocate, copy_rows, quantize_into
from fireopd_jax.models.hf_forms import NONE_IGNORED, IgnoredKeys
from fireopd_jax.models.hf_names import weights
from fireopd_jax.models.hf_weights import check_tensors, open_folder, read_json
from fireopd_jax.models.language_model import Params
from fireopd_jax.models.quantized import Quantize, Quantized, quantizable, quantize, scale_place
from fireopd_jax.models.weights import Weight, flat, indices

BUFFER = 2**27
"""Bytes that are read ahead."""
READERS = 2
BLOCK = 2**21
"""Bytes that one read takes into the memory of a CPU device."""
Index = tuple[int, ...]
Bounds = tuple[tuple[int, int], ...]
"""Start and end on each axis."""
WANTED = ("*.safetensors", "*.json", "*.jinja", "tokenizer*", "vocab*", "merges.txt", "*.model",
          "*.tiktoken")  # fmt: skip
ON_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
UNWANTED = ("*/*", "consolidated*")


def resolve(name: str) -> Path:
    """Return a local folder, or download weights, configs and tokenizer of `owner/name`.

    Raises UserError if there is no such folder and the hub does not have it, and for a folder with
    a pipe or a device under the name of a file.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        _refuse_pipes(folder)
        return folder
    if ON_HUB.fullmatch(name):
        return _download(name)
    address = re.match(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#]+/[^/?#]+)", name)
    meant = f" (did you mean {address[1]!r}?)" if address else nearest(folder.name, _beside(folder))
    kind = "a file" if folder.is_file() else "no such folder"
    raise UserError(f"{name}: {kind}; expected a folder, or OWNER/NAME of the hub{meant}")


def _refuse_pipes(folder: Path) -> None:
    """Raise UserError for what would be waited for without end when it is read."""
    for entry in sorted(folder.iterdir()):
        wanted = any(fnmatch.fnmatch(entry.name, pattern) for pattern in WANTED)
        if wanted and entry.exists() and not (entry.is_file() or entry.is_dir()):
            raise UserError(f"{entry}: a pipe or a device; expected a file")


def _beside(path: Path) -> list[str]:
    """Return the names of the folders beside a path; none where they cannot be listed."""
    try:
        return sorted(each.name for each in path.parent.iterdir() if each.is_dir())
    except OSError:
        return []


@functools.cache
def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(name, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED))
    except Exception as error:  # Its own errors and those of three network libraries.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{name}: no such folder, and the download from the Hugging Face hub failed "
            f"(offline, misspelt, or gated?): {reason[:300]}"
        ) from error
    return Path(found)


def read_config(folder: Path, ignored: IgnoredKeys = NONE_IGNORED) -> DecoderConfig:
    """Return the architecture in a folder's `config.json`, read without the `ignored` keys."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder}: no config.json; expected a model folder of Hugging Face")
    return architecture(read_json(file), str(file), ignored)


def load(
    folder: Path,
    config: DecoderConfig,
    vocab_size: int,
    sharding: Any,
    quantized: Quantize | None = None,
) -> Params:
    """Return the parameters of a folder in `config.param_dtype`, kernels quantised on request.

    `sharding` is one sharding for all, or a tree of them like the parameters before quantisation.

    Raises UserError if tensors are missing, unexpected or have other shapes than `config` implies.
    """
    stored = open_folder(folder)
    check_tensors(folder, stored, config, vocab_size)
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
    """Return whether the sharding's devices are CPUs, which share the host's memory."""
    return all(device.platform == "cpu" for device in place.device_set)


def _in_memory(
    row: Weight,
    ours: jax.ShapeDtypeStruct,
    place: Sharding,
    stored: Mapping[str, Stored],
    pool: ThreadPoolExecutor,
) -> jax.Array:
    """Return one parameter on CPU devices, read straight into its memory."""
    memory = _HostArray(ours.shape, np.dtype(ours.dtype), place)
    blocks = [block for item in memory.parts.items() for block in _blocks(row, *item, stored)]
    for done in [pool.submit(copy_rows, *block) for block in blocks]:
        done.result()
    return memory.to_devices()


def _quantized_in_memory(
    row: Weight,
    ours: jax.ShapeDtypeStruct,
    place: Sharding,
    stored: Mapping[str, Stored],
    pool: ThreadPoolExecutor,
) -> Quantized:
    """Return one quantised kernel on CPU devices; each block of columns has its own scales."""
    values = _HostArray(ours.shape, np.dtype(np.int8), place)
    shape = (*ours.shape[:-2], 1, ours.shape[-1])
    scale = _HostArray(shape, np.dtype(np.float32), scale_place(place, len(shape)))
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
    return Quantized(values.to_devices(), scale.to_devices())


class _HostArray:
    """Host memory of one sharded array: each distinct shard of the devices here, once."""

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

    def to_devices(self) -> jax.Array:
        """Return the array that uses this memory, without a copy."""
        # Devices may share a shard's memory: XLA never writes to memory that the host owns.
        pieces = [jax.device_put(self.parts[bounds], d) for d, bounds in self.on_device]
        return jax.make_array_from_single_device_arrays(self.shape, self.place, pieces)


def _blocks(
    row: Weight, bounds: Bounds, part: np.ndarray, stored: Mapping[str, Stored]
) -> Iterator[tuple[Stored, int, int, Slices, np.ndarray]]:
    """Yield the reads that fill one shard: tensor, rows, columns, and the target in `part`."""
    layers, own = bounds[: row.stacked], bounds[row.stacked :]
    if row.transposed:
        own = own[::-1]
    (first, last), *others = own
    columns = tuple(slice(*each) for each in others)
    for index in itertools.product(*(range(*each) for each in layers)):
        tensor = stored[row.hf_name(index)]
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
    """Return one parameter on accelerators, its tensors transferred one after another."""
    axes = row.stacked
    piece_place = _tensor_sharding(row, ours, place)

    def convert(piece: jax.Array) -> jax.Array:
        return (piece.T if row.transposed else piece).astype(ours.dtype)

    if not axes:
        piece = stored[row.name].place(piece_place)
        plain = piece.dtype == ours.dtype and not row.transposed
        return piece if plain else jax.jit(convert, out_shardings=place)(piece)

    return _stacked(row, ours, place, convert, stored, pool)


def _quantized_on_devices(
    row: Weight,
    ours: jax.ShapeDtypeStruct,
    place: Sharding,
    stored: Mapping[str, Stored],
    pool: ThreadPoolExecutor,
) -> Quantized:
    """Return one kernel on accelerators, each of its tensors quantised there."""
    return _stacked(row, ours, place, lambda piece: quantize(piece.T), stored, pool)


def _stacked(
    row: Weight,
    ours: jax.ShapeDtypeStruct,
    place: Sharding,
    convert: Callable[[jax.Array], Any],
    stored: Mapping[str, Stored],
    pool: ThreadPoolExecutor,
) -> Any:
    """Return the stack, on the devices, of all tensors after `convert` (an array or a tree)."""
    axes = row.stacked
    piece = jax.ShapeDtypeStruct(row.shape(ours.shape), ours.dtype)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((*ours.shape[:axes], *leaf.shape), leaf.dtype),
        jax.eval_shape(convert, piece),
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
            convert(piece),
        )

    def zeros() -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    stack = jax.jit(zeros, out_shardings=places)()
    every = [(index, stored[row.hf_name(index)]) for index in indices(row, ours.shape)]
    for index, piece in _read_ahead(every, _tensor_sharding(row, ours, place), pool):
        stack = put(stack, piece, np.array(index, np.int32))
    return jax.block_until_ready(stack)


def _read_ahead(
    tensors: Sequence[tuple[Index, Stored]], place: Sharding, pool: ThreadPoolExecutor
) -> Iterator[tuple[Index, jax.Array]]:
    """Yield tensors in order, reading ahead up to `BUFFER` bytes."""
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


def _tensor_sharding(row: Weight, ours: jax.ShapeDtypeStruct, place: Sharding) -> Sharding:
    """Return the sharding of one tensor that matches its parameter's, so no data moves later."""
    if not isinstance(place, NamedSharding):
        return place
    spec = [*place.spec, *[None] * (len(ours.shape) - len(place.spec))][row.stacked :]
    return NamedSharding(place.mesh, PartitionSpec(*(spec[::-1] if row.transposed else spec)))
