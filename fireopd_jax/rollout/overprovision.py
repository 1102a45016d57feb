"""Over-provisioned rollouts: a step begins to learn while its slowest rows are still written.

    E rows carried over, B new prompts -> decode until at most E rows are unfinished
                                       -> B rows to learn from, E rows for the next step

Every row is learned from once, when it has ended, and goes on from where it was, with the random
numbers that it would have had. What changes is the order: short responses are learned from first,
and a response of several steps has tokens of several parameters (`Rollout.version`). Where more
rows end at once than a step has room for, the rest wait; a step with too few, such as the first,
has empty rows.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Bool, Int32

from fireopd_jax.metrics import Max, Mean, Metrics
from fireopd_jax.models.language_model import LanguageModel, Params
from fireopd_jax.rollout.engine import as_rollout, complete, table
from fireopd_jax.rollout.layouts import AUTO, CacheLayout, layout_of
from fireopd_jax.rollout.loop import Loop
from fireopd_jax.rollout.meshes import over_data, replica_count
from fireopd_jax.rollout.sampling import Sampling
from fireopd_jax.rollout.state import LENGTH, RUNNING, STOP, Requests, Shape
from fireopd_jax.sharding.mesh import REPLICAS
from fireopd_jax.types import Array, Prompts, Rollout, TokenStats, Writer, pytree

ENDED, EMPTY, UNFINISHED = range(3)
"""Order in which rows are taken for a step."""


@pytree
class Carried:
    """E rows that no step has learned from; those with prompts of length 0 are empty."""

    rows: Rollout
    ended: Bool[Array, " E"]
    """Whether the response is complete."""


def nothing_carried(prompts: Prompts, max_tokens: int) -> Carried:
    """Return empty rows, one for each of the prompts, of which only the shapes are used."""
    count = prompts.tokens.shape[0]
    ints = jnp.zeros((count, max_tokens), jnp.int32)
    floats, no = ints.astype(jnp.float32), jnp.zeros(count, bool)
    rows = Rollout(
        prompts=jax.tree.map(jnp.zeros_like, prompts),
        tokens=ints,
        mask=ints.astype(bool),
        logprob=floats,
        model_logprob=floats,
        finished=no,
        version=ints,
        writer=jnp.full_like(ints, Writer.STUDENT),
        policy=TokenStats(floats, floats),
    )
    return Carried(rows, no)


def generate_overprovisioned(
    model: LanguageModel,
    params: Params,
    prompts: Prompts,
    carried: Carried,
    sampling: Sampling,
    version: Int32[jax.Array, ""],
    *,
    max_tokens: int,
    slots: int | None = None,
    memory: CacheLayout = AUTO,
    mesh: Mesh | None = None,
    group_size: int = 1,
) -> tuple[Rollout, Carried, Metrics]:
    """Return B rows that have ended, the E others, and metrics of both.

    Arguments are those of `engine.generate`; `sampling` is the same for all rows. Rows with the
    same `sample_id // group_size` are a group of the result.
    """
    replicas, width = replica_count(mesh), prompts.tokens.shape[1]
    memory = layout_of(memory, model.config, mesh, width + max_tokens, slots)
    rows, extra = (len(x) // replicas for x in (prompts.length, carried.ended))
    shape = Shape.of(rows + extra, width, max_tokens, slots, memory.align, continued=True)
    loop = Loop(model, memory, shape.piece, mesh)

    def draw(
        params: Params, prompts: Prompts, carried: Carried, sampling: Sampling, version: jax.Array
    ) -> tuple[Rollout, Carried]:
        both = _joined(carried.rows.prompts, prompts)
        begun = begin(table(both, sampling.rows(rows + extra), max_tokens), carried)
        end = complete(loop, shape, params, begun, version, unfinished=extra)
        ended = end.finish != RUNNING
        kind = jnp.where(ended, ENDED, jnp.where(end.length > 0, UNFINISHED, EMPTY))
        order = jnp.argsort(kind, stable=True)
        taken, left = (
            jax.tree.map(lambda x, at=at: x[at], (as_rollout(both, end), ended))
            for at in (order[:rows], order[rows:])
        )
        return taken[0], Carried(*left)

    whole, split = PartitionSpec(), PartitionSpec(REPLICAS)
    draw = over_data(draw, mesh, (whole, split, split, whole, whole), split)
    layout = model.to_decode_layout(params, mesh)
    taken, left = draw(layout, prompts, carried, sampling, version)
    return grouped(taken, group_size), left, metrics(taken, left, version)


def begin(requests: Requests, carried: Carried) -> Requests:
    """Return the request table of all rows with the carried responses in its first ones."""
    rows, extra = carried.rows, len(carried.ended)

    def first(old: Array, new: Array) -> Array:
        return jnp.asarray(old).at[:extra].set(new)

    finish = jnp.where(rows.finished, STOP, jnp.where(carried.ended, LENGTH, RUNNING))
    assert rows.policy is not None
    return dataclasses.replace(
        requests,
        tokens=first(requests.tokens, rows.tokens),
        logprob=first(requests.logprob, rows.logprob),
        model_logprob=first(requests.model_logprob, rows.model_logprob),
        policy_logprob=first(requests.policy_logprob, rows.policy.logprob),
        policy_entropy=first(requests.policy_entropy, rows.policy.entropy),
        version=first(requests.version, rows.version),
        count=first(requests.count, rows.mask.sum(axis=1, dtype=jnp.int32)),
        finish=first(requests.finish, finish),
    )


def grouped(rollout: Rollout, group_size: int) -> Rollout:
    """Return the rollout with the number of the first row of its prompt as the group of each row.

    The rows of a group that ended in another step are not there.
    """
    prompt = rollout.prompts.sample_id // group_size
    there = rollout.prompts.length > 0
    same = (prompt[:, None] == prompt[None]) & there[:, None] & there[None]
    own = jnp.arange(len(prompt), dtype=jnp.int32)
    group = jnp.where(there, jnp.argmax(same, axis=1).astype(jnp.int32), own)
    return dataclasses.replace(rollout, prompts=dataclasses.replace(rollout.prompts, group=group))


def metrics(taken: Rollout, left: Carried, version: Int32[Array, ""]) -> Metrics:
    """Return how old the tokens of a step are, and what is carried over."""
    unfinished = (left.rows.prompts.length > 0) & ~left.ended
    behind = (version - taken.version).astype(jnp.float32)
    one = jnp.float32(1)
    return {
        "rollout/stale_fraction": Mean.of(behind > 0, taken.mask),
        "rollout/updates_behind": Mean.of(behind, taken.mask),
        "rollout/updates_behind_max": Max.of(behind, taken.mask),
        "rollout/learned_rows": Mean(taken.mask.any(axis=1).sum().astype(jnp.float32), one),
        "rollout/unfinished_rows": Mean(unfinished.sum().astype(jnp.float32), one),
        "rollout/unfinished_length": Mean.of(left.rows.mask.sum(axis=1), unfinished),
    }


def _joined(first: Prompts, second: Prompts) -> Prompts:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)
