"""Score the sampled tokens by the student and by each row's own teacher.

    rollout -> student: every row, in the student's prompt
            -> teachers: rows sorted by route; each teacher runs over its own rows only, in its
            own prompt

Both score at the rollout's temperature, and no gradient passes.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Float, Int32
from pydantic import PositiveInt

from fireopd_jax.config import config
from fireopd_jax.models.language_model import LanguageModel, Params
from fireopd_jax.sharding import by_rows, join_micro_batches, micro_batches
from fireopd_jax.types import Array, Rollout, Scores, TokenStats


@config
class SampledToken:
    """Log-prob of each sampled token and entropy of its distribution, by student and teacher."""

    kind: Literal["sampled_token"] = "sampled_token"
    micro_batch_size: PositiveInt | None = None
    """Rows scored at a time; by default all, or an eighth when several teachers share the batch."""
    head: Literal["reference", "chunked", "pallas_tpu", "pallas_gpu", "pallas_gpu_rows"] | None = (
        None
    )
    """Implementation of the head statistics; by default by platform and shape."""
    head_chunk: PositiveInt | None = None
    """Columns of logits that exist at a time; by default a formula of the shape."""

    gives: ClassVar[frozenset[str]] = frozenset(
        {"student.logprob", "student.entropy", "teacher.logprob", "teacher.entropy"}
    )

    def __call__(
        self,
        student: tuple[LanguageModel, Params],
        teachers: Sequence[tuple[LanguageModel, Params]],
        rollout: Rollout,
        temperature: Float[Array, ""] | float,
        mesh: Mesh | None = None,
    ) -> Scores:
        """Score a batch of rollouts, its rows split over the mesh where one is given."""
        rows = rollout.tokens.shape[0]
        prompts = rollout.prompts
        own = (prompts.tokens, prompts.length)
        theirs = (prompts.teacher_tokens, prompts.teacher_length)

        def stats(model: tuple[LanguageModel, Params], context, tokens, mask) -> TokenStats:
            prompt, length = context
            return model[0].response_stats(
                model[1], prompt, length, tokens, mask, temperature, self.head, self.head_chunk
            )

        inputs = (own, rollout.tokens, rollout.mask)
        size = self.micro_batch_size or rows
        scores = Scores(
            student=_in_micro_batches(lambda x: stats(student, *x), inputs, rows // size),
            teacher=_routed(
                [lambda x, teacher=teacher: stats(teacher, *x) for teacher in teachers],
                (theirs, rollout.tokens, rollout.mask),
                prompts.teacher,
                size if self.micro_batch_size or len(teachers) == 1 else _block(rows, mesh),
                mesh,
            ),
        )
        return jax.lax.stop_gradient(scores)


def _in_micro_batches(score, inputs, count: int) -> TokenStats:
    if count == 1:
        return score(inputs)
    return join_micro_batches(jax.lax.map(score, micro_batches(inputs, count)))


def _block(rows: int, mesh: Mesh | None) -> int:
    """Give the rows that a teacher scores at a time: an eighth, an even share for each device."""
    devices = 1 if mesh is None else mesh.shape["data"]
    return -(-rows // (8 * devices)) * devices


def _routed(scorers, inputs, route: Int32[Array, " B"], size: int, mesh: Mesh | None) -> TokenStats:
    """Let each scorer run over its own rows in blocks of `size`; how many blocks is traced."""
    rows = route.shape[0]
    if len(scorers) == 1:
        return _in_micro_batches(scorers[0], inputs, rows // size)

    def share(tree):
        """Split rows over the devices: gathered by an index they would stand whole on each."""
        return tree if mesh is None else jax.lax.with_sharding_constraint(tree, by_rows(mesh))

    order = jnp.argsort(route, stable=True)
    zeros = jnp.zeros_like(inputs[1], jnp.float32)
    out = TokenStats(logprob=zeros, entropy=zeros)
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
