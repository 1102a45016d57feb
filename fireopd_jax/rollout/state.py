"""The state of the engine on the device.

    Requests   a table with one row for each request: prompt, sampling settings, response so far
    Ring       the queue of waiting rows; consecutive rows with the same prompt share its prefill
    Entries    prefilled prompts, and how many of the next rows of the queue each of them serves
    Slots      the rows that are being decoded

Q requests, P prompt tokens, T response tokens, R entries, B slots, E stop tokens.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float32, Int32

from fireopd_jax.rollout.requests import OF_TOKENS
from fireopd_jax.rollout.sampling import Sampling
from fireopd_jax.runtime.target import platform
from fireopd_jax.types import pytree

RUNNING, STOP, LENGTH, NOT_FINITE = range(4)
FINISH = ("running", "stop", "length", "not_finite")
"""Why a response ended, by its code: not yet, a stop token, its length limit, or logits that were
not finite."""

SLOTS = {"cpu": 32}
"""Default number of slots by platform; 256 on others."""
PIECE = 128
"""Largest number of tokens of each prompt in one prefill step."""


def slots_of(slots: int | None) -> int:
    """Return the number of slots that is asked for, else that of the platform."""
    return slots or SLOTS.get(platform(), 256)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static sizes that a decoding loop is compiled for."""

    slots: int
    """B: rows that are decoded at a time."""
    entries: int
    """R: prompts that are prefilled at a time."""
    piece: int
    """Tokens of each prompt in one prefill step."""
    capacity: int
    """Positions of a slot, a multiple of `piece`."""
    prompt: int
    """Positions of an entry, a multiple of `piece`."""

    @classmethod
    def of(
        cls,
        rows: int,
        width: int,
        room: int,
        slots: int | None = None,
        align: int = 8,
        *,
        continued: bool = False,
    ) -> "Shape":
        """Return sizes for `rows` requests, prompts of `width` and responses of `room` tokens.

        `continued`: whether a request may begin with tokens of its response, which are prefilled.
        """
        slots = max(1, min(slots_of(slots), rows))
        piece = -(-min(width, PIECE) // align) * align
        capacity = -(-(width + room) // piece) * piece
        return cls(
            slots=slots,
            entries=min(rows, max(4, slots // 4)),
            piece=piece,
            capacity=capacity,
            prompt=capacity if continued else -(-width // piece) * piece,
        )


@pytree
class Requests:
    """The request table; each response has `count` tokens so far."""

    prompt: Int32[Array, "Q P"]
    length: Int32[Array, " Q"]
    """Prompt tokens; 0 in an empty row."""
    sample_id: Int32[Array, " Q"]
    sampling: Sampling
    """Sampling settings of each row; the seed is shared."""
    tokens: Int32[Array, "Q T"]
    logprob: Float32[Array, "Q T"]
    model_logprob: Float32[Array, "Q T"]
    policy_logprob: Float32[Array, "Q T"]
    policy_entropy: Float32[Array, "Q T"]
    version: Int32[Array, "Q T"]
    """Update count of the parameters that each token was sampled from."""
    count: Int32[Array, " Q"]
    finish: Int32[Array, " Q"]
    """Index into `FINISH`."""


@pytree
class Ring:
    """A ring buffer of table rows: `size` of them from `head` on, modulo Q."""

    row: Int32[Array, " Q"]
    first: Bool[Array, " Q"]
    """The row does not share its prefill with the row before it."""
    head: Int32[Array, ""]
    size: Int32[Array, ""]


@pytree
class Entries:
    """Prefilled prompts; the next `left.sum()` rows of the queue use them, in order."""

    left: Int32[Array, " R"]
    length: Int32[Array, " R"]
    """Tokens whose keys and values are computed: all of the sequence but the last."""


@pytree
class Slots:
    """The next input of each slot: `token` at `position`."""

    row: Int32[Array, " B"]
    token: Int32[Array, " B"]
    position: Int32[Array, " B"]
    order: Int32[Array, " B"]
    """Running number of the row that was inserted: larger is newer."""
    active: Bool[Array, " B"]


@pytree
class Counters:
    """Counts since the start of a run."""

    steps: Int32[Array, ""]
    drawn: Int32[Array, ""]
    """Sampled tokens; drawn / (steps B) is the utilisation of the slots."""
    prefills: Int32[Array, ""]
    prefilled: Int32[Array, ""]
    """Prompt tokens whose keys and values were computed."""
    inserted: Int32[Array, ""]
    """Rows that took a slot; never reset, since `Slots.order` counts them."""
    stalled: Int32[Array, ""]
    """Slots without a free page, summed over steps."""
    preempted: Int32[Array, ""]
    """Rows that lost their slot for lack of pages."""


@pytree
class EngineState:
    """The whole state of one replica; functions that change it donate it."""

    requests: Requests
    ring: Ring
    entries: Entries
    slots: Slots
    cache: Any
    counters: Counters


def empty_requests(rows: int, width: int, room: int, sampling: Sampling) -> Requests:
    """Return a request table of empty rows; no two fields share a buffer, so it can be donated."""
    return Requests(
        prompt=jnp.zeros((rows, width), jnp.int32),
        length=jnp.zeros(rows, jnp.int32),
        sample_id=jnp.zeros(rows, jnp.int32),
        sampling=jax.tree.map(jnp.copy, sampling.rows(rows)),
        tokens=jnp.zeros((rows, room), jnp.int32),
        logprob=jnp.zeros((rows, room), jnp.float32),
        model_logprob=jnp.zeros((rows, room), jnp.float32),
        policy_logprob=jnp.zeros((rows, room), jnp.float32),
        policy_entropy=jnp.zeros((rows, room), jnp.float32),
        version=jnp.full((rows, room), -1, jnp.int32),
        count=jnp.zeros(rows, jnp.int32),
        finish=jnp.zeros(rows, jnp.int32),
    )


def initial_state(requests: Requests, slots: int, entries: int, cache: Any) -> EngineState:
    """Return a state with an empty queue and empty slots."""
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
    """Append rows to the queue, in order; entries equal to Q are padding.

    Consecutive rows with the same prompt and no response yet share its prefill.
    """
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
    """Write requests to rows of the table and append them to the queue; row Q is padding."""

    def put(old: Array, new: Array) -> Array:
        return old if old.ndim == 0 else old.at[rows].set(new, mode="drop")

    requests = jax.tree.map(put, requests, table)
    return requests, enqueue(ring, requests, rows)


def remove(state: EngineState, row: Int32[Array, ""]) -> EngineState:
    """Remove a row from slots and queue; row Q is padding."""
    ring, size = state.ring, state.ring.row.shape[0]
    at = (ring.head + jnp.arange(size)) % size
    there = jnp.arange(size) < ring.size
    gone = there & (ring.row[at] == row)
    found = gone.any()
    kept = jnp.nonzero(there & ~gone, size=size, fill_value=0)[0]
    # The row behind it starts a group of its own, and the entries' counts no longer match.
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


def pick(r: Requests, rows: Int32[Array, " A"]) -> dict[str, Array]:
    """Return the responses of rows, by the names of the table's fields."""
    return {name: getattr(r, name)[rows] for name in OF_TOKENS}
