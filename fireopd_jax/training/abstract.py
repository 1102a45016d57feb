"""Shapes, dtypes and shardings of everything that the programs of a run are called with.

Setup, method -> inputs of its programs, without allocating anything
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fireopd_jax.data.examples import example_prompts
from fireopd_jax.data.pipeline import Encoded
from fireopd_jax.method.config import MethodConfig
from fireopd_jax.models.language_model import LanguageModel, Params
from fireopd_jax.models.placement import Placement
from fireopd_jax.rollout.sampling import Sampling
from fireopd_jax.session.contexts import teacher_specs
from fireopd_jax.session.parameters import abstract_params, placed
from fireopd_jax.session.session import Generate, student_side
from fireopd_jax.session.setup import Setup
from fireopd_jax.session.specs import ModelSpec
from fireopd_jax.sharding.mesh import by_rows, replicated
from fireopd_jax.training.in_flight import no_rows
from fireopd_jax.training.programs import Programs, base_policy
from fireopd_jax.training.state import TrainState
from fireopd_jax.types import Prompts, Rollout


def nbytes(tree: Any) -> int:
    """Return the bytes on each device of all arrays, or shapes, of a tree; keys count as none."""

    def size(leaf: Any) -> int:
        place = getattr(leaf, "sharding", None)
        shape = leaf.shape if place is None else place.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree) if hasattr(leaf.dtype, "itemsize"))


def abstract_prompts(mesh: Mesh, encoded: Encoded, rows: int, *, references: bool) -> Prompts:
    """Return the shapes of a batch of prompts, sharded by rows."""
    return placed(example_prompts(encoded, rows, references=references), by_rows(mesh))


def abstract_state(begin: Callable[[Params], TrainState], params: Params) -> TrainState:
    """Return the shapes of the state that `begin` makes of `params`, sharded like these."""
    return placed(jax.eval_shape(begin, params), Placement(mesh_of(params)))


def staying(models: Sequence[ModelSpec], place: Placement) -> list[Params]:
    """Return the shapes of those models that are on the devices throughout: not offloaded."""
    return [abstract_params(each.model, place) for each in models if not each.config.offloaded]


def mesh_of(params: Params) -> Mesh:
    """Return the mesh that parameters, or their shapes, lie on."""
    return jax.tree.leaves(params)[0].sharding.mesh


def sampler_inputs(
    setup: Setup,
    spec: ModelSpec,
    params: Params,
    encoded: Encoded,
    rows: int,
    max_tokens: int | None = None,
) -> tuple[Params, Prompts, Sampling, Any]:
    """Return the inputs of a model's sampler for a batch of `rows` prompts."""
    if spec in setup.teachers:
        width = encoded.max_teacher_prompt_tokens
        encoded = dataclasses.replace(encoded, max_prompt_tokens=width)
    prompts = student_side(example_prompts(encoded, rows, references=False))
    sampling = setup.sampling("eval", temperature=1.0, spec=spec, max_tokens=max_tokens)
    version = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(setup.mesh))
    return params, placed(prompts, by_rows(setup.mesh)), sampling, version


@dataclasses.dataclass(frozen=True)
class MethodShapes:
    """Shapes of the inputs of a method's programs."""

    setup: Setup
    method: MethodConfig
    encoded: Encoded
    sampler: Generate
    start: Params
    teachers: list[Params]
    """Those in memory; none where the student is its own teacher."""
    base: Params | None
    known: bool
    """Whether the rollouts have the sampler's shapes: no stage on the host adds to them."""

    @classmethod
    def of(
        cls, setup: Setup, method: MethodConfig, encoded: Encoded, sampler: Generate
    ) -> "MethodShapes":
        """Return the shapes of a method of a run; `sampler` is the student's."""
        place = Placement(setup.mesh)
        specs = setup.teachers if method.teacher.resident else ()
        served = bool(setup.served) and method.teacher.resident and method.score.scores_teacher
        return cls(
            setup,
            method,
            encoded,
            sampler,
            abstract_params(setup.student.model, place),
            [abstract_params(spec.model, place) for spec in specs],
            abstract_params(base_policy(setup), place) if method.score.needs_base else None,
            known=not method.asked_of_rollout and not served and setup.config.rollout.window == 1,
        )

    @property
    def models(self) -> Sequence[LanguageModel]:
        """The models that score."""
        own = [spec.model for spec in teacher_specs(self.setup, self.method)]
        return self.setup.student.model, *own

    @property
    def width(self) -> int:
        """Widest row that is scored: of prompt and response."""
        widest = max(self.encoded.max_prompt_tokens, self.encoded.max_teacher_prompt_tokens)
        return widest + self.setup.config.rollout.max_tokens

    @property
    def adapted(self) -> Params | None:
        """The frozen parameters under adapters."""
        return self.start if self.setup.config.student.lora is not None else None

    def state(self, programs: Programs) -> TrainState:
        """Return the shapes of the training state."""
        return abstract_state(programs.init, self.start)

    def _of_step(self, programs: Programs) -> tuple[Params, list[Params], TrainState]:
        """Return the parameters of the student and of the teachers, and the state of a step."""
        place, state = Placement(self.setup.mesh), self.state(programs)

        def merged(trained: Params) -> Params:
            return placed(jax.eval_shape(programs.merged_params, self.adapted, trained), place)

        student = merged(state.params)
        if not self.method.teacher.own:
            return student, self.teachers, state
        if self.method.teacher.at_start:
            return student, [self.start], state
        return student, [student if state.average is None else merged(state.average)], state

    def resident(self, programs: Programs) -> int:
        """Return the bytes of all parameters and states that are in memory throughout a step."""
        student, _, state = self._of_step(programs)
        place = Placement(self.setup.mesh)
        held = self.adapted is not None or self.method.teacher.at_start or self.base is not None
        parts = [
            state,
            *staying(self.setup.teachers, place),
            *([student] if self.adapted else []),
            *([self.start] if held else []),
        ]
        return nbytes(parts)

    @property
    def offloaded(self) -> list[Params | None]:
        """The teachers that are on the devices for a score only, None in place of others."""
        if not self.teachers:  # the student itself
            return [None]
        pairs = zip(self.setup.teachers, self.teachers, strict=True)
        return [params if spec.config.offloaded else None for spec, params in pairs]

    def draw(self, programs: Programs) -> tuple[Any, ...]:
        """Return the inputs of the sampler with rows in flight."""
        setup, (student, _, state) = self.setup, self._of_step(programs)
        rows, place = setup.config.rollout.batch_size, by_rows(setup.mesh)
        prompts = abstract_prompts(setup.mesh, self.encoded, rows, references=False)
        carried = placed(no_rows(setup, self.encoded), place)
        sampling = setup.sampling("rollout", temperature=1.0)
        return student, prompts, carried, sampling, state.updates

    def score(self, programs: Programs) -> tuple[Any, ...]:
        """Return the inputs of the score program."""
        setup = self.setup
        student, teachers, state = self._of_step(programs)
        config = setup.config.rollout
        mixed = config.on_policy_fraction < 1
        inputs = sampler_inputs(setup, setup.student, student, self.encoded, config.batch_size)
        prompts = abstract_prompts(setup.mesh, self.encoded, config.batch_size, references=mixed)

        def draw(prompts: Prompts, *inputs: Any) -> Rollout:
            drawn = self.sampler(*inputs)
            policy = drawn.policy if self.method.score.student == "decode" else None
            return dataclasses.replace(drawn, prompts=prompts, policy=policy)

        rollout = placed(jax.eval_shape(draw, prompts, *inputs), by_rows(setup.mesh))
        temperature = jnp.float32(1)
        return student, teachers, rollout, temperature, state.updates, state.stages, self.base

    def top_tokens(self, programs: Programs) -> tuple[Any, ...]:
        """Return the program of the most probable tokens, and its inputs."""
        student, teachers, rollout, temperature, *_ = self.score(programs)
        teachers = teachers if self.method.score.scores_teacher else []
        return programs.top_tokens, student, teachers, rollout, temperature

    def update(self, programs: Programs) -> tuple[Any, ...]:
        """Return the inputs of the update program."""
        inputs = self.score(programs)
        _, teachers, state = self._of_step(programs)
        batch, _, stages, _ = jax.eval_shape(programs.score.jitted, *inputs)
        place = Placement(self.setup.mesh)
        state = placed(
            jax.eval_shape(lambda old, new: dataclasses.replace(old, stages=new), state, stages),
            place,
        )
        judge = self.method.loss.judge(teachers, self.base)
        batch = placed(batch, by_rows(self.setup.mesh))
        return state, batch, jnp.float32(1), self.adapted, judge

    def describe(self, programs: Programs) -> tuple[Any, ...]:
        """Return the program of the metrics of a batch, and its inputs."""
        batch, keep, *_ = jax.eval_shape(programs.score.jitted, *self.score(programs))
        place = by_rows(self.setup.mesh)
        return programs.describe, placed(batch, place), placed(keep, place)
