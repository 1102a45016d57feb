"""The side of the program in tests by assertions: a loop that answers requests for its objects.

    load the program -> [request: call, attribute, iterate ... -> value or handle] until the end

The assertions run in another process (`assertions.py`). Plain values are copied; everything else
stays here and is known there by a number.
"""

import json
import os
import types
from collections.abc import Callable
from typing import Any

from . import codec, programs

REQUESTS, REPLIES = 3, 4
"""File descriptors of the two pipes."""
MUTABLE = (list, dict, set, bytearray)


class Objects:
    """Objects of the program that the assertions hold, by number."""

    def __init__(self) -> None:
        self._held: list[Any] = []

    def encode(self, value: Any) -> Any:
        """Return a value as JSON data."""
        return codec.encode(value, self._handle)

    def decode(self, data: Any) -> Any:
        """Return the value or the object of JSON data."""
        return codec.decode(data, lambda data: self._held[data["id"]])

    def _handle(self, value: Any) -> Any:
        if isinstance(value, types.ModuleType):
            return {"kind": "module", "name": value.__name__}
        index = next((i for i, held in enumerate(self._held) if held is value), None)
        if index is None:
            index = len(self._held)
            self._held.append(value)
        bases = exception_names(value) if isinstance(value, type) else []
        return {"kind": "object", "id": index, "exception": bases}

    def answer(self, request: Any) -> Any:
        """Return the reply to one request."""
        try:
            arguments = [self.decode(each) for each in request["arguments"]]
            before = [self.encode(each) for each in arguments]
            keywords = {name: self.decode(each) for name, each in request["keywords"].items()}
            value = OPERATIONS[request["operation"]](*arguments, **keywords)
            after = [self.encode(each) for each in arguments]
        except BaseException as error:
            return {"error": exception_names(type(error)), "text": _text(error)}
        changed = {
            index: data
            for index, data in enumerate(after)
            if isinstance(arguments[index], MUTABLE) and data != before[index]
        }
        return {"value": self.encode(value), "changed": changed}


def exception_names(kind: type) -> list[str]:
    """Return the names of an exception's classes, its own first; none for other classes."""
    if not issubclass(kind, BaseException):
        return []
    return [each.__name__ for each in type.mro(kind) if each is not object]


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:
        return ""


OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda target, *arguments, **keywords: target(*arguments, **keywords),
    "attribute": lambda target, name: getattr(target, name),
    "iterate": lambda target: iter(target),
    "next": lambda target: next(target),
    "size": lambda target: len(target),
    "item": lambda target, key: target[key],
    "text": lambda target: str(target),
    "truth": lambda target: bool(target),
    "equal": lambda left, right: bool(left == right),
}


def serve(program: str) -> None:
    """Load a program and answer requests until the pipe ends."""
    objects = Objects()
    requests = os.fdopen(REQUESTS, encoding="ascii")
    replies = os.fdopen(REPLIES, "w", encoding="ascii")

    def reply(message: Any) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    namespace = programs.load(program, "solution")
    public = {name: value for name, value in namespace.items() if not name.startswith("__")}
    reply({"names": {name: objects.encode(value) for name, value in public.items()}})
    for line in requests:
        reply(objects.answer(json.loads(line)))
