"""Continuous batching inside one compiled program.

    while a row waits or runs:
        prefill   if no prefilled prompt is left: the next R prompts of the queue, W tokens a step
        insert    while a slot is free: copy the keys and values of a prefilled prompt to it
        decode    until a slot is free and a row waits: one token for each slot in each step

Loops are used in place of branches, because XLA copies a cache that passes through a branch. A slot
processes the last token of its sequence and samples the next, so every step of a slot yields a
token. The tokens of a row are a function of (seed, sample id, position) and the parameters alone,
not of slots, other rows or time.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Bool, Int32

from fireopd_jax.models.decoder import Decoder, Layer
from fireopd_jax.models.language_model import LanguageModel, Params
from fireopd_jax.rollout.meshes import draw_over
from fireopd_jax.rollout.sampling import row_keys
from fireopd_jax.rollout.state import (
    LENGTH,
    NOT_FINITE,
    RUNNING,
    STOP,
    EngineState,
    Entries,
    Requests,
    Slots,
)


@dataclasses.dataclass(frozen=True)
class Loop:
    """The decoding loop of one replica, for static shapes and one cache layout."""

    model: LanguageModel
    memory: Any
    """Layout of the KV cache: `Dense`, `Paged` or a subclass."""
    piece: int
    """Tokens of each prompt in one prefill step."""
    mesh: Mesh | None = None
    """Its `tensor` axis shares the work of one replica; None: one device."""

    def run(
        self,
        params: Params,
        state: EngineState,
        steps: Int32[Array, ""],
        version: Int32[Array, ""],
        unfinished: int = 0,
    ) -> EngineState:
        """Return the state after at most `steps` decoding steps, fewer if few rows are left.

        It ends as soon as at most `unfinished` rows wait or run.
        `params` are in the decode layout (`LanguageModel.to_decode_layout`).
        """
        net = self.model.bind_decode(params)
        end = state.counters.steps + steps

        def live(s: EngineState) -> Bool[Array, ""]:
            left = s.slots.active.sum(dtype=jnp.int32) + s.ring.size
            return (left > unfinished) & (s.counters.steps < end)

        def refill(s: EngineState) -> EngineState:
            s = jax.lax.while_loop(self.must_reclaim, self.reclaim, s)
            s = jax.lax.while_loop(self.can_prefill, lambda s: self.prefill(net, s), s)
            return jax.lax.while_loop(self.can_insert, self.insert, s)

        def decode(s: EngineState) -> EngineState:
            def can_decode(s: EngineState) -> Bool[Array, ""]:
                waits = self.can_insert(s) | self.can_prefill(s) | self.must_reclaim(s)
                return self.ready(s).any() & ~waits & live(s)

            s = jax.lax.while_loop(can_decode, lambda s: self.decode(net, s, version), s)
            return jax.lax.while_loop(self.must_preempt, self.preempt, s)

        return jax.lax.while_loop(live, lambda s: decode(refill(s)), state)

    # -- prompts

    def waiting(self, s: EngineState) -> tuple[Array, Array, Array]:
        """Return the next R distinct sequences of the queue: a row, number of rows, length of each.

        The length excludes the last token, which is the first input of decoding.
        """
        size, count = s.ring.row.shape[0], s.entries.left.shape[0]
        at = (s.ring.head + jnp.arange(size)) % size
        there = jnp.arange(size) < s.ring.size
        run = jnp.cumsum((s.ring.first[at] | (jnp.arange(size) == 0)) & there) - 1
        mine = (run[None] == jnp.arange(count)[:, None]) & there[None]
        row = s.ring.row[at][jnp.argmax(mine, axis=1)]
        wanted = mine.sum(axis=1, dtype=jnp.int32)
        length = jnp.where(wanted > 0, s.requests.length[row] + s.requests.count[row] - 1, 0)
        return row, wanted, length

    def can_prefill(self, s: EngineState) -> Bool[Array, ""]:
        """Return whether a slot is free, no prefilled prompt is left, and the next one fits."""
        free = (~s.slots.active).any() & (s.entries.left.sum() == 0) & (s.ring.size > 0)
        _, _, length = self.waiting(s)
        return free & self.memory.fits_prompts(s.cache, length)[0]

    def prefill(self, net: tuple[Decoder, list[Layer]], s: EngineState) -> EngineState:
        """Compute keys and values of the next prompts of the queue, `piece` tokens a step."""
        decoder, layers = net
        memory, width = self.memory, self.piece
        row, wanted, length = self.waiting(s)
        taken = memory.fits_prompts(s.cache, length) & (wanted > 0)
        wanted, length = jnp.where(taken, wanted, 0), jnp.where(taken, length, 0)
        # Every row that needed the old entries has been inserted.
        cache = memory.reclaim(s.cache, s.slots.active, jnp.zeros_like(taken))
        cache = memory.allocate_prompts(cache, length)

        def piece(carry):
            start, kept = carry
            at = jnp.broadcast_to(start + jnp.arange(width), (row.shape[0], width))
            tokens = sequence_at(s.requests, row, at)
            attention = memory.prefill(cache, start, self.dtype)
            _, kept = decoder.extend(layers, tokens, at, attention, kept)
            return start + width, kept

        begin = (jnp.int32(0), memory.prompt_cache(cache))
        _, kept = jax.lax.while_loop(lambda c: c[0] < length.max(), piece, begin)
        counters = dataclasses.replace(
            s.counters,
            prefills=s.counters.prefills + 1,
            prefilled=s.counters.prefilled + length.sum(dtype=jnp.int32),
        )
        return dataclasses.replace(
            s,
            entries=Entries(left=wanted, length=length),
            cache=memory.with_prompt_cache(cache, kept),
            counters=counters,
        )

    # -- slots

    def next_inserts(self, s: EngineState) -> tuple[Array, Array, Array]:
        """Match waiting rows that have an entry with free slots; return slot, entry, length.

        Slot B means no match.
        """
        slots, count = s.slots.active.shape[0], s.entries.left.shape[0]
        most = min(slots, count)
        slot = jnp.nonzero(~s.slots.active, size=most, fill_value=slots)[0].astype(jnp.int32)
        upto = jnp.cumsum(s.entries.left)
        rank = jnp.arange(most)
        entry = jnp.minimum((upto[None] <= rank[:, None]).sum(axis=1), count - 1)
        slot = jnp.where(rank < upto[-1], slot, slots)
        length = jnp.where(slot < slots, s.entries.length[entry], 0)
        # In queue order: rows behind one that does not fit wait, too.
        fits = jnp.cumprod(self.memory.fits_slots(s.cache, length)).astype(bool)
        return jnp.where(fits, slot, slots), entry, length

    def can_insert(self, s: EngineState) -> Bool[Array, ""]:
        """Return whether a slot is free for a prefilled prompt and the cache has room for it."""
        there = s.entries.left > 0
        return (~s.slots.active).any() & there.any() & self.fits_first(s)

    def fits_first(self, s: EngineState) -> Bool[Array, ""]:
        """Return whether the cache can insert the first prefilled prompt into a slot."""
        first = s.entries.length[jnp.argmax(s.entries.left > 0)]
        return self.memory.fits_slots(s.cache, first[None])[0]

    def insert(self, s: EngineState) -> EngineState:
        """Move waiting rows from the queue to free slots; copy their prompts' keys and values."""
        slot, entry, length = self.next_inserts(s)
        slots, size = s.slots.active.shape[0], s.ring.row.shape[0]
        taken = slot < slots
        row = s.ring.row[(s.ring.head + jnp.arange(slot.shape[0])) % size]
        requests = s.requests
        full = requests.count[row] >= limit_of(requests, row)

        def write(old: Array, new: Array) -> Array:
            return old.at[slot].set(new, mode="drop")

        order = s.counters.inserted + jnp.arange(slot.shape[0])
        inserted = taken.sum(dtype=jnp.int32)
        left = s.entries.left.at[entry].add(-taken.astype(jnp.int32))
        finish = requests.finish.at[jnp.where(taken & full, row, size)].set(LENGTH, mode="drop")
        return dataclasses.replace(
            s,
            requests=dataclasses.replace(requests, finish=finish),
            ring=dataclasses.replace(
                s.ring, head=(s.ring.head + inserted) % size, size=s.ring.size - inserted
            ),
            entries=dataclasses.replace(s.entries, left=left),
            slots=Slots(
                row=write(s.slots.row, row),
                token=write(s.slots.token, sequence_at(requests, row, length[:, None])[:, 0]),
                position=write(s.slots.position, length),
                order=write(s.slots.order, order),
                active=write(s.slots.active, ~full),
            ),
            cache=self.memory.insert(s.cache, entry, slot, length, self.piece),
            counters=dataclasses.replace(s.counters, inserted=s.counters.inserted + inserted),
        )

    def ready(self, s: EngineState) -> Bool[Array, " B"]:
        """Return which slots can decode a token."""
        return self.memory.ready(s.cache, s.slots.position, s.slots.active, s.slots.order)

    def decode(
        self, net: tuple[Decoder, list[Layer]], s: EngineState, version: Int32[Array, ""]
    ) -> EngineState:
        """Process one token of each slot that is ready, and sample its next token."""
        decoder, layers = net
        slots, requests, memory = s.slots, s.requests, self.memory
        decoding = self.ready(s)
        cache = memory.allocate_tokens(s.cache, slots.position, decoding)
        attention = memory.decode(cache, slots.position, decoding, self.dtype)
        hidden, kept = decoder.extend(
            layers,
            slots.token[:, None],
            slots.position[:, None],
            attention,
            memory.slot_cache(cache),
        )
        logits = self.model.logits(decoder, hidden[:, 0])
        row = jnp.minimum(slots.row, requests.length.shape[0] - 1)
        at = requests.count[row]
        sampling = requests.sampling.at_rows(row)
        keys = row_keys(sampling.seed, requests.sample_id[row], at)
        drawn = draw_over(self.mesh, logits, keys, sampling, at)
        valid = decoding & ~drawn.bad
        count = at + valid
        stopped = valid & (drawn.token[:, None] == sampling.stop).any(axis=1)
        full = valid & (count >= limit_of(requests, row))
        finish = jnp.where(full, LENGTH, RUNNING)
        finish = jnp.where(stopped, STOP, finish)
        finish = jnp.where(decoding & drawn.bad, NOT_FINITE, finish)
        target = jnp.where(valid, row, requests.length.shape[0])

        def write(old: Array, new: ArrayLike) -> Array:
            return old.at[target, at].set(new, mode="drop", unique_indices=True)

        table = jnp.where(decoding, row, requests.length.shape[0])
        requests = dataclasses.replace(
            requests,
            tokens=write(requests.tokens, drawn.token),
            logprob=write(requests.logprob, drawn.logprob),
            model_logprob=write(requests.model_logprob, drawn.model_logprob),
            policy_logprob=write(requests.policy_logprob, drawn.policy_logprob),
            policy_entropy=write(requests.policy_entropy, drawn.policy_entropy),
            version=write(requests.version, jnp.broadcast_to(version, at.shape)),
            count=requests.count.at[table].set(count, mode="drop", unique_indices=True),
            finish=requests.finish.at[table].set(finish, mode="drop", unique_indices=True),
        )
        slots = dataclasses.replace(
            slots,
            token=jnp.where(valid, drawn.token, slots.token),
            position=slots.position + valid,
            active=slots.active & (finish == RUNNING),
        )
        counters = dataclasses.replace(
            s.counters,
            steps=s.counters.steps + 1,
            drawn=s.counters.drawn + valid.sum(dtype=jnp.int32),
            stalled=s.counters.stalled + (s.slots.active & ~decoding).sum(dtype=jnp.int32),
        )
        cache = memory.with_slot_cache(cache, kept)
        return dataclasses.replace(
            s, requests=requests, slots=slots, cache=cache, counters=counters
        )

    # -- cache space

    def must_reclaim(self, s: EngineState) -> Bool[Array, ""]:
        """Return whether a row or slot lacks room while garbage could be freed."""
        if not self.memory.runs_out:
            return jnp.bool_(False)  # A constant, so that the compiler removes the loop.
        memory, free = self.memory, (~s.slots.active).any() & (s.ring.size > 0)
        there = s.entries.left.sum() > 0
        fits = memory.fits_prompts(s.cache, self.waiting(s)[2])[0]
        waits = free & jnp.where(there, ~self.fits_first(s), ~fits)
        stalls = (s.slots.active & ~self.ready(s)).any()
        return (waits | stalls) & memory.has_garbage(s.cache, s.slots.active, s.entries.left > 0)

    def reclaim(self, s: EngineState) -> EngineState:
        """Free all pages that no running slot and no needed entry uses."""
        cache = self.memory.reclaim(s.cache, s.slots.active, s.entries.left > 0)
        return dataclasses.replace(s, cache=cache)

    def must_preempt(self, s: EngineState) -> Bool[Array, ""]:
        """Return whether slots are active and none of them has room for its next token."""
        if not self.memory.runs_out:
            return jnp.bool_(False)
        return s.slots.active.any() & ~self.ready(s).any()

    def preempt(self, s: EngineState) -> EngineState:
        """Drop prefilled prompts and preempt the newest slot; requeue its request first."""
        size = s.ring.row.shape[0]
        newest = jnp.argmax(jnp.where(s.slots.active, s.slots.order, -1))
        head = (s.ring.head - 1) % size
        # The rows that the dropped entry would have served start a new group.
        first = s.ring.first.at[s.ring.head].set(True).at[head].set(True)
        preempted = dataclasses.replace(
            s,
            ring=dataclasses.replace(
                s.ring,
                row=s.ring.row.at[head].set(s.slots.row[newest]),
                first=first,
                head=head,
                size=s.ring.size + 1,
            ),
            entries=jax.tree.map(jnp.zeros_like, s.entries),
            slots=dataclasses.replace(s.slots, active=s.slots.active.at[newest].set(False)),
            counters=dataclasses.replace(s.counters, preempted=s.counters.preempted + 1),
        )
        return self.reclaim(preempted)

    @property
    def dtype(self) -> jnp.dtype:
        """Compute dtype of the model."""
        return jnp.dtype(self.model.config.dtype)


def sequence_at(
    requests: Requests, row: Int32[Array, " R"], at: Int32[Array, "R N"]
) -> Int32[Array, "R N"]:
    """Return tokens at positions of [prompt | response]; beyond the end they are arbitrary."""
    length = requests.length[row][:, None]
    width, room = requests.prompt.shape[1], requests.tokens.shape[1]
    prompt = requests.prompt[row[:, None], jnp.clip(at, 0, width - 1)]
    response = requests.tokens[row[:, None], jnp.clip(at - length, 0, room - 1)]
    return jnp.where(at < length, prompt, response)


def limit_of(requests: Requests, row: Int32[Array, " B"]) -> Int32[Array, " B"]:
    """Return the largest number of response tokens of rows."""
    return jnp.minimum(requests.sampling.max_tokens[row], requests.tokens.shape[1])
