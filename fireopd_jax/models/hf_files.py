"""Lazy reading of safetensors files: the header has the position of each tensor in the file.

    8 bytes: length of the header | header: JSON, name -> dtype, shape, offsets | tensor data

Files are read, not memory-mapped: mapped pages would count as memory of the process.
"""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from fireopd_jax.config import UserError
from fireopd_jax.models.quantized import quantize_rows

TYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
INFINITY = {
    TYPES["F32"]: np.uint32(0x7F800000),
    TYPES["F16"]: np.uint16(0x7C00),
    TYPES["BF16"]: np.uint16(0x7F80),
}
"""Bits of infinity; those of NaN are larger integers."""
SIGN = {np.dtype(np.uint32): np.uint32(2**31), np.dtype(np.uint16): np.uint16(2**15)}
PIECE = 2**17
"""Values that are compared at a time, in the processor's cache."""
ALIGNMENT = 64
LONGEST_HEADER = 100_000_000
"""Bytes of a header, as the library safetensors has it."""
POINTER = b"version https://git-lfs"
Slices = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor in a file, not read yet."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    name: str

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Read indices `start` to `stop` of the first axis.

        Raises UserError for values that are not finite: a model with such weights computes nothing.
        """
        inner = math.prod(self.shape[1:])
        values = np.fromfile(
            self.file,
            self.dtype,
            count=(stop - start) * inner,
            offset=self.offset + start * inner * self.dtype.itemsize,
        )
        if len(values) < (stop - start) * inner:
            raise UserError(f"{self.file}: cut off while it was read, in {self.name}")
        if (first := first_nonfinite(values)) is not None:
            raise UserError(
                f"{self.file}: {self.name} is not finite: {values[first]} in row "
                f"{start + first // max(inner, 1)}; expected the weights of a model that works"
            )
        return values.reshape(stop - start, *self.shape[1:])

    def place(self, sharding: Sharding) -> jax.Array:
        """Return the tensor as a sharded array; only rows of local devices are read."""
        read: dict[tuple[int, int], np.ndarray] = {}

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(self.shape[0])
            if (start, stop) not in read:
                read.clear()
                read[start, stop] = self.rows(start, stop)
            return read[start, stop][(slice(None), *index[1:])]

        return jax.make_array_from_callback(self.shape, sharding, part)


def first_nonfinite(values: np.ndarray) -> int | None:
    """Return the index of the first value that is NaN or infinite, None without one.

    Integers of the bits are compared: NumPy has no fast `isfinite` for bfloat16.
    """
    infinity = INFINITY[values.dtype]
    bits = values.reshape(-1).view(infinity.dtype)
    signed = bits.view(f"i{infinity.itemsize}")
    for start in range(0, len(bits), PIECE):
        part = slice(start, start + PIECE)
        # NaN and infinity are the largest integers: signed the positive ones, unsigned the others.
        if signed[part].max() >= infinity or bits[part].max() >= infinity | SIGN[infinity.dtype]:
            magnitude = bits[part] & ~SIGN[infinity.dtype]
            return start + int(np.argmax(magnitude >= infinity))
    return None


def allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return uninitialised memory, aligned so that `jax.device_put` to a CPU makes no copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def widened(block: np.ndarray) -> np.ndarray:
    """Return bfloat16 values as float32, other dtypes unchanged."""
    if block.dtype != TYPES["BF16"]:
        return block
    # A bfloat16 is the upper half of a float32. NumPy's own conversion takes ten times as long.
    wide = block.view(np.uint16).astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def copy_rows(tensor: Stored, start: int, stop: int, columns: Slices, target: np.ndarray) -> None:
    """Read rows `start` to `stop` and write their `columns` to `target`, in its dtype."""
    block = tensor.rows(start, stop)[(slice(None), *columns)]
    if target.dtype == np.float32:
        block = widened(block)
    if block.dtype != target.dtype:
        block = block.astype(target.dtype)
    plain = np.dtype(
        f"u{target.dtype.itemsize}"
    )  # As integers, NumPy copies without holding the GIL.
    target.view(plain)[...] = block.view(plain)


def quantize_into(
    tensor: Stored, start: int, stop: int, columns: Slices, values: np.ndarray, scale: np.ndarray
) -> None:
    """Read and quantise rows `start` to `stop`; write their scales and the `columns` of the values.

    A row has its scale from all columns, also where `columns` selects some of them.
    """
    numbers, steps = quantize_rows(widened(tensor.rows(start, stop)))
    values[...], scale[...] = numbers[(slice(None), *columns)], steps


def stored_tensors(file: Path) -> dict[str, Stored]:
    """Return the tensors that the header of a file lists, by name.

    Raises UserError if the file is no safetensors file, is cut off or has unsupported dtypes.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        if stream.read(len(POINTER)) == POINTER:
            raise UserError(f"{file}: a pointer of Git LFS, not the file; run git lfs pull")
        stream.seek(0)
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= size - 8:
            raise UserError(f"{file}: not a complete safetensors file: its header is cut off")
        if length > LONGEST_HEADER:
            raise UserError(f"{file}: not a safetensors file: a header of {length:,} bytes")
        try:
            header = json.loads(stream.read(length))
            found = {
                name: _stored(file, name, entry, 8 + length)
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (
            *(ValueError, TypeError, KeyError, AttributeError),
            *(RecursionError, OverflowError),
        ) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{file}: not a safetensors file: {reason}") from None
    for name, tensor in found.items():
        if tensor.offset + tensor.bytes > size:
            raise UserError(
                f"{file}: cut off: {name} ends at byte {tensor.offset + tensor.bytes}, the file "
                f"at {size}"
            )
    _refuse_shared(file, [tensor for tensor in found.values() if tensor.bytes])
    return found


def _refuse_shared(file: Path, tensors: list[Stored]) -> None:
    """Raise UserError for tensors that share bytes: the format has no such file."""
    tensors.sort(key=lambda tensor: tensor.offset)
    for one, other in itertools.pairwise(tensors):
        if other.offset < one.offset + one.bytes:
            raise UserError(f"{file}: {one.name} and {other.name} share bytes; the header is wrong")


def _stored(file: Path, name: str, entry: Any, start: int) -> Stored:
    if entry["dtype"] not in TYPES:
        raise UserError(
            f"{file}: {name} is {entry['dtype']}; expected {', '.join(TYPES)} (quantised "
            "checkpoints are not read)"
        )
    first, last = entry["data_offsets"]
    if not all(type(each) is int for each in (first, last, *entry["shape"])):
        raise TypeError(f"{name}: shape and data_offsets are not whole numbers")
    tensor = Stored(file, TYPES[entry["dtype"]], tuple(entry["shape"]), start + first, name)
    if first < 0 or last - first != tensor.bytes or min(tensor.shape, default=1) < 0:
        raise UserError(
            f"{file}: {name}: shape {entry['shape']} does not fill its {last - first} bytes"
        )
    return tensor
