"""Compilation of a run's programs before their first call, side by side in threads.

program, shapes -> traced here -> compiled in a thread -> the memory that it needs

A later call with arguments of these shapes finds the program in JAX's own caches.
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import jax

from fireopd_jax.config import UserError
from fireopd_jax.runtime.memory import GIB

MOST_THREADS = 8
EXHAUSTED = "RESOURCE_EXHAUSTED"
SIZE = re.compile(r"\b([\d.]+)([KMGT])\b")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
KEYS = {
    "rollout": "rollout.slots, rollout.batch_size, rollout.max_tokens or data.max_prompt_tokens",
    "score": "method.score.micro_batch_tokens, rollout.batch_size, rollout.max_tokens or "
    "data.max_prompt_tokens",
    "update": "optim.micro_batch_tokens, rollout.max_tokens or data.max_prompt_tokens, or set "
    "optim.remat=full",
}
"""What makes a program smaller, by the program's kind."""
SFT = "{key}.sft.optim.micro_batch_tokens, rollout.max_tokens or data.max_prompt_tokens, or set \
{key}.sft.optim.remat=full"


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes of one device that a program takes while it runs."""

    arguments: int
    beyond: int
    """Outputs that do not take the place of arguments, and temporary arrays."""

    @classmethod
    def of(cls, compiled: Any) -> "Need":
        """Return the need of a compiled program."""
        found = compiled.memory_analysis()
        if found is None:  # a platform that does not report it
            return cls(0, 0)
        beyond = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
        return cls(found.argument_size_in_bytes, beyond)

    @classmethod
    def of_refused(cls, error: Exception) -> "Need":
        """Return the need of a program that XLA has not compiled, because no device has room.

        It is the largest size in the message: "Used 20.1G of 15.8G hbm". Raises any other error.
        """
        sizes = [float(size) * UNITS[unit] for size, unit in SIZE.findall(str(error))]
        if EXHAUSTED not in str(error) or not sizes:
            raise error
        return cls(0, int(max(sizes)))


class Ahead:
    """Programs that are being compiled, by name."""

    def __init__(self, threads: int | None = None, look: Callable[[Any], Need] = Need.of):
        """Compile in `threads`; `look` returns what is to be known of a compiled program."""
        threads = threads or min(os.cpu_count() or 1, MOST_THREADS)
        self._look = look
        self._pool = ThreadPoolExecutor(threads, "compile")
        self._futures: dict[str, Future[Need]] = {}
        self._known: dict[Any, Future[Need]] = {}

    def add(self, name: str, program: Any, *inputs: Any) -> None:
        """Trace a jitted program for the shapes, and shardings, of `inputs`; begin to compile it.

        A program that has been added with the same shapes is compiled once.
        """
        key = program, str(jax.tree.structure(inputs)), _avals(inputs)
        if key not in self._known:
            lowered = program.lower(*inputs)
            self._known[key] = self._pool.submit(self._compiled, lowered)
        self._futures[name] = self._known[key]

    def _compiled(self, lowered: Any) -> Need:
        try:
            return self._look(lowered.compile())
        except jax.errors.JaxRuntimeError as error:
            return Need.of_refused(error)

    def names(self) -> list[str]:
        """Return the names of the programs."""
        return list(self._futures)

    def need(self, name: str) -> Need | None:
        """Wait for a program; return the memory that it needs, None for one that was not added."""
        future = self._futures.get(name)
        return None if future is None else future.result()

    def needs(self) -> Mapping[str, Need]:
        """Wait for all programs; return the memory that each needs."""
        return {name: future.result() for name, future in self._futures.items()}

    def close(self) -> None:
        """Compile nothing that has not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _avals(inputs: Any) -> tuple[Any, ...]:
    return tuple(
        (leaf.shape, str(leaf.dtype), str(getattr(leaf, "sharding", None)))
        for leaf in jax.tree.leaves(inputs)
    )


def keys_of(name: str) -> str:
    """Return the keys that make a program smaller; names are "KIND" or "KIND of MODEL"."""
    kind, _, model = name.partition(" of ")
    if kind == "sft":
        role, _, own = model.partition(" ")
        return SFT.format(key=f"teachers.{own}" if own else role)
    return KEYS.get(kind, KEYS["update"])


def gib(size: float | int) -> str:
    """Return a size in GiB with two significant digits, from 10 on with none after the point."""
    value = size / GIB
    digits = max(0, 1 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{digits}f}"


def too_large(name: str, needed: float | int, total: float | int) -> UserError:
    """Return the error of a program that does not fit the device."""
    return UserError(
        f"{name}: it needs {gib(needed)} GiB of memory, the device has {gib(total)}; expected a "
        f"smaller {keys_of(name)}"
    )


@contextmanager
def naming_keys() -> Iterator[None]:
    """Turn XLA's error of a device without memory into one line that names the keys to lower."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if EXHAUSTED not in str(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the device ran out of memory ({reason}); expected a smaller "
            "optim.micro_batch_tokens, method.score.micro_batch_tokens, rollout.slots, "
            "rollout.batch_size, rollout.max_tokens or data.max_prompt_tokens, or set "
            "optim.remat=full"
        ) from error
