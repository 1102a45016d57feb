"""The jitted programs of a method.

    Setup, method -> init, score, describe, update

Shapes are fixed, so each compiles once.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fireopd_jax.method import diagnostics
from fireopd_jax.method.batch import Assembled, StageStates, assemble, stage_context
from fireopd_jax.method.config import MethodConfig
from fireopd_jax.method.scoring import Resident, ScoreInputs
from fireopd_jax.method.scoring.teachers import score_student, score_teachers
from fireopd_jax.method.stage import Keep
from fireopd_jax.metrics import Metrics
from fireopd_jax.models.language_model import LanguageModel, Params
from fireopd_jax.models.placement import Placement
from fireopd_jax.recipe.optim import OptimConfig
from fireopd_jax.rollout.sampling import seed_for
from fireopd_jax.session.contexts import teacher_names, teacher_specs
from fireopd_jax.session.setup import Setup, special_ids
from fireopd_jax.sharding.mesh import by_rows, replicated
from fireopd_jax.training.in_flight import make_draw
from fireopd_jax.training.optimizer import make_optimizer
from fireopd_jax.training.state import TrainState, init_state
from fireopd_jax.training.update import Update, make_update
from fireopd_jax.types import Array, Batch, Rollout, StageContext, TopTokens

PASSES: Any = {"micro_batch_tokens": None, "micro_batch_size": None, "remat": None}
"""Settings of an optimizer that its state does not depend on."""


@dataclasses.dataclass(frozen=True)
class ScoreProgram:
    """Scores, filters and reweights a rollout."""

    jitted: Any

    def __call__(
        self,
        params: Params,
        teachers: Sequence[Params],
        rollout: Rollout,
        temperature: Array,
        updates: Array,
        stages: StageStates,
        base: Params | None,
    ) -> Assembled:
        """Return the batch for the update, and the stages' next states.

        `params` are the student's, `teachers` those of each teacher, `updates` is the number of
        updates so far, `base` the parameters of the base policy if the method needs one.
        """
        return Assembled(
            *self.jitted(params, teachers, rollout, temperature, updates, stages, base)
        )


@dataclasses.dataclass(frozen=True)
class Programs:
    """The jitted programs of a method; shapes are fixed, so each compiles once."""

    init: Callable[[Params], TrainState]
    """Returns the state before the first update; donates the parameters unless adapters are
    trained."""
    merged_params: Callable[[Params | None, Params], Params]
    """(frozen parameters or None, trained parameters) -> the student's parameters, adapters
    merged."""
    score: ScoreProgram
    draw: Any
    """Samples a step's responses, with rows in flight (`training.in_flight`); None without."""
    describe: Callable[[Batch, Keep], Metrics]
    """Returns the metrics of a batch; the same program for all methods."""
    update: Update
    top_tokens: Any = None
    """(student's parameters, teachers', rollout, temperature) -> TopTokens; None where
    `run.completions_topk` is 0."""


def make_programs(
    setup: Setup,
    method: MethodConfig,
    optim: OptimConfig,
    made: dict[str, Any] | None = None,
) -> Programs:
    """Return the jitted programs of a method.

    `made` holds programs of the same setup by what they depend on: equal ones are taken from it,
    others are added.
    """
    made = {} if made is None else made
    config = setup.config

    def once(make: Callable[[], Any], *depends: Any) -> Any:
        key = repr(depends)
        if key not in made:
            made[key] = make()
        return made[key]

    describe = functools.partial(
        diagnostics.of_batch,
        room=config.rollout.max_tokens,
        teachers=teacher_names(setup, method),
    )
    stages, options = (method.filter, method.reweight), (method.teacher, method.score)
    init, merged_params = once(
        lambda: _make_init(setup, method, optim),
        *("init", stages, method.teacher, dataclasses.replace(optim, **PASSES)),
    )
    score = once(
        lambda: _make_score(setup, method),
        *("score", stages, options, method.aggregate, method.texts),
    )
    update = once(
        lambda: _make_update(setup, method, optim, init),
        *("update", jax.eval_shape(lambda: method.init(config.rollout.batch_size))),
        *(options, method.loss, optim),
    )
    described = once(
        lambda: jax.jit(describe, out_shardings=replicated(setup.mesh)),
        *("describe", teacher_names(setup, method)),
    )
    draw = once(lambda: make_draw(setup), "draw") if config.rollout.overprovision else None
    top = once(lambda: _make_top_tokens(setup, method), *("top tokens", options))
    return Programs(init, merged_params, score, draw, described, update, top)


def _updates(setup: Setup) -> int:
    return setup.config.run.steps * setup.config.run.updates_per_rollout


def _make_init(
    setup: Setup, method: MethodConfig, optim: OptimConfig
) -> tuple[Callable[[Params], TrainState], Callable[[Params | None, Params], Params]]:
    config, place = setup.config, Placement(setup.mesh)
    optimizer = make_optimizer(optim, _updates(setup))
    lora, rows = config.student.lora, config.rollout.batch_size
    averaged = method.teacher.moving is not None
    shapes = setup.student.model.shapes()
    if lora is None:

        def begin(params: Params) -> TrainState:
            return init_state(params, optimizer, method.init(rows), averaged=averaged)

        places = place.of(jax.eval_shape(begin, shapes))
        return (
            jax.jit(begin, out_shardings=places, donate_argnums=0),
            lambda start, trained: trained,
        )
    key = jax.random.key(seed_for(config.run.seed, "lora"), impl="threefry2x32")

    def begin_adapters(params: Params) -> TrainState:
        adapters = lora.init(key, params)
        return init_state(adapters, optimizer, method.init(rows), averaged=averaged)

    places = place.of(jax.eval_shape(begin_adapters, shapes))
    init = jax.jit(begin_adapters, out_shardings=places)
    return init, jax.jit(lora.merge, out_shardings=place.of(shapes))


def _make_score(setup: Setup, method: MethodConfig) -> ScoreProgram:
    student = setup.student.model
    teachers = [spec.scoring(setup.student) for spec in teacher_specs(setup, method)]
    base_model = base_policy(setup)
    rows, everywhere = by_rows(setup.mesh), replicated(setup.mesh)

    def score(params, teacher_params, rollout, temperature, done, stages, base):
        inputs = ScoreInputs(
            rollout,
            Resident(student, params),
            [Resident(*pair) for pair in zip(teachers, teacher_params, strict=True)],
            temperature,
            setup.mesh,
            None if base is None else Resident(base_model, base),
            method.reweight.kernel_strengths,
        )
        context = context_of(setup, method, rollout, done)
        out = assemble(
            rollout,
            method.score(inputs),
            method.filter,
            method.reweight,
            method.aggregate,
            context,
            stages,
        )
        return out.batch, out.keep, out.states, out.metrics

    return ScoreProgram(jax.jit(score, out_shardings=(rows, rows, everywhere, everywhere)))


def _make_top_tokens(setup: Setup, method: MethodConfig) -> Any:
    run = setup.config.run
    if not run.completions_topk or not run.completions_every:
        return None
    student, scored = setup.student.model, method.score.scores_teacher
    teachers = [each.scoring(setup.student) for each in teacher_specs(setup, method) if scored]
    size = method.score.micro_batch_size

    def top_tokens(params, teacher_params, rollout, temperature):
        options = dataclasses.replace(method.score.options(setup.mesh), k=run.completions_topk)
        own = score_student(Resident(student, params), rollout, temperature, options, size)
        assert own.top_ids is not None and own.top_logprob is not None
        if not teachers:
            return TopTokens(own.top_ids, own.top_logprob)
        residents = [Resident(*pair) for pair in zip(teachers, teacher_params, strict=True)]
        theirs = score_teachers(residents, rollout, temperature, options, size)
        return TopTokens(own.top_ids, own.top_logprob, theirs.top_ids, theirs.top_logprob)

    return jax.jit(top_tokens, out_shardings=by_rows(setup.mesh))


def context_of(
    setup: Setup, method: MethodConfig, rollout: Rollout, updates: Array | int
) -> StageContext:
    """Return the context of the stages for a rollout that is scored after so many updates."""
    return stage_context(
        rollout,
        max(len(teacher_names(setup, method)), 1),
        setup.student.model.vocab_size,
        progress=jnp.float32(updates) / jnp.float32(_updates(setup)),
        special=special_ids(method.texts, setup.student.tokenizer),
        stop=setup.student.stop,
    )


def base_policy(setup: Setup) -> LanguageModel:
    """Return the base policy's model: the one that the configuration names, else the student's."""
    return setup.student.model if setup.base is None else setup.base.model


def _make_update(
    setup: Setup, method: MethodConfig, optim: OptimConfig, init: Callable[[Params], TrainState]
) -> Update:
    state = Placement(setup.mesh).of(jax.eval_shape(init, setup.student.model.shapes()))
    teachers = [spec.scoring(setup.student) for spec in teacher_specs(setup, method)]
    update = make_update(
        setup.student.model,
        method.loss,
        make_optimizer(optim, _updates(setup)),
        micro_batch_size=optim.micro_batch_size,
        micro_batch_tokens=optim.micro_batch_tokens,
        head=method.score.head,
        head_chunk=method.score.head_chunk,
        remat=optim.remat or "none",
        lora=setup.config.student.lora,
        teacher=method.loss.judge(teachers, base_policy(setup)),
        mesh=setup.mesh,
        decay=method.teacher.moving,
    )
    return jax.jit(update, donate_argnums=0, out_shardings=(state, replicated(setup.mesh)))
