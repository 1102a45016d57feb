"""The alternatives of annotations, for tests that walk all config classes."""

import types
import typing
from typing import Annotated


def members(annotation):
    """List the alternatives of an annotation, out of `Annotated`, `None` and unions."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [m for part in typing.get_args(annotation) for m in members(part)]
    return [] if annotation is type(None) else [annotation]
