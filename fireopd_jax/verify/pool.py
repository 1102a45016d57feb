"""Run comparisons in parallel threads, with programs that are compiled once for all of them.

function, items -> rows, in the order of the items

Nearly all the time is compilation, which uses one core per program.
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
"""Compiler options for the CPU: no LLVM optimizations; XLA's own passes stay on."""
if version("jaxlib").startswith("0.10."):
    # JAX 0.10 still has the older emitters, which compile in half the time.
    QUICK["xla_cpu_use_fusion_emitters"] = False


def compiled(function: Callable[..., Any], *static: int) -> Callable[..., Any]:
    """Return the jitted function; threads that need the same program compile it only once."""
    # A new function object: otherwise jit could reuse a program compiled with other options.
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
    """Yield the rows of each item; by default one thread per core, at most 8."""

    def run(item: Item) -> list[Row]:
        # The formulas are verified, not the low-precision matmuls that some devices use by default.
        with jax.default_matmul_precision("highest"):
            return list(function(item))

    with ThreadPoolExecutor(threads or min(os.cpu_count() or 1, 8)) as pool:
        for rows in pool.map(run, items):
            yield from rows
