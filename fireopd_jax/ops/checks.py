"""Argument checks of the head functions; each error names the argument and the shapes."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from fireopd_jax.config import nearest
from fireopd_jax.ops.logits import HeadSharding
from fireopd_jax.types import Array

DTYPES = ("bfloat16", "float16", "float32")
LAYOUTS = ("vd", "dv")


def check_options(
    options: Mapping[str, Any], known: tuple[str, ...], names: frozenset[str]
) -> None:
    """Raise TypeError for an unknown option, ValueError for a value that no implementation accepts.

    `known` are the implementation names, `names` the option names.
    """
    for name in options:
        if name not in names:
            raise TypeError(f"unknown option {name!r}{nearest(name, sorted(names))}")
    name = options.get("implementation")
    if name is not None and name not in known:
        raise ValueError(
            f"unknown head implementation {name!r}{nearest(name, known)}; known: "
            f"{', '.join(sorted(known))}"
        )
    layout = options.get("head_layout", LAYOUTS[0])
    if layout not in LAYOUTS:
        raise ValueError(f"head_layout must be {' or '.join(LAYOUTS)}, got {layout!r}")
    chunk, softcap = options.get("chunk"), options.get("softcap")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, got {softcap}")


def check_arrays(
    hidden: Array, head: Array, ids: Array, support_ids: Array, transposed: bool
) -> None:
    """Raise TypeError for a wrong dtype, ValueError for shapes that do not fit.

    `hidden` [*N, D] and `head` ([V, D], or [D, V] if `transposed`) must be bfloat16, float16 or
    float32; `ids` [*N] and `support_ids` [*N, S] must be int32.
    """
    for name, array in (("hidden", hidden), ("head", head)):
        if array.dtype.name not in DTYPES:
            raise TypeError(f"{name} must be {' or '.join(DTYPES)}, got {array.dtype.name}")
    for name, array in (("ids", ids), ("support_ids", support_ids)):
        if array.dtype != jnp.int32:
            raise TypeError(f"{name} must be int32, got {array.dtype.name}")
    hidden_shape = f"hidden of shape {tuple(hidden.shape)}"
    if hidden.ndim < 1 or ids.shape != hidden.shape[:-1]:
        raise ValueError(
            f"ids of shape {tuple(ids.shape)} must have the leading axes of {hidden_shape}"
        )
    width_axis = 0 if transposed else 1
    if head.ndim != 2 or head.shape[width_axis] != hidden.shape[-1]:
        fits = head.ndim == 2 and head.shape[1 - width_axis] == hidden.shape[-1]
        hint = f"; pass head_layout={LAYOUTS[1 - int(transposed)]!r}" if fits else ""
        raise ValueError(
            f"head of shape {tuple(head.shape)} must be {'[D, V]' if transposed else '[V, D]'}, "
            f"D the last axis of {hidden_shape}{hint}"
        )
    if support_ids.ndim != ids.ndim + 1 or support_ids.shape[:-1] != ids.shape:
        raise ValueError(
            f"support_ids of shape {tuple(support_ids.shape)} must have the axes of ids of shape "
            f"{tuple(ids.shape)} and one more"
        )


def check_pair(
    hidden: Array, head: Array, teacher_hidden: Array, teacher_head: Array, layout: str
) -> None:
    """Raise unless `hidden` and `teacher_hidden` have equal leading axes and each fits its head."""
    if layout not in LAYOUTS:
        raise ValueError(f"head_layout must be {' or '.join(LAYOUTS)}, got {layout!r}")
    if hidden.ndim < 1 or hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise ValueError(
            f"teacher_hidden of shape {tuple(teacher_hidden.shape)} must have the leading axes of "
            f"hidden of shape {tuple(hidden.shape)}"
        )
    no_support = jnp.zeros((*hidden.shape[:-1], 0), jnp.int32)
    ids = jnp.zeros(hidden.shape[:-1], jnp.int32)
    for states, matrix in ((hidden, head), (teacher_hidden, teacher_head)):
        check_arrays(states, matrix, ids, no_support, layout == "dv")


def check_entropy(student_entropy: Array, ids: Array) -> None:
    """Raise ValueError unless `student_entropy` has the shape of `ids`."""
    if student_entropy.shape != ids.shape:
        raise ValueError(
            f"student_entropy of shape {tuple(student_entropy.shape)} must have the shape of ids, "
            f"{tuple(ids.shape)}"
        )


def check_valid(valid: int | None, rows: int) -> int:
    """Return the vocabulary size without padding; `rows` is the padded size of the head."""
    columns = int(rows if valid is None else valid)
    if not 1 <= columns <= rows:
        raise ValueError(f"valid must be 1 to {rows}, the vocabulary size of head, got {columns}")
    return columns


def check_sharding(sharding: HeadSharding | None) -> None:
    """Raise ValueError for unknown or doubly used mesh axes."""
    if sharding is None:
        return
    for axis in (*sharding.tokens, *filter(None, [sharding.vocabulary])):
        if axis not in sharding.mesh.shape:
            raise ValueError(
                f"sharding: the mesh has no axis {axis!r}; it has {', '.join(sharding.mesh.shape)}"
            )
    if sharding.vocabulary in sharding.tokens:
        raise ValueError(
            f"sharding: axis {sharding.vocabulary!r} shards both tokens and vocabulary"
        )
