"""What the engine keeps on the device.

    Requests   a table, a row a request: prompt, knobs, and what has been drawn so far
    Ring       the rows that wait, in order; neighbours with one prompt share its prefill
    Entries    prompts that are computed, and how many of the next waiting rows each serves
    Slots      the rows that are being decoded

Q requests, P prompt tokens, T response tokens, R entries, B slots, E stop tokens.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float32, Int32

from fireopd_jax.rollout.sampling import Sampling
from fireopd_jax.types import pytree

RUNNING, STOP, LENGTH, NOT_FINITE = range(4)
FINISH = ("running", "stop", "length", "not_finite")
"""Why a response ended, by its code: not yet, on a stop token, at its limit, or because the logits
were not finite."""

SLOTS = {"cpu": 32}
"""Slots by platform where nobody says how many; 256 elsewhere."""
PIECE = 128
"""Tokens of a prompt that are computed at a time, where it has as many."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes that a loop is compiled for."""

    slots: int
    """Rows that are decoded at a time."""
    entries: int
    """Prompts that are computed at a time."""
    piece: int
    """Tokens of each prompt that are computed at a time."""
    capacity: int
    """Positions of a slot: a multiple of the piece."""

    @classmethod
    def of(
        cls, rows: int, width: int, room: int, slots: int | None = None, align: int = 8
    ) -> "Shape":
        """Choose sizes for so many rows, prompts and responses of so many tokens at most."""
        slots = max(1, min(slots or SLOTS.get(jax.default_backend(), 256), rows))
        piece = -(-min(width, PIECE) // align) * align
        return cls(
            slots=slots,
            entries=min(rows, max(4, slots // 4)),
            piece=piece,
            capacity=-(-(width + room) // piece) * piece,
        )


@pytree
class Requests:
    """Rows of one table; `count` tokens of each response are there."""

    prompt: Int32[Array, "Q P"]
    length: Int32[Array, " Q"]
    sample_id: Int32[Array, " Q"]
    sampling: Sampling
    """Knobs, a row each; the seed is shared."""
    tokens: Int32[Array, "Q T"]
    logprob: Float32[Array, "Q T"]
    model_logprob: Float32[Array, "Q T"]
    version: Int32[Array, "Q T"]
    """Update count of the parameters that drew each token."""
    count: Int32[Array, " Q"]
    finish: Int32[Array, " Q"]


@pytree
class Ring:
    """A queue of rows: `size` of them from `head` on, modulo its length."""

    row: Int32[Array, " Q"]
    first: Bool[Array, " Q"]
    """The row's sequence is not that of the row before it."""
    head: Int32[Array, ""]
    size: Int32[Array, ""]


@pytree
class Entries:
    """Prompts that are computed; the next `left.sum()` rows of the ring are theirs, in order."""

    left: Int32[Array, " R"]
    length: Int32[Array, " R"]
    """Tokens whose keys and values are there: all of the sequence but the last."""


@pytree
class Slots:
    """What each slot decodes next: `token`, at `position`."""

    row: Int32[Array, " B"]
    token: Int32[Array, " B"]
    position: Int32[Array, " B"]
    order: Int32[Array, " B"]
    """Order in which the slots were taken."""
    active: Bool[Array, " B"]


@pytree
class Counters:
    """What happened since the start."""

    steps: Int32[Array, ""]
    drawn: Int32[Array, ""]
    """Tokens; drawn / (steps B) is the use of the slots."""
    prefills: Int32[Array, ""]
    prefilled: Int32[Array, ""]
    """Prompt tokens that were computed."""
    inserted: Int32[Array, ""]
    stalled: Int32[Array, ""]
    """Slots that waited for a page, summed over steps."""
    preempted: Int32[Array, ""]


@pytree
class EngineState:
    """All of it. A state is given away to the function that changes it."""

    requests: Requests
    ring: Ring
    entries: Entries
    slots: Slots
    cache: Any
    counters: Counters


def empty_requests(rows: int, width: int, room: int, sampling: Sampling) -> Requests:
    """Make a table without requests; every buffer is its own."""
    return Requests(
        prompt=jnp.zeros((rows, width), jnp.int32),
        length=jnp.zeros(rows, jnp.int32),
        sample_id=jnp.zeros(rows, jnp.int32),
        sampling=jax.tree.map(jnp.copy, sampling.rows(rows)),
        tokens=jnp.zeros((rows, room), jnp.int32),
        logprob=jnp.zeros((rows, room), jnp.float32),
        model_logprob=jnp.zeros((rows, room), jnp.float32),
        version=jnp.full((rows, room), -1, jnp.int32),
        count=jnp.zeros(rows, jnp.int32),
        finish=jnp.zeros(rows, jnp.int32),
    )


def initial_state(requests: Requests, slots: int, entries: int, cache: Any) -> EngineState:
    """Make a state in which nothing waits and nothing runs."""
    rows = requests.length.shape[0]

    def zeros(*shape: int) -> Array:
        return jnp.zeros(shape, jnp.int32)

    return EngineState(
        requests=requests,
        ring=Ring(zeros(rows), jnp.zeros(rows, bool), zeros(), zeros()),
        entries=Entries(zeros(entries), zeros(entries)),
        slots=Slots(
            jnp.full(slots, rows, jnp.int32),
            zeros(slots),
            zeros(slots),
            zeros(slots),
            jnp.zeros(slots, bool),
        ),
        cache=cache,
        counters=Counters(*(zeros() for _ in range(7))),
    )


def enqueue(ring: Ring, requests: Requests, rows: Int32[Array, " A"]) -> Ring:
    """Append rows, in order; row Q is none. Neighbours with one sequence share its prefill."""
    size = ring.row.shape[0]
    real = rows < size
    at = jnp.where(real, (ring.head + ring.size + jnp.cumsum(real) - 1) % size, size)
    safe = jnp.minimum(rows, size - 1)
    before = jnp.roll(safe, 1)
    same = (
        (requests.prompt[safe] == requests.prompt[before]).all(axis=1)
        & (requests.length[safe] == requests.length[before])
        & (requests.count[safe] + requests.count[before] == 0)
        & jnp.roll(real, 1)
    )
    first = ~same | (jnp.arange(rows.shape[0]) == 0)
    return Ring(
        row=ring.row.at[at].set(rows, mode="drop"),
        first=ring.first.at[at].set(first, mode="drop"),
        head=ring.head,
        size=ring.size + real.sum(dtype=jnp.int32),
    )


def write(
    requests: Requests, ring: Ring, rows: Int32[Array, " A"], table: Requests
) -> tuple[Requests, Ring]:
    """Put requests into rows of the table and let them wait, in order; row Q is none."""

    def put(old: Array, new: Array) -> Array:
        return old if old.ndim == 0 else old.at[rows].set(new, mode="drop")

    requests = jax.tree.map(put, requests, table)
    return requests, enqueue(ring, requests, rows)


def remove(state: EngineState, row: Int32[Array, ""]) -> EngineState:
    """Let a row neither run nor wait; row Q is none."""
    ring, size = state.ring, state.ring.row.shape[0]
    at = (ring.head + jnp.arange(size)) % size
    there = jnp.arange(size) < ring.size
    gone = there & (ring.row[at] == row)
    found = gone.any()
    kept = jnp.nonzero(there & ~gone, size=size, fill_value=0)[0]
    # Who stood behind it shares its prompt with nobody before; the entries' counts are off.
    first = (ring.first[at] | jnp.roll(gone, 1))[kept]
    ring = Ring(
        row=ring.row[at][kept],
        first=first.at[0].set(first[0] | found),
        head=jnp.zeros_like(ring.head),
        size=ring.size - found.astype(jnp.int32),
    )
    entries = dataclasses.replace(state.entries, left=jnp.where(found, 0, state.entries.left))
    active = state.slots.active & (state.slots.row != row)
    slots = dataclasses.replace(state.slots, active=active)
    return dataclasses.replace(state, ring=ring, entries=entries, slots=slots)


def pick(r: Requests, rows: Int32[Array, " A"]) -> tuple[Array, Array, Array, Array]:
    """Read the responses of rows: tokens, both log-probs, versions."""
    return r.tokens[rows], r.logprob[rows], r.model_logprob[rows], r.version[rows]
