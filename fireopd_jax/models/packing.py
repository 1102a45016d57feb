"""Rows laid one after another in packs of a fixed length, so that no padding is computed.

lengths of the rows -> first-fit decreasing -> pack and offset of each row -> slots of pass j

A row is its prompt and its response without a hole. Each group of rows (those of one device) has
packs of its own; a program passes a few packs of each group through the model at a time, as often
as the fullest group needs, a traced number, so that one program serves every batch.

G groups, R rows of a group, L slots of a pass: those of its packs, one after another.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int32

from fireopd_jax.types import Array, pytree

Places = tuple[jax.Array, jax.Array, jax.Array]
SHORT, LONG = 32, 128
"""Packs are a multiple of this many tokens: of 128, the block of kernels, from 256 tokens on."""
ROWS = 4
"""Longest rows that a pack has room for, at most."""
SMALL, LARGE = 256, 4096
"""Their tokens together, at most: where one alone has up to 256, attention computes all scores of a
pack, which costs its square; it skips those of other rows beyond, though not on every platform."""
SLACK = 1.1
"""A pack of more rows may leave so much more empty where all rows are the longest."""
Carry = TypeVar("Carry")
Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class PassShape:
    """Packs that pass through a model together, for each group of rows."""

    length: int
    """Tokens of a pack."""
    packs: int

    @classmethod
    def of(cls, longest: int, tokens: int, rows: int) -> "PassShape":
        """Return packs for rows of at most `longest` tokens, about `tokens` of them in a pass.

        A pack is longer than the longest row where a pass has room, since rows that are all a
        little shorter fill it better; attention costs its square. A pass has at least one. Where
        all `rows` rows of a group are the longest, as little as possible is empty.
        """
        lengths, reach = {1: _in_blocks(longest)}, SMALL if longest <= SMALL else LARGE
        for n in range(2, min(ROWS, rows) + 1):
            if (length := _in_blocks(n * longest)) <= min(tokens, reach):
                lengths[n] = length
        whole = {n: -(-rows // n) * length for n, length in lengths.items()}
        n = max(n for n, slots in whole.items() if slots <= SLACK * min(whole.values()))
        needed = -(-rows // n)
        most = min(max(1, tokens // lengths[n]), needed)
        even = [count for count in range(most // 2 + 1, most + 1) if needed % count == 0]
        return cls(lengths[n], max(even, default=most))

    @property
    def tokens(self) -> int:
        """Tokens of a pass."""
        return self.length * self.packs

    def head_block(self, groups: int) -> int:
        """Return the response tokens that pass through the head at a time.

        About a quarter of a pass: the last block may have few. All on several devices, which sum
        the head's gradient over them after each block.
        """
        if groups > 1:
            return self.tokens
        return min(self.tokens, max(LONG, self.tokens // 4 // LONG * LONG))

    def apart(self, x: Array) -> Array:
        """Return an array [G, L, ...] with an axis of packs: [G packs, length, ...]."""
        return x.reshape(-1, self.length, *x.shape[2:])

    def together(self, x: Array) -> Array:
        """Return an array [G packs, length, ...] as [G, L, ...]."""
        return x.reshape(-1, self.tokens, *x.shape[2:])


def _in_blocks(tokens: int) -> int:
    """Return the length of a pack for so many tokens."""
    block = SHORT if tokens <= 2 * LONG else LONG
    return -(-tokens // block) * block


@pytree
class Packing:
    """Place of each row: a pack of its group, and an offset in it."""

    pack: Int32[Array, "G R"]
    offset: Int32[Array, "G R"]
    prompt: Int32[Array, "G R"]
    """Prompt tokens of each row."""
    response: Int32[Array, "G R"]
    """Response tokens of each row that are computed; rows with none are in no pack."""
    count: Int32[Array, ""]
    """Packs of the group that has most."""

    @property
    def groups(self) -> int:
        """Number of groups."""
        return self.pack.shape[0]


@pytree
class Slots:
    """The packs of a pass: the tokens of some rows in each, and padding at its end."""

    row: Int32[Array, "*G L"]
    """Row of its group that each token belongs to; 0 in padding."""
    position: Int32[Array, "*G L"]
    """Index of each token in its row."""
    segment: Int32[Array, "*G L"]
    """Where its row begins in the pack, + 1, so that it increases; 0 in padding."""


@pytree
class Predicted:
    """The response tokens of a pass, those of one row after those of another."""

    slot: Int32[Array, "*G N"]
    """Slot whose state predicts the token: the one before it."""
    row: Int32[Array, "*G N"]
    token: Int32[Array, "*G N"]
    """Index of the token in its response."""
    there: Bool[Array, "*G N"]
    """Whether there is a token: true up to the number of response tokens of the pass."""
    rank: Int32[Array, "*G S"]
    """Index, in these arrays, of the token that a slot's state predicts; -1 where it is none."""

    def padded(self, size: int) -> "Predicted":
        """Return the tokens with places for more, none of them there, up to blocks of `size`."""
        empty = ((0, 0), (0, -self.slot.shape[1] % size))
        return self._each(lambda x: jnp.pad(x, empty))

    def part(self, first: Array | int, size: int) -> "Predicted":
        """Return `size` tokens of each group, from `first` on."""
        return self._each(lambda x: jax.lax.dynamic_slice_in_dim(x, first, size, axis=1))

    def _each(self, change: Callable[[Array], Array]) -> "Predicted":
        changed = {name: change(x) for name, x in vars(self).items() if name != "rank"}
        return Predicted(**changed, rank=self.rank)


Sequences = Callable[[Array, Array, Array], tuple[Array, Array]]
"""A model: (token ids, positions, segments) [G packs, length] -> states [..., D], head [V, D]."""


@dataclasses.dataclass(frozen=True)
class Packs:
    """The rows of a batch in packs, and their passes through a model."""

    prompts: Int32[Array, "B P"]
    responses: Int32[Array, "B T"]
    packing: Packing
    shape: PassShape
    block: int
    """Response tokens of each group that pass through the head at a time."""

    @classmethod
    def of(
        cls,
        prompts: Int32[Array, "B P"],
        prompt_length: Int32[Array, " B"],
        responses: Int32[Array, "B T"],
        computed: Bool[Array, "B T"],
        tokens: int,
        groups: int,
        *,
        whole_rows: bool = False,
    ) -> "Packs":
        """Pack the prompts, each with its response up to the last `computed` token.

        A pass has about `tokens` tokens for each of the `groups` of rows, at least the longest
        row. `whole_rows`: all response tokens of a pass go through the head together.
        """
        rows, room = responses.shape
        shape = PassShape.of(prompts.shape[1] + room, tokens, rows // groups)
        packing = pack_rows(prompt_length, last_true(computed), shape.length, groups)
        block = shape.tokens if whole_rows else shape.head_block(groups)
        return cls(prompts, responses, packing, shape, block)

    @property
    def passes(self) -> Int32[Array, ""]:
        """Number of passes."""
        return -(-self.packing.count // self.shape.packs)

    def states(self, index: Array | int, model: Sequences) -> tuple[Array, Array, Predicted]:
        """Return the states [G, L, D] of pass number `index`, the head, and its response tokens."""
        slots = slots_of(self.packing, index, self.shape)
        ids = tokens_at(slots, self.packing, self.prompts, self.responses)
        hidden, head = model(*(self.shape.apart(x) for x in (ids, slots.position, slots.segment)))
        at = predicted_by(self.packing, slots).padded(self.block)
        return self.shape.together(hidden), head, at

    def over_blocks(
        self, at: Predicted, body: Callable[[Predicted, Array, Carry], Carry], start: Carry
    ) -> Carry:
        """Return `start` after `body(tokens, first, carry)` over the blocks that have tokens."""
        used = at.there.sum(axis=1, dtype=jnp.int32).max()

        def block(i: Array, carry: Any) -> Any:
            first = i * self.block
            return body(at.part(first, self.block), first, carry)

        return jax.lax.fori_loop(0, -(-used // self.block), block, start)


def pack_rows(
    prompt: Int32[Array, " B"], response: Int32[Array, " B"], length: int, groups: int = 1
) -> Packing:
    """Return the packs, of `length` tokens, of rows with these numbers of tokens.

    Rows are placed by falling length, each in the first pack that has room for it (first-fit
    decreasing: at most 11/9 of the least number of packs, plus one). The first B / groups rows are
    the first group. A response's last token predicts nothing and is not computed. Rows without
    response tokens, or without a prompt, get no place. No row may be longer than `length` + 1.
    """
    prompt, response = (jnp.asarray(x).reshape(groups, -1) for x in (prompt, response))
    response = jnp.where(prompt > 0, response, 0)
    pack, offset, count = jax.vmap(lambda n: _first_fit_decreasing(n, length))(
        _tokens(prompt, response)
    )
    return Packing(pack, offset, prompt, response, count.max())


def _tokens(prompt: Array, response: Array) -> Array:
    """Return the number of tokens of each row that are computed."""
    return jnp.where(response > 0, prompt + response - 1, 0)


def _first_fit_decreasing(tokens: Int32[Array, " R"], length: int) -> tuple[Array, Array, Array]:
    """Return pack and offset of each row, and the number of packs."""
    nothing = jnp.zeros_like(tokens)
    order = jnp.argsort(-tokens, stable=True)

    def place(i: Array, carry: Places) -> Places:
        filled, pack, offset = carry
        row = order[i]
        at = jnp.argmax(filled + tokens[row] <= length)
        offset = offset.at[row].set(filled[at])
        return filled.at[at].add(tokens[row]), pack.at[row].set(at.astype(pack.dtype)), offset

    start = (nothing, nothing, nothing)
    filled, pack, offset = jax.lax.fori_loop(0, tokens.shape[0], place, start)
    return pack, offset, (filled > 0).sum(dtype=jnp.int32)


def slots_of(packing: Packing, index: Array | int, shape: PassShape) -> Slots:
    """Return the tokens of pass number `index`."""
    length = shape.length

    def one(pack: Array, packs: Array, offset: Array, prompt: Array, response: Array) -> Slots:
        tokens = _tokens(prompt, response)
        mine = (packs == pack) & (response > 0)
        rows = jnp.arange(packs.shape[0], dtype=jnp.int32)
        begins = jnp.where(mine, offset, length)
        first = jnp.full((length,), -1, jnp.int32).at[begins].set(rows, mode="drop")
        at = jnp.arange(length, dtype=jnp.int32)
        # The last row that begins at a slot or before it; in an empty pack, row 0 and no token.
        begin = jax.lax.cummax(jnp.where(first >= 0, at, 0))
        row = jnp.maximum(first[begin], 0)
        position = at - begin
        there = mine[row] & (position < tokens[row])
        row, position = jnp.where(there, row, 0), jnp.where(there, position, 0)
        return Slots(row, position, jnp.where(there, begin + 1, 0).astype(jnp.int32))

    def of_group(*rows: Array) -> Slots:
        numbers = index * shape.packs + jnp.arange(shape.packs)
        found = jax.vmap(lambda pack: one(pack, *rows))(numbers)
        return jax.tree.map(lambda x: x.reshape(-1), found)

    return jax.vmap(of_group)(packing.pack, packing.offset, packing.prompt, packing.response)


def predicted_by(packing: Packing, slots: Slots) -> Predicted:
    """Return the response tokens of a pass, and the slots whose states predict them."""

    def one(slots: Slots, prompt: Array, response: Array) -> Predicted:
        length = slots.row.shape[0]
        token = slots.position - prompt[slots.row] + 1
        there = (slots.segment > 0) & (token >= 0) & (token < response[slots.row])
        rank = jnp.cumsum(there, dtype=jnp.int32) - 1
        at = jnp.arange(length, dtype=jnp.int32)
        to = jnp.where(there, rank, length)
        slot = jnp.zeros((length,), jnp.int32).at[to].set(at, mode="drop")
        found = at < there.sum()
        token = jnp.where(found, token[slot], 0)
        return Predicted(slot, slots.row[slot], token, found, jnp.where(there, rank, -1))

    return jax.vmap(one)(slots, packing.prompt, packing.response)


def tokens_at(
    slots: Slots, packing: Packing, prompt: Int32[Array, "B P"], response: Int32[Array, "B T"]
) -> Int32[Array, "G L"]:
    """Return the token ids of a pass; 0 in padding."""

    def one(slots: Slots, length: Array, prompt: Array, response: Array) -> Array:
        start, at = length[slots.row], slots.position
        of_prompt = prompt[slots.row, jnp.minimum(at, prompt.shape[1] - 1)]
        of_response = response[slots.row, jnp.clip(at - start, 0, response.shape[1] - 1)]
        return jnp.where(slots.segment > 0, jnp.where(at < start, of_prompt, of_response), 0)

    grouped = (in_groups(each, packing.groups) for each in (prompt, response))
    return jax.vmap(one)(slots, packing.prompt, *grouped)


def in_groups(tree: Tree, groups: int) -> Tree:
    """Return the arrays [B, ...] as [G, B / G, ...]."""
    return jax.tree.map(lambda x: jnp.reshape(x, (groups, -1, *x.shape[1:])), tree)


def gather_tokens(tree: Tree, at: Predicted) -> Tree:
    """Return the values of response tokens: [B, T, ...] -> [G, N, ...], 0 where there is none.

    Arrays [B] of one value a row give each of its tokens that value.
    """
    groups = at.row.shape[0]

    def gather(x: Array) -> Array:
        x = in_groups(x, groups)
        if x.ndim == 2:
            found = jax.vmap(lambda rows, row: rows[row])(x, at.row)
        else:
            found = jax.vmap(lambda rows, row, token: rows[row, token])(x, at.row, at.token)
        there = at.there.reshape(*at.there.shape, *(1,) * (found.ndim - 2))
        return jnp.where(there, found, jnp.zeros((), found.dtype))

    return jax.tree.map(gather, tree)


def scatter_tokens(into: Tree, values: Tree, at: Predicted) -> Tree:
    """Return the arrays [B, T, ...] with the values [G, N, ...] of response tokens written."""
    groups = at.row.shape[0]

    def scatter(out: Array, value: Array) -> Array:
        rows = in_groups(out, groups)
        row = jnp.where(at.there, at.row, rows.shape[1])
        done = jax.vmap(lambda o, r, t, v: o.at[r, t].set(v, mode="drop"))(
            rows, row, at.token, value
        )
        return done.reshape(out.shape)

    return jax.tree.map(scatter, into, values)


def states_at(hidden: Float[Array, "G L D"], at: Predicted) -> Float[Array, "G N D"]:
    """Return the states that predict response tokens."""
    return jax.vmap(lambda states, slot: states[slot])(hidden, at.slot)


def cotangents(of_states: Float[Array, "G N D"], at: Predicted) -> Float[Array, "G L D"]:
    """Return the cotangents of a pass's states from those of `states_at` of all its tokens."""

    def one(values: Array, rank: Array) -> Array:
        return jnp.where((rank >= 0)[:, None], values[jnp.maximum(rank, 0)], 0)

    return jax.vmap(one)(of_states, at.rank)


def last_true(mask: Bool[Array, "B T"]) -> Int32[Array, " B"]:
    """Return the number of columns up to the last true one of each row."""
    columns = jnp.arange(1, mask.shape[1] + 1, dtype=jnp.int32)
    return jnp.max(jnp.where(mask, columns[None], 0), axis=1, initial=0)


def one_measure(micro_batch_tokens: int | None, micro_batch_size: int | None) -> None:
    """Raise ValueError where both are set: rows are packed, or padded."""
    if micro_batch_tokens is not None and micro_batch_size is not None:
        raise ValueError(
            f"micro_batch_tokens={micro_batch_tokens}, which packs rows, excludes micro_batch_size="
            f"{micro_batch_size}, which pads them; expected one of the two"
        )
