"""What is asked of student and teacher, in which order, row by row.

    rollout -> student: every row, in the student's prompt -> its K most probable words
            -> teachers: rows sorted by route; each teacher runs over its own rows only, in its own
            prompt, and is asked about the student's words, too

Both score at the rollout's temperature, and no gradient passes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Float32, Int32

from fireopd_jax.models.language_model import LanguageModel, Params
from fireopd_jax.ops.head import head_gather, head_stats, head_topk
from fireopd_jax.sharding.mesh import by_rows, join_micro_batches, micro_batches
from fireopd_jax.types import Array, Rollout, TokenStats, pytree

Model = tuple[LanguageModel, Params]


@dataclasses.dataclass(frozen=True)
class Question:
    """What a model is asked of each response token, and by which means."""

    k: int = 0
    """Length of the list of the most probable words; 0: none is asked for."""
    hidden: bool = False
    """Keep the final hidden states."""
    implementation: str | None = None
    chunk: int | None = None


@pytree
class Answer:
    """What a model says of each response token."""

    stats: TokenStats
    top_ids: Int32[Array, "B T K"] | None = None
    top_logprob: Float32[Array, "B T K"] | None = None
    at: Float32[Array, "B T N"] | None = None
    """Log-probabilities of words that it was told."""
    hidden: Float[Array, "B T E"] | None = None


Rows = tuple[tuple[Array, Array], Int32[Array, "B T"], Bool[Array, "B T"], Array | None]
"""Prompts and their lengths, responses, masks, and words i32[B, T, N] to ask about, if any."""


def ask(
    model: Model,
    rows: Rows,
    temperature: Array | float,
    question: Question,
    mesh: Mesh | None = None,
) -> Answer:
    """Run a model over some rows."""
    prompts, tokens, mask, words = rows
    network, params = model
    options = network.head_options(temperature, question.implementation, question.chunk, mesh)
    hidden, head = network.response_hidden(params, *prompts, tokens, mask)
    top_ids = top_logprob = at = None
    if question.k:
        listed = head_topk(hidden, head, tokens, k=question.k, **options)
        stats = TokenStats(listed.logprob, listed.entropy)
        top_ids, top_logprob = listed.top_ids, listed.top_logprob
    else:
        plain = head_stats(hidden, head, tokens, **options)
        stats = TokenStats(plain.logprob, plain.entropy)
    if words is not None:
        at = head_gather(hidden, head, tokens, words, **options).support_logprob
    return Answer(stats, top_ids, top_logprob, at, hidden if question.hidden else None)


def ask_student(
    model: Model,
    rollout: Rollout,
    temperature: Array | float,
    question: Question,
    micro_batch_size: int | None,
    mesh: Mesh | None = None,
) -> Answer:
    """Ask about every row, in the student's own prompt."""
    prompts = rollout.prompts
    inputs = ((prompts.tokens, prompts.length), rollout.tokens, rollout.mask, None)
    rows = rollout.tokens.shape[0]
    return _in_micro_batches(
        lambda x: ask(model, x, temperature, question, mesh),
        inputs,
        rows // (micro_batch_size or rows),
    )


def ask_teachers(
    models: Sequence[Model],
    rollout: Rollout,
    words: Int32[Array, "B T N"] | None,
    temperature: Array | float,
    question: Question,
    micro_batch_size: int | None,
    mesh: Mesh | None = None,
) -> Answer:
    """Ask each teacher about its own rows, in its own prompt."""
    prompts = rollout.prompts
    inputs = ((prompts.teacher_tokens, prompts.teacher_length), rollout.tokens, rollout.mask, words)
    rows = rollout.tokens.shape[0]
    size = micro_batch_size or (rows if len(models) == 1 else _block(rows, mesh))
    scorers = [
        lambda x, model=model: ask(model, x, temperature, question, mesh) for model in models
    ]
    return _routed(scorers, inputs, prompts.teacher, size, mesh)


def _in_micro_batches(score: Callable[[Any], Answer], inputs: Any, count: int) -> Answer:
    if count == 1:
        return score(inputs)
    return join_micro_batches(jax.lax.map(score, micro_batches(inputs, count)))


def _block(rows: int, mesh: Mesh | None) -> int:
    """Give the rows that a teacher scores at a time: an eighth, an even share for each device."""
    devices = 1 if mesh is None else mesh.size
    return -(-rows // (8 * devices)) * devices


def _routed(
    scorers: Sequence[Callable[[Any], Answer]],
    inputs: Any,
    route: Int32[Array, " B"],
    size: int,
    mesh: Mesh | None,
) -> Answer:
    """Let each scorer run over its own rows in blocks of `size`; how many blocks is traced."""
    rows = route.shape[0]
    if len(scorers) == 1:
        return _in_micro_batches(scorers[0], inputs, rows // size)

    def share(tree):
        """Split rows over the devices: gathered by an index they would stand whole on each."""
        return tree if mesh is None else jax.lax.with_sharding_constraint(tree, by_rows(mesh))

    order = jnp.argsort(route, stable=True)
    shapes = jax.eval_shape(scorers[0], inputs)
    out = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    start = jnp.int32(0)
    for teacher, score in enumerate(scorers):
        end = start + (route == teacher).sum()

        def block(i, out, score=score, start=start, end=end):
            at = start + i * size + jnp.arange(size)
            mine = order[jnp.minimum(at, rows - 1)]
            part = share(score(share(jax.tree.map(lambda x: x[mine], inputs))))
            target = jnp.where(at < end, mine, rows)
            return jax.tree.map(lambda o, p: o.at[target].set(p, mode="drop"), out, part)

        out = jax.lax.fori_loop(0, -(-(end - start) // size), block, out)
        start = end
    return out
