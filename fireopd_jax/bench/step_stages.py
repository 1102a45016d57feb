"""The stages of one training step on random models: the programs that training compiles.

    models, requests -> Setup -> programs of FiRe-OPD -> rollout -> score -> update -> [again]

A step begins with the parameters that the last one left. Where the student is scored by a forward
pass it has a program of its own, as for served teachers, so that its time can be told from the
teacher's; training has one program for both.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fireopd_jax.bench.workload import Workload
from fireopd_jax.method.config import MethodConfig
from fireopd_jax.method.scoring import Resident
from fireopd_jax.models.architecture import DecoderConfig
from fireopd_jax.models.language_model import LanguageModel, Params
from fireopd_jax.models.placement import Placement
from fireopd_jax.recipe.schema import load_config, with_method
from fireopd_jax.recipe.student_scores import with_student_scores
from fireopd_jax.runtime.memory import device_memory
from fireopd_jax.session.parameters import abstract_params, placed, random_init
from fireopd_jax.session.session import make_generate, student_side
from fireopd_jax.session.setup import Setup, set_up
from fireopd_jax.sharding.mesh import by_rows, replicated, shard_rows
from fireopd_jax.training.abstract import abstract_state, nbytes
from fireopd_jax.training.fitting import (
    Choice,
    Pass,
    first_that_fits,
    score_choices,
    update_choices,
)
from fireopd_jax.training.plan import USED, with_score
from fireopd_jax.training.programs import make_programs
from fireopd_jax.types import EarlyScores, Prompts

METHOD = "fire_opd"
STAGES = ("rollout", "score_student", "score_teacher", "update")
Layout = Literal["packed", "padded"]
LAYOUTS: tuple[Layout, ...] = ("packed", "padded")


def make_setup(student: DecoderConfig, teacher: DecoderConfig, work: Workload) -> Setup:
    """Return the setup of a run with these models and rows of this size, on one device."""
    rows = len(work.length)
    config = load_config(
        [
            "smoke",
            "mesh.data=1",
            "run.compare=[]",
            "eval.problems=0",
            "rollout.group_size=1",
            f"rollout.batch_size={rows}",
            f"rollout.max_tokens={work.room}",
        ]
    )
    setup = set_up(with_method(config, METHOD))

    def of(config: DecoderConfig) -> LanguageModel:
        assert config.vocab_size is not None
        return LanguageModel(config, config.vocab_size)

    return dataclasses.replace(
        setup,
        student=dataclasses.replace(setup.student, model=of(student)),
        teachers=tuple(dataclasses.replace(each, model=of(teacher)) for each in setup.teachers),
    )


def random_params(setup: Setup, index: int) -> Params:
    """Return random parameters of the student (index 0) or of a teacher, the same each time."""
    spec = (setup.student, *setup.teachers)[index]
    return random_init(spec.model, replicated(setup.mesh))(jax.random.key(index))


def prompts_of(work: Workload) -> Prompts:
    """Return the requests as a batch of prompts, the same for student and teacher."""
    index = np.arange(len(work.length), dtype=np.int32)
    tokens, length = work.prompt, work.length
    return Prompts(tokens, length, tokens, length, np.zeros_like(index), index, index, index)


def choices(setup: Setup, layout: Layout, work: Workload) -> tuple[Choice, Choice]:
    """Return how rows pass through score and update.

    Packed: the first choices of training that fit the memory by its estimates. Padded: as many
    whole rows at a time as fit.
    """
    rows, width = work.prompt.shape
    specs, place = (setup.student, *setup.teachers), replicated(setup.mesh)
    shapes = [abstract_params(spec.model, place) for spec in specs]
    trained = nbytes(shapes[0]) // 4
    passes = [
        Pass(spec.model.config, rows, width + work.room, 1, jax.default_backend()) for spec in specs
    ]
    free = device_memory(list(setup.mesh.devices.flat)).free
    # Parameters, and two moments of the student's.
    room = free * USED - sum(nbytes(each) for each in shapes) - 2 * nbytes(shapes[0])
    remat = update_choices(passes[0], setup.config.optim)[0].remat
    sizes = [Choice(size, remat) for size in range(rows, 0, -1) if rows % size == 0]
    packed = layout == "packed"
    return (
        first_that_fits(
            score_choices(passes[0], None) if packed else sizes,
            lambda each: max(one.score(each) for one in passes),
            room,
        ),
        first_that_fits(
            update_choices(passes[0], setup.config.optim) if packed else sizes,
            lambda each: passes[0].update(each, trained),
            room,
        ),
    )


class TrainingStep:
    """A training step, compiled; `seconds` has the CPU and wall seconds of each stage by round."""

    def __init__(
        self,
        setup: Setup,
        work: Workload,
        layout: Layout,
        scores: Literal["decode", "forward"] | None,
        made: dict[str, Any],
    ):
        """Compile the programs for the shapes of models that do not exist yet, as training does.

        `made` holds programs of the same setup, as in `make_programs`.
        """
        self.setup, self.work, self.layout = setup, work, layout
        self.score_choice, self.update_choice = choices(setup, layout, work)
        self.method = _method(setup, scores, self.score_choice)
        self.decoded = self.method.score.student == "decode"
        optim = self.update_choice.applied(setup.config.optim)
        self.programs = make_programs(setup, self.method, optim, made)
        self.sampler = make_generate(setup, setup.student)
        self.scorer = jax.jit(self._score_own, out_shardings=by_rows(setup.mesh))
        self.prompts = shard_rows(setup.mesh, prompts_of(work))
        sampling = setup.sampling("rollout", temperature=1.0, entropy=self.decoded)
        self.sampling = dataclasses.replace(
            sampling.rows(len(work.length)),
            max_tokens=jnp.asarray(work.response),
            stop=jnp.full((len(work.length), sampling.stop.shape[0]), -1, jnp.int32),
        )
        self.temperature = jnp.float32(1)
        self.compiled: dict[str, Any] = {}
        self.seconds: dict[str, tuple[list[float], list[float]]] = {
            name: ([], []) for name in STAGES
        }
        self.kept: list[np.ndarray] = []
        """Rows that the update learnt from, by round."""
        place = Placement(setup.mesh)
        shapes = [abstract_params(each.model, place) for each in (setup.student, *setup.teachers)]
        self.state = abstract_state(self.programs.init, shapes[0])
        self._init = self.programs.init.lower(shapes[0]).compile()
        self.teachers = shapes[1:]
        for stage in self._stages().values():
            stage()

    def begin(self, teachers: list[Params]) -> None:
        """Begin with random parameters of the student, and those of the teachers."""
        self.state, self.teachers = self._init(random_params(self.setup, 0)), teachers

    def _stages(self) -> dict[str, Callable[[], Any]]:
        return {
            "rollout": self._rollout,
            "score_student": self._score_student,
            "score_teacher": self._score_teacher,
            "update": self._update,
        }

    def round(self, *, measured: bool = True) -> None:
        """Run one step; record its times, and the rows that the filter kept."""
        for name, stage in self._stages().items():
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(stage())
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if measured:
                self.seconds[name][0].append(cpu)
                self.seconds[name][1].append(wall)
        drawn = np.asarray(jnp.sum(self.drawn.mask, axis=1))
        if (drawn != self.work.response).any():
            raise RuntimeError(f"responses have {drawn} tokens, {self.work.response} were asked")
        if measured:
            self.kept.append(np.asarray((self.batch.coefficient != 0).any(axis=1)))
        del self.drawn, self.batch

    def scratch(self, stage: str) -> int:
        """Return the bytes that a stage's program needs besides its inputs and outputs."""
        if stage not in self.compiled:
            return 0
        return self.compiled[stage].memory_analysis().temp_size_in_bytes

    def _run(self, stage: str, program: Any, *inputs: Any) -> Any:
        """Run the program of a stage; the first time, compile it and return the shapes."""
        if stage in self.compiled:
            return self.compiled[stage](*inputs)
        lowered = program.lower(*inputs)
        self.compiled[stage] = compiled = lowered.compile()

        def shape(leaf: Any, place: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

        return jax.tree.map(shape, lowered.out_info, compiled.output_shardings)

    def _replaced(self, of: Any, **changes: Any) -> Any:
        """Return a rollout, batch or state with other parts; of shapes, their shapes."""

        def replaced(of: Any, changes: dict[str, Any]) -> Any:
            return dataclasses.replace(of, **changes)

        if not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(of)):
            return replaced(of, changes)
        mesh = self.setup.mesh
        place = Placement(mesh) if of is self.state else by_rows(mesh)
        return placed(jax.eval_shape(replaced, of, changes), place)

    def _score_own(self, params: Params, rollout: Any) -> Any:
        student = Resident(self.setup.student.model, params)
        return self.method.score.score_own(student, rollout, self.temperature, self.setup.mesh)

    def _rollout(self) -> Any:
        own, state = student_side(self.prompts), self.state
        inputs = (state.params, own, self.sampling, state.updates)
        drawn = self._run("rollout", self.sampler, *inputs)
        policy = drawn.policy if self.decoded else None
        self.drawn = self._replaced(drawn, prompts=self.prompts, policy=policy)
        return self.drawn

    def _score_student(self) -> Any:
        if self.decoded:
            return None
        own = self._run("score_student", self.scorer, self.state.params, self.drawn)
        self.drawn = self._replaced(self.drawn, early=EarlyScores(own))
        return own

    def _score_teacher(self) -> Any:
        state, teachers = self.state, self.teachers
        inputs = (state.params, teachers, self.drawn, self.temperature, state.updates, state.stages)
        program = self.programs.score.jitted
        self.batch, self.keep, self.stages, _ = self._run("score_teacher", program, *inputs, None)
        return self.batch, self.keep

    def _update(self) -> Any:
        state = self._replaced(self.state, stages=self.stages)
        batch = self._replaced(self.batch, rollout=self._replaced(self.batch.rollout, early=None))
        inputs = (state, batch, self.temperature, None, None)
        self.state, metrics = self._run("update", self.programs.update, *inputs)
        return metrics, self._run("describe", self.programs.describe, self.batch, self.keep)


def _method(
    setup: Setup, scores: Literal["decode", "forward"] | None, choice: Choice
) -> MethodConfig:
    """Return the method with the student's scores from `scores`, None as training chooses."""
    method = with_score(setup.config.method, choice)
    method = dataclasses.replace(method, score=dataclasses.replace(method.score, student=scores))
    return with_student_scores(setup.config, method, setup.student.model.config.dtype)[0]
