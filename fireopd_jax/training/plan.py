"""What a run compiles, before it computes anything: its programs, and how batches pass them.

Setup -> micro-batches, remat (models/fit.json) -> programs -> compiled -> compared with the device

A resumed run passes its batches as it began to, whatever memory is free then.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fireopd_jax.config import UserError
from fireopd_jax.data.pipeline import Encoded
from fireopd_jax.method.config import MethodConfig
from fireopd_jax.models.decoder import parameter_count
from fireopd_jax.models.language_model import LanguageModel
from fireopd_jax.models.placement import Placement, tensor_devices
from fireopd_jax.recipe.optim import SftConfig
from fireopd_jax.recipe.student_scores import with_student_scores
from fireopd_jax.runtime import files
from fireopd_jax.runtime.files import write_atomically
from fireopd_jax.runtime.memory import Memory, device_memory
from fireopd_jax.runtime.processes import by_leader
from fireopd_jax.runtime.target import platform
from fireopd_jax.session.contexts import encoded_for
from fireopd_jax.session.parameters import abstract_params, random_init, random_key
from fireopd_jax.session.session import Generate, Session
from fireopd_jax.session.setup import Setup
from fireopd_jax.session.specs import ModelSpec
from fireopd_jax.training.abstract import (
    MethodShapes,
    abstract_prompts,
    abstract_state,
    nbytes,
    sampler_inputs,
    staying,
)
from fireopd_jax.training.ahead import Ahead, Need, gib, too_large
from fireopd_jax.training.fitting import (
    Choice,
    Pass,
    first_that_fits,
    score_choices,
    update_choices,
)
from fireopd_jax.training.prepare import is_kept
from fireopd_jax.training.programs import Programs, make_programs
from fireopd_jax.training.sft import SftPrograms, sft_programs

RECORD = "models/fit.json"
Build = Callable[[Choice], tuple[Any, tuple[Any, ...]] | None]
"""Returns the program of a choice and the shapes of its inputs; None where these are not known."""
USED = 0.9
"""Share of the free memory that a choice may fill: allocators fragment it."""
SURE = 0.5
"""Share of the room below which an estimate is trusted until the program has been compiled."""
TRIES = 3
SHOWN = ("sft", "rollout", "score", "update")
"""Programs whose memory is logged."""


@dataclasses.dataclass(frozen=True)
class MethodPlan:
    """One method of a run, or a control, as it is trained."""

    method: MethodConfig
    """With the micro-batches of its scores, and the source of the student's."""
    programs: Programs
    encoded: Encoded


class Plan:
    """The programs of a run, compiled in the background, and the choices that they depend on."""

    def __init__(
        self,
        setup: Setup,
        methods: Mapping[str, MethodConfig],
        *,
        sampler: Callable[..., Generate],
        log: Callable[[str], object],
        memory: Memory | None = None,
        kept: Callable[[str], bool] = lambda name: False,
        choices: Mapping[str, Choice] | None = None,
        ahead: Ahead | None = None,
    ):
        """Begin to compile what `methods`, by name, and the models before them need.

        `sampler` returns that of a model, for responses of so many tokens. `memory` is that of a
        device, by default as found; `kept` says which models need not be made any more; `choices`
        are those that stay as they are.
        """
        self.setup, self._sampler, self._log, self._kept = setup, sampler, log, kept
        self.memory = memory or by_leader(lambda: device_memory(list(setup.mesh.devices.flat)))
        self.ahead = ahead or Ahead()
        self.choices = dict(choices or {})
        self.sft: dict[str, SftPrograms] = {}
        self.methods: dict[str, MethodPlan] = {}
        self.updates: dict[str, tuple[Pass, Build]] = {}
        """Of each method: the pass of its update, and its program for a choice."""
        self._made: dict[str, Any] = {}
        self._notable: list[tuple[str, str, Choice, float | int]] = []
        """Choices to log: name, key, choice, estimated bytes."""
        self._resident: dict[str, int] = {}
        """Bytes of parameters and states that are in memory while a program runs, by its name."""
        try:
            self._add_models()
            for name, method in methods.items():
                self._add_method(name, method)
            self._add_samplers()
        except BaseException:
            self.close()
            raise

    @classmethod
    def of_run(cls, session: Session, methods: Mapping[str, MethodConfig]) -> "Plan":
        """Return the plan of a run, with the choices that it was begun with, and record them."""
        file = session.folder.path / RECORD
        plan = cls(
            session.setup,
            methods,
            sampler=session.sampler,
            log=session.log,
            kept=lambda name: is_kept(session, name),
            choices=by_leader(lambda: recorded(file)),
        )
        choices = {name: dataclasses.asdict(choice) for name, choice in plan.choices.items()}
        write_atomically(file, json.dumps(choices, indent=2) + "\n")
        return plan

    def check(self) -> dict[str, int]:
        """Wait for the programs; log their memory, or raise UserError for one that does not fit.

        Returns the bytes of a device that each stage needs, and those that it has: `device`.
        """
        for notable in self._notable:
            self._say(*notable)
        peaks: dict[str, int] = {}
        for name, peak in self.peaks().items():
            kind = name.partition(" ")[0]
            if peak > self.memory.total:
                raise too_large(name, peak, self.memory.total)
            peaks[kind] = max(peaks.get(kind, 0), peak)
        shown = [f"{kind} {gib(peaks[kind])}" for kind in SHOWN if kind in peaks]
        if shown:
            total = gib(self.memory.free)
            self._log(f"memory: {', '.join(shown)} GiB of {total} GiB on each device")
        return {kind: peaks[kind] for kind in SHOWN if kind in peaks} | {"device": self.memory.free}

    def peaks(self) -> dict[str, int]:
        """Wait for the programs; return the bytes of a device that are in use while each runs."""
        return {name: self.resident(name, need) for name, need in self.ahead.needs().items()}

    def ready(self, spec: ModelSpec) -> SftPrograms | None:
        """Wait for the programs that make a model; return those of its supervised training."""
        sft = spec.config.sft
        asking = ("rollout",) if sft is not None and sft.source == "teacher" else ()
        for kind, model in [each.split(" of ", 1) for each in self.ahead.names()]:
            if model == spec.name or kind in asking:
                self.ahead.need(f"{kind} of {model}")
        return self.sft.get(spec.slug)

    def close(self) -> None:
        """Compile nothing more."""
        self.ahead.close()

    def resident(self, name: str, need: Need) -> int:
        """Return the bytes in use while program `name`, or another with its inputs, runs."""
        return max(self._resident.get(name, 0), need.arguments) + need.beyond

    def _fit(
        self,
        name: str,
        key: str,
        of: Pass,
        choices: Sequence[Choice],
        estimate: Callable[[Choice], float | int],
        build: Build,
    ) -> Choice:
        """Return the choice for program `name`, whose keys begin with `key`; begin to compile it.

        The first guess comes from the estimates. Unless it is far below the memory it is compared
        with the compiled program, and the estimates are scaled by what that needs.
        """
        room, scale = self.memory.free * USED - self._resident[name], 1.0
        kept = self.choices.get(key)
        for _ in range(TRIES):
            guess = first_that_fits(choices, lambda each, s=scale: estimate(each) * s, room)
            choice, built = kept or guess, build(kept or guess)
            if built is not None:
                self.ahead.add(name, built[0], *built[1])
            if kept or built is None or estimate(choice) <= SURE * room:
                break
            need = self.ahead.need(name)
            assert need is not None
            if need.beyond <= room:
                break
            scale = need.beyond / estimate(choice)
        if choice != choices[0]:
            self._notable.append((name, key, choice, estimate(choice)))
        self.choices[key] = choice
        self._note_longer(key, of, choice)
        return choice

    def _say(self, name: str, key: str, choice: Choice, estimate: float | int) -> None:
        """Log a choice that is not the fastest one; waits for its program."""
        need = self.ahead.need(name)
        size = self._resident[name] + estimate if need is None else self.resident(name, need)
        remat = f", remat={choice.remat}" if choice.remat != "none" else ""
        self._log(
            f"{key}.{choice}{remat}: the "
            f"{name.partition(' of ')[0]} needs {gib(size)} of {gib(self.memory.free)} GiB"
        )

    def _note_longer(self, key: str, of: Pass, choice: Choice) -> None:
        """Log that a pass is longer than it was set to be, where one row is."""
        tokens = choice.micro_batch_tokens
        if tokens is not None and tokens < of.tokens:
            self._log(
                f"{key}.micro_batch_tokens={tokens}: below the longest row, {of.tokens} tokens; a "
                f"pass has {of.per_device(choice)}"
            )

    def _pass(self, model: LanguageModel, rows: int, tokens: int) -> Pass:
        mesh = self.setup.mesh
        return Pass(model.config, rows, tokens, mesh.size, platform(), tensor_devices(mesh))

    def _add_models(self) -> None:
        """Add random initialisation and supervised training of the models that need them."""
        setup, place, held = self.setup, Placement(self.setup.mesh), 0
        for spec in (*setup.teachers, setup.student):
            made = self._kept(spec.slug if spec.name != "student" else "student_start")
            if not made and spec.config.path is None:
                exact = dataclasses.replace(spec.model, quantize=None)
                model = spec.model if spec.config.sft is None else exact
                program = random_init(model, place)
                key = random_key(spec, setup.config.run.seed)
                self.ahead.add(f"init of {spec.name}", program, key)
            if not made and spec.config.sft is not None:
                self._add_sft(spec, spec.config.sft, held)
            held += nbytes(staying([spec], place))

    def _add_sft(self, spec: ModelSpec, sft: SftConfig, held: int) -> None:
        """Add the supervised training of a model; `held` are the bytes of the models before it."""
        setup, encoded, name = self.setup, self.setup.encoded, f"sft of {spec.name}"
        model, place = dataclasses.replace(spec.model, quantize=None), Placement(setup.mesh)
        params = abstract_params(model, place)
        count = parameter_count(params) // place.parts
        width = max(encoded.max_prompt_tokens, encoded.max_teacher_prompt_tokens)
        passed = self._pass(model, sft.batch_size, width + encoded.max_reference_tokens)
        # Parameters and two moments, in float32 at most.
        self._resident[name] = held + 3 * 4 * count

        def build(choice: Choice):
            programs = sft_programs(
                model, dataclasses.replace(sft, optim=choice.applied(sft.optim)), setup.mesh
            )
            self.sft[spec.slug] = programs
            self.ahead.add(f"begin of {spec.name}", programs.begin, params)
            if sft.contexts != ("prompt",):  # prompts of widths that are not known yet
                return None
            prompts = abstract_prompts(setup.mesh, encoded, sft.batch_size, references=True)
            return programs.update, (abstract_state(programs.begin, params), prompts)

        role, _, own = spec.name.partition(" ")
        self._fit(
            name,
            f"teachers.{own}.sft.optim" if own else f"{role}.sft.optim",
            passed,
            update_choices(passed, sft.optim),
            lambda choice: passed.update(choice, count),
            build,
        )

    def _add_method(self, name: str, method: MethodConfig) -> None:
        """Add the programs of a method; the choices of the first are those of its controls."""
        if self._kept(name):
            return
        setup, config = self.setup, self.setup.config
        dtype = setup.student.model.config.dtype
        method, reason = with_student_scores(config, method, dtype)
        why = f" ({reason})" if reason else ""
        self._log(f"{name}: method.score.student={method.score.student}{why}")
        sampler = self._sampler(setup.student)
        shapes = MethodShapes.of(setup, method, encoded_for(setup, method), sampler)
        rows, optim, width = config.rollout.batch_size, config.optim, shapes.width
        scored = [self._pass(model, rows, width) for model in shapes.models]
        trained = self._pass(setup.student.model, rows, width)

        def programs(score: Choice, update: Choice) -> Programs:
            return make_programs(
                setup, with_score(method, score), update.applied(optim), self._made
            )

        def build_score(choice: Choice):
            found = programs(choice, Choice())
            return (found.score.jitted, shapes.score(found)) if shapes.known else None

        first = programs(Choice(), Choice())
        resident = shapes.resident(first)
        count = parameter_count(shapes.state(first).params) // Placement(setup.mesh).parts
        judge = method.loss.judge(shapes.offloaded, None)
        self._resident |= {
            f"score of {name}": resident + nbytes(shapes.offloaded),
            f"update of {name}": resident + nbytes(judge),
        }
        score = self._fit(
            f"score of {name}",
            "method.score",
            scored[0],
            score_choices(
                scored[0], method.score.micro_batch_size, method.score.micro_batch_tokens
            ),
            lambda choice: max(each.score(choice) for each in scored),
            build_score,
        )

        def build_update(choice: Choice):
            found = programs(score, choice)
            return (found.update, shapes.update(found)) if shapes.known else None

        self.updates[name] = trained, build_update
        update = self._fit(
            f"update of {name}",
            "optim",
            trained,
            update_choices(trained, optim),
            lambda choice: trained.update(choice, count),
            build_update,
        )
        plan = MethodPlan(with_score(method, score), programs(score, update), shapes.encoded)
        self._add_others(name, plan, shapes, resident)
        self.methods[name] = plan

    def _add_others(self, name: str, plan: MethodPlan, shapes: MethodShapes, resident: int) -> None:
        """Add a method's programs without choices; `resident` bytes are in memory in a step."""
        if plan.programs.draw is not None:
            own = f"rollout of {name} in flight"
            self._resident[own] = resident
            self.ahead.add(own, plan.programs.draw, *shapes.draw(plan.programs))
        self.ahead.add(f"begin of {name}", plan.programs.init, shapes.start)
        if shapes.known:
            self.ahead.add(f"describe of {name}", *shapes.describe(plan.programs))
            if plan.programs.top_tokens is not None:
                self._resident[f"top tokens of {name}"] = resident + nbytes(shapes.offloaded)
                self.ahead.add(f"top tokens of {name}", *shapes.top_tokens(plan.programs))

    def _add_samplers(self) -> None:
        """Add the samplers of the student, and of the teachers where they are graded."""
        setup = self.setup
        config, place = setup.config, Placement(setup.mesh)
        models = [setup.student]
        copied = config.student.sft is not None and config.student.sft.source == "teacher"
        if config.eval.problems or copied:
            models += setup.teachers
        params = {spec.name: abstract_params(spec.model, place) for spec in models}
        held = nbytes(staying(setup.teachers, place))
        states = [size for name, size in self._resident.items() if name.startswith("update")]
        for spec in models:
            name = f"rollout of {spec.name}"
            fetched = nbytes(params[spec.name]) if spec.config.offloaded else 0
            begun = held + nbytes(params[setup.student.name])
            self._resident[name] = fetched + max([begun, *states])
            own = spec is setup.student and config.rollout.overprovision > 0
            batches = [] if own else [(config.rollout.batch_size, setup.encoded, None)]
            if config.eval.problems:
                batches.append((config.eval_batch_size, setup.encoded, None))
            if spec is setup.student:
                batches += [
                    (config.eval_batch_size, each.encoded, each.settings.max_tokens)
                    for each in setup.sets
                ]
            for index, (rows, encoded, max_tokens) in enumerate(batches):
                program = self._sampler(spec, max_tokens)
                inputs = sampler_inputs(setup, spec, params[spec.name], encoded, rows, max_tokens)
                self._resident[f"{name} {index}"] = self._resident[name]
                self.ahead.add(f"{name} {index}", program, *inputs)


def with_score(method: MethodConfig, choice: Choice) -> MethodConfig:
    """Return the method with the micro-batches of a choice in its scores."""
    score = dataclasses.replace(
        method.score,
        micro_batch_size=choice.micro_batch_size,
        micro_batch_tokens=choice.micro_batch_tokens,
    )
    return dataclasses.replace(method, score=score)


def recorded(file: Path) -> dict[str, Choice]:
    """Return the choices that a run was begun with, by section; {} without the file."""
    found = files.recorded(file) if file.is_file() else {}
    try:
        return {name: Choice(**choice) for name, choice in found.items()}
    except TypeError:
        raise UserError(f"{file}: damaged; delete it, a resumed run chooses anew") from None
