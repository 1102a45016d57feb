"""Comparisons side by side, and programs that are compiled once for all of them.

function, items -> rows, in the order of the items

Compiling takes nearly all the time, on one core each.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from threading import Lock
from typing import Any, TypeVar

import jax

from fireopd_jax.verify.table import Row

Item = TypeVar("Item")

QUICK: dict[str, int | bool] = {"xla_backend_optimization_level": 0}
"""On a CPU: without LLVM's passes, those of XLA stay."""
if version("jaxlib").startswith("0.10."):
    # The emitters of before, gone since: half the time to compile.
    QUICK["xla_cpu_use_fusion_emitters"] = False


def compiled(function: Callable[..., Any], *static: int) -> Callable[..., Any]:
    """Jit a function; who asks for what another thread compiles waits for it."""
    # A function of its own: one that was compiled elsewhere would be taken from there.
    run = jax.jit(
        lambda *arguments: function(*arguments),
        static_argnums=static,
        compiler_options=QUICK if jax.default_backend() == "cpu" else None,
    )
    locks: dict[tuple[Any, ...], Lock] = {}

    def locked(*arguments: Any) -> Any:
        key = tuple(arguments[i] for i in static)
        with locks.setdefault(key, Lock()):
            return run(*arguments)

    return locked


def in_parallel(
    function: Callable[[Item], Iterable[Row]], items: Iterable[Item], threads: int | None = None
) -> Iterator[Row]:
    """Give the rows of each item; by default as many threads as the machine has cores, up to 8."""

    def run(item: Item) -> list[Row]:
        # Formulas are verified, not the short floats that some devices multiply by default.
        with jax.default_matmul_precision("highest"):
            return list(function(item))

    with ThreadPoolExecutor(threads or min(os.cpu_count() or 1, 8)) as pool:
        for rows in pool.map(run, items):
            yield from rows
