"""What a confined child does: run a program as a script, or call a function of it.

These functions run in the same process as the program of a model. They hold nothing that it may
not see, and what they write decides nothing by itself: their caller compares it.
"""

import atexit
import builtins
import importlib
import importlib.util
import json
import os
import sys
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from . import codec

RESULT = 3
"""File descriptor of the result of a function."""

STARTER = {
    "collections": "Counter OrderedDict defaultdict deque namedtuple",
    "typing": "Any Callable DefaultDict Deque Dict FrozenSet Generator Iterable Iterator List"
    " Mapping Optional Sequence Set Tuple Type TypeVar Union",
    "functools": "cache cmp_to_key lru_cache partial reduce",
    "itertools": "accumulate chain combinations count cycle groupby islice pairwise permutations"
    " product repeat zip_longest",
    "heapq": "heapify heappop heappush heappushpop heapreplace nlargest nsmallest",
    "bisect": "bisect bisect_left bisect_right insort insort_left insort_right",
    "math": "ceil comb factorial floor gcd inf isqrt lcm log log2 pi sqrt",
    "copy": "deepcopy",
}
"""Names that the starter code of function problems imports for the program, by their modules."""
STARTER_MODULES = (*STARTER, "operator", "random", "re", "string", "sys")


class Packages:
    """Finder of the few packages outside the standard library that programs may import."""

    def __init__(self, folders: Mapping[str, str]):
        """`folders`: name of a package -> the folder that holds it."""
        self.folders = dict(folders)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Return the spec of an allowed package; submodules come from its own path."""
        if name not in self.folders:
            return None
        # By its file: the folder around it cannot be listed.
        folder = os.path.join(self.folders[name], name)
        return importlib.util.spec_from_file_location(
            name, os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
        )


def prepare(packages: Mapping[str, str]) -> None:
    """Set up the interpreter of a program as `python FILE` does it."""
    sys.argv = ["program.py"]
    sys.stdin = os.fdopen(0, encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.stderr = os.fdopen(
        2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False
    )
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    builtins.exit = builtins.quit = sys.exit  # `site`, which adds them, is not imported.
    sys.meta_path.append(Packages(packages))


def run_and_exit(job: Callable[[], None]) -> NoReturn:
    """Run a job and end this process as Python ends: threads, exit functions, streams, code.

    Without the rest of Python's own end, which frees memory for longer than most programs run.
    """
    code = _code_of(job)
    while waiting := [
        each
        for each in threading.enumerate()
        if each is not threading.current_thread() and not each.daemon
    ]:
        waiting[0].join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.__stdout__):
        if stream is not None and not stream.closed:
            code = max(code, _code_of(stream.flush))
    os._exit(code)


def _code_of(job: Callable[[], Any]) -> int:
    """Return the exit code that a job ends with; its traceback goes to the error output."""
    try:
        job()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    return 0


def load(program: str, name: str) -> dict[str, Any]:
    """Execute a program as a module of this name; return its namespace."""
    module = types.ModuleType(name)
    module.__dict__["__builtins__"] = builtins
    sys.modules[name] = module
    code = compile(program, "program.py", "exec", dont_inherit=True)
    if name != "__main__":
        module.__dict__.update(starter_names(code))
    exec(code, module.__dict__)
    return module.__dict__


def starter_names(code: types.CodeType) -> dict[str, Any]:
    """Return the names of starter code that a program uses, whether or not it imports them."""
    used = set(_names(code))
    found: dict[str, Any] = {
        name: importlib.import_module(name) for name in STARTER_MODULES if name in used
    }
    for module, names in STARTER.items():
        for name in used.intersection(names.split()):
            found[name] = getattr(importlib.import_module(module), name)
    return found


def _names(code: types.CodeType) -> list[str]:
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += _names(constant)
    return names


def run_script(program: str) -> None:
    """Run a program as `python program.py` does."""
    load(program, "__main__")


def call_function(program: str, function: str, arguments: Sequence[Any]) -> None:
    """Call a function of a program, or of its class `Solution`; write its result as JSON."""
    values = [codec.decode(each, codec.no_handle) for each in arguments]
    result = named(load(program, "solution"), function)(*values)
    text = json.dumps(as_json(result)).encode("ascii")
    while text:
        text = text[os.write(RESULT, text) :]


def named(namespace: Mapping[str, Any], function: str) -> Any:
    """Return a function by its name, or the method of a `Solution()`."""
    if function in namespace:
        return namespace[function]
    if "Solution" in namespace and hasattr(namespace["Solution"], function):
        return getattr(namespace["Solution"](), function)
    raise NameError(f"the program defines no function {function!r}")


def as_json(value: Any) -> Any:
    """Return a result as JSON data: tuples as lists, keys as text; TypeError for other types."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [as_json(each) for each in value]
    if isinstance(value, dict):
        return {str(key): as_json(each) for key, each in value.items()}
    raise TypeError(f"the result holds a {type(value).__name__}, which tests cannot compare")
