"""The side of the tests in tests by assertions: it never runs code of the program.

    names of the program -> setup and assertions, where its functions are `Remote` -> result

A program that ends early, prints a result or searches its memory changes nothing here: it only
receives arguments and returns values. Values arrive as plain types, so that a comparison is the
comparison of Python, not of the program.
"""

import builtins
import importlib
import json
import os
import sys
import traceback
import types
from collections.abc import Sequence
from typing import Any

from . import codec

REQUESTS, REPLIES, RESULT = 3, 4, 5
"""File descriptors: requests to the program, its replies, the result to the supervisor."""


PROGRAM_ENDED = "the program ended"


class ProgramEnded(BaseException):
    """The process of the program is gone: no test may catch that."""


class Link:
    """Connection to the process of the program."""

    def __init__(self) -> None:
        self._requests = os.fdopen(REQUESTS, "w", encoding="ascii")
        self._replies = os.fdopen(REPLIES, encoding="ascii")
        self._exceptions: dict[str, type[BaseException]] = {}

    def names(self) -> dict[str, Any]:
        """Return what the program defines, but nothing in the place of Python's own names.

        A program's `abs`, or its `math`, would decide the comparison of a test.
        """
        names = {}
        for name, value in self._receive()["names"].items():
            if name in sys.stdlib_module_names:
                names[name] = _module(name)
            elif not hasattr(builtins, name):
                names[name] = self._decode(value)
        return names

    def request(self, operation: str, *arguments: Any, **keywords: Any) -> Any:
        """Return the result of an operation on objects of the program; raise what it raises."""
        message = {
            "operation": operation,
            "arguments": [codec.encode(each, _reference) for each in arguments],
            "keywords": {key: codec.encode(each, _reference) for key, each in keywords.items()},
        }
        try:
            self._requests.write(json.dumps(message) + "\n")
            self._requests.flush()
        except BrokenPipeError:
            raise ProgramEnded from None
        reply = self._receive()
        if "error" in reply:
            raise self._exception(reply["error"])(reply["text"])
        for index, data in reply["changed"].items():
            _overwrite(arguments[int(index)], self._decode(data))
        return self._decode(reply["value"])

    def _receive(self) -> Any:
        line = self._replies.readline()
        if not line.endswith("\n"):
            raise ProgramEnded
        return json.loads(line)

    def _decode(self, data: Any) -> Any:
        return codec.decode(data, self._object)

    def _object(self, data: Any) -> Any:
        if data["kind"] == "module":
            return _module(data["name"])
        if data["exception"]:
            return self._exception(data["exception"])
        return Remote(self, data["id"])

    def _exception(self, names: Sequence[str]) -> type[BaseException]:
        """Return the class of an exception; one of the program's gets a class of the same name."""
        first, *bases = names
        builtin = getattr(builtins, first, None)
        if isinstance(builtin, type) and issubclass(builtin, Exception):
            return builtin
        if first not in self._exceptions:
            base = self._exception(bases) if bases else Exception
            made: Any = type(first, (base,), {"__module__": "builtins"})
            self._exceptions[first] = made
        return self._exceptions[first]


class Remote:
    """An object of the program: a function, a class, an instance, a generator."""

    def __init__(self, link: Link, number: int):
        self._link, self._number = link, number

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Call it."""
        return self._link.request("call", self, *arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._link.request("attribute", self, name)

    def __iter__(self) -> Any:
        return self._link.request("iterate", self)

    def __next__(self) -> Any:
        return self._link.request("next", self)

    def __len__(self) -> int:
        return self._link.request("size", self)

    def __getitem__(self, key: Any) -> Any:
        return self._link.request("item", self, key)

    def __str__(self) -> str:
        return self._link.request("text", self)

    def __bool__(self) -> bool:
        return self._link.request("truth", self)

    def __eq__(self, other: Any) -> bool:
        """Two objects of the program may be equal; one never equals a plain value."""
        if not isinstance(other, Remote):
            return False
        return self._number == other._number or self._link.request("equal", self, other) is True

    def __hash__(self) -> int:
        return hash(self._number)


def _reference(value: Any) -> Any:
    if isinstance(value, Remote):
        return {"kind": "object", "id": value._number}
    raise TypeError(f"a test passes a {type(value).__name__}, which is no plain value")


def _module(name: str) -> Any:
    """Return a module of the standard library; None for every other."""
    return importlib.import_module(name) if name in sys.stdlib_module_names else None


def _overwrite(argument: Any, value: Any) -> None:
    """Replace the contents of an argument by those that the program left in it."""
    if isinstance(argument, list | bytearray):
        argument[:] = value
    elif isinstance(argument, dict | set):
        argument.clear()
        argument.update(value)


def check(setup: str, tests: Sequence[str]) -> None:
    """Run the setup and each test; write how many passed and the error of the first other one."""
    passed, error = 0, None
    try:
        names = Link().names()
        solution = types.ModuleType("solution")  # Some tests import the program by this name.
        solution.__dict__.update(names)
        sys.modules["solution"] = solution
        namespace = {**names, "__name__": "tests"}
        exec(compile(setup, "setup", "exec", dont_inherit=True), namespace)
        for test in tests:
            exec(compile(test, "test", "exec", dont_inherit=True), namespace)
            passed += 1
    except ProgramEnded:
        error = PROGRAM_ENDED
    except BaseException as caught:
        error = traceback.format_exception_only(type(caught), caught)[-1].strip()[:500]
    os.write(RESULT, json.dumps({"passed": passed, "error": error}).encode("ascii"))
