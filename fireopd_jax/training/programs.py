"""The jitted programs of a method, on one setup.

    Setup, method -> generate, score, describe, update

Shapes are fixed, so each compiles once.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fireopd_jax.method import diagnostics
from fireopd_jax.method.batch import assemble, rows_of
from fireopd_jax.method.filtering import AllOf, TeacherQuantile
from fireopd_jax.models.language_model import Params
from fireopd_jax.recipe.optim import OptimConfig
from fireopd_jax.recipe.schema import MethodConfig
from fireopd_jax.rollout.sampling import seed_for
from fireopd_jax.session.setup import Setup, special_ids
from fireopd_jax.sharding.mesh import by_rows, replicated
from fireopd_jax.training.update import Metrics, TrainState, make_optimizer, make_update
from fireopd_jax.types import Array, Batch, pytree


@pytree
class Beside:
    """What only some methods score with."""

    base: Params | None = None
    """The base policy."""
    recent: Array | None = None
    """Scores of earlier batches, f32[W, B, 2]: see `Rows`."""
    correct: Array | None = None
    """Grades of the responses, f32[B]."""


NOTHING_BESIDE = Beside()


@dataclasses.dataclass(frozen=True)
class Programs:
    """The jitted programs of a method; shapes are fixed, so each compiles once."""

    learner: Callable[[Params], Params]
    """What learns, of the student as it begins: a copy of its parameters, or new adapters."""
    whole: Callable[[Params, Params], Params]
    """The student from how it began and what has learnt: what answers, is scored and saved."""
    score: Callable[..., tuple[Batch, jax.Array, Metrics, Array | None]]
    """(student, teachers, rollout, temperature, updates done, `Beside`) -> batch, keep, what each
    of several filters keeps, scores to remember"""
    describe: Callable[[Batch, Array], Metrics]
    """Diagnostics of what `score` gives: the same for all methods, so compiled once for several."""
    update: Callable[..., tuple[TrainState, Metrics]]
    """(state, batch, temperature, what adapters are added to or None, teacher or None)"""
    copy: Callable[[Any], Any]
    """Buffers of one's own: `update` gives those of its input away."""
    optimizer: optax.GradientTransformation


def make_programs(setup: Setup, method: MethodConfig, optim: OptimConfig) -> Programs:
    """Wire the six choices of a method."""
    config, student = setup.config, setup.student.model
    teachers = [teacher.scoring(setup.student) for teacher in setup.teachers]
    rows, whole = by_rows(setup.mesh), replicated(setup.mesh)
    updates = config.run.steps * config.run.updates_per_rollout
    optimizer = make_optimizer(optim, updates)
    lora = config.student.lora
    base_model = student if setup.base is None else setup.base.model
    ids = {"special": special_ids(method.filter, setup.student.tokenizer)}
    ids["stop"] = setup.student.stop

    def score(params, teacher_params, rollout, temperature, done, beside=NOTHING_BESIDE):
        scores = method.score(
            (student, params),
            list(zip(teachers, teacher_params, strict=True)),
            rollout,
            temperature,
            setup.mesh,
            None if beside.base is None else (base_model, beside.base),
        )
        if method.score.margin is not None and beside.correct is not None:
            scores = method.score.margin(scores, rollout, beside.correct)
        known = ids | {"recent": beside.recent, "progress": done / jnp.float32(updates)}
        batch, keep = assemble(
            rollout,
            scores,
            method.filter,
            method.reweight,
            method.aggregate,
            len(teachers),
            student.vocab_size,
            **known,
        )
        recent, metrics = None, {}
        seen = rows_of(rollout, len(teachers), student.vocab_size, **known)
        if beside.recent is not None and isinstance(method.filter, TeacherQuantile | AllOf):
            recent = method.filter.remember(scores, seen, beside.recent)
        if isinstance(method.filter, AllOf):
            metrics = diagnostics.of_filters(method.filter, scores, seen)
        return batch, keep, metrics, recent

    update = make_update(
        student,
        method.loss,
        optimizer,
        micro_batch_size=optim.micro_batch_size,
        head=method.score.head,
        head_chunk=method.score.head_chunk,
        remat=optim.remat,
        lora=lora,
        teacher=teachers[0],
        mesh=setup.mesh,
    )
    room, names = config.rollout.max_tokens, list(config.teachers)
    describe = functools.partial(diagnostics.of_batch, room=room, teachers=names)
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=whole)
    if lora is None:
        learner, merge = copy, lambda start, learnt: learnt
    else:
        key = jax.random.key(seed_for(config.run.seed, "lora"), impl="threefry2x32")
        learner = jax.jit(functools.partial(lora.init, key), out_shardings=whole)
        merge = jax.jit(lora.merge, out_shardings=whole)
    return Programs(
        learner=learner,
        whole=merge,
        score=jax.jit(score, out_shardings=(rows, rows, whole, whole)),
        describe=jax.jit(describe, out_shardings=whole),
        update=jax.jit(update, donate_argnums=0, out_shardings=(whole, whole)),
        copy=copy,
        optimizer=optimizer,
    )
