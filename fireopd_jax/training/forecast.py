"""What a run would take on given devices, from its programs, compiled for them.

    Config, Topology -> Setup without parameters -> Plan -> Forecast (bytes, collectives, seconds)

Nothing is allocated but the programs. Seconds are an estimate, of which `ASSUMED` says what it
rests on.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from fireopd_jax.models.decoder import parameter_count
from fireopd_jax.models.language_model import LanguageModel
from fireopd_jax.models.placement import Placement
from fireopd_jax.models.work import Work
from fireopd_jax.recipe.models import ModelConfig
from fireopd_jax.recipe.schema import Config, methods
from fireopd_jax.rollout.meshes import replica_count
from fireopd_jax.rollout.state import Shape
from fireopd_jax.runtime.compilation import release_after_compilations
from fireopd_jax.runtime.memory import Memory, release_freed, resident_bytes
from fireopd_jax.runtime.target import made_for
from fireopd_jax.runtime.topologies import Chip, Topology
from fireopd_jax.session.outline import outlined
from fireopd_jax.session.parameters import abstract_params
from fireopd_jax.session.session import sampler_of
from fireopd_jax.session.setup import Setup, set_up
from fireopd_jax.session.specs import ModelSpec, slug
from fireopd_jax.training.abstract import nbytes
from fireopd_jax.training.ahead import Ahead, Need
from fireopd_jax.training.collectives import Traffic, traffic
from fireopd_jax.training.fitting import Choice
from fireopd_jax.training.plan import Plan

PRODUCTS, READS = 0.4, 0.6
"""Shares of a chip's peak that matrix products, and reads of memory, are assumed to reach."""
ASSUMED = (
    "every prompt and response is as long as it may be",
    f"matrix products reach {PRODUCTS:.0%} of the peak, reads of memory {READS:.0%}",
    "collectives run beside the computation",
)
STUDENT = "student"


@dataclasses.dataclass(frozen=True)
class Looked(Need):
    """The memory of a compiled program, and what it sends between devices."""

    collectives: Mapping[str, Traffic] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, compiled: Any) -> "Looked":
        """Return what is to be known of a compiled program."""
        need = Need.of(compiled)
        return cls(need.arguments, need.beyond, traffic(compiled.as_text()))


@dataclasses.dataclass(frozen=True)
class Model:
    """Bytes of a model's parameters."""

    parameters: int
    bytes: int
    bytes_per_device: int


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program: bytes of one device, and collectives."""

    arguments: int
    beyond: int
    """Outputs and temporary arrays."""
    peak: int
    """With the parameters and states that stay in memory meanwhile."""
    collectives: Mapping[str, Traffic]


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a run would take."""

    topology: str
    devices: int
    memory: int
    """Bytes of one device."""
    mesh: Mapping[str, int]
    models: Mapping[str, Model]
    programs: Mapping[str, Program]
    choices: Mapping[str, Choice]
    """How batches pass, by key."""
    largest_tokens: int | None
    """Tokens of the largest `optim.micro_batch_tokens` that fits; None for padded rows."""
    seconds: Mapping[str, float] | None
    """Of a step by stage; None where the speed of the devices is not known."""
    process_bytes: int | None
    """On a CPU, what the whole process takes at its peak; None elsewhere."""
    notes: tuple[str, ...]
    compiled_s: float

    @property
    def largest(self) -> str:
        """The program that needs the most memory."""
        return max(self.programs, key=lambda name: self.programs[name].peak)

    @property
    def fits(self) -> bool:
        """Whether every program fits the memory of a device."""
        return all(each.peak <= self.memory for each in self.programs.values())

    @property
    def verdict(self) -> str:
        """In words."""
        return "fits" if self.fits else "does not fit"


def forecast(
    config: Config, topology: Topology, log: Callable[[str], object] = lambda line: None
) -> Forecast:
    """Return what a run of the configuration would take on the devices of a topology.

    Raises UserError for what a run would refuse: a mesh, a batch or a model that does not fit.
    """
    begun = time.monotonic()
    release_after_compilations()  # as a run does
    with made_for(topology.devices):
        given, (config, notes) = config, outlined(config)
        setup = set_up(config, devices=topology.devices)
        devices, on_cpu = setup.mesh.size, topology.devices[0].platform == "cpu"
        every = dict(zip((STUDENT, *config.run.compare), methods(setup.config), strict=True))
        with jax.sharding.use_abstract_mesh(setup.mesh.abstract_mesh):
            plan = Plan(
                setup,
                every,
                sampler=functools.partial(sampler_of, setup, {}),
                log=log,
                memory=Memory(topology.bytes, topology.bytes),
                kept=_loaded(given).__contains__,
                # On a CPU as many at a time as a run compiles, whose memory it stands for.
                ahead=Ahead(threads=None if on_cpu else 1, look=Looked.of),
            )
            try:
                peaks = plan.peaks()
                largest = largest_update(plan, log)
            finally:
                plan.close()
            needs = plan.ahead.needs()
        return Forecast(
            topology=topology.name,
            devices=devices,
            memory=topology.bytes,
            mesh=dict(setup.mesh.shape),
            models={spec.name: _model(spec, setup) for spec in (setup.student, *setup.teachers)},
            programs={name: _program(needs[name], peaks[name]) for name in peaks},
            choices=plan.choices,
            largest_tokens=largest,
            seconds=topology.chip and step_seconds(setup, topology.chip, plan.choices["optim"]),
            process_bytes=process_bytes(devices * max(peaks.values())) if on_cpu else None,
            notes=tuple(notes),
            compiled_s=time.monotonic() - begun,
        )


def process_bytes(arrays: int) -> int:
    """Return the peak of a process that runs what this one has compiled, with so many bytes.

    This one has loaded the same libraries and compiled the same programs, and has no arrays. A run
    compiles before it has most of them.
    """
    release_freed()
    return max(resident_bytes("VmHWM"), resident_bytes("VmRSS") + arrays)


def largest_update(plan: Plan, log: Callable[[str], object]) -> int | None:
    """Return the tokens of the largest pass of the update that fits, None for padded rows.

    A second size gives the bytes of a token; the size that follows is compiled, too.
    """
    chosen, (of, build) = plan.choices["optim"], plan.updates[STUDENT]
    if chosen.micro_batch_tokens is None or build(chosen) is None:
        return None

    def shaped(tokens: int) -> Choice:
        return dataclasses.replace(chosen, micro_batch_tokens=of.shape(tokens).tokens)

    def peak(choice: Choice) -> int:
        built = build(choice)
        assert built is not None
        name = f"update of {STUDENT} with {choice.micro_batch_tokens} tokens"
        plan.ahead.add(name, built[0], *built[1])
        need = plan.ahead.need(name)
        assert need is not None
        log(f"{name}: compiled")
        return plan.resident(f"update of {STUDENT}", need)

    room = plan.memory.total
    first, whole = shaped(chosen.micro_batch_tokens), -(-of.rows // of.devices) * of.tokens
    if (low := peak(first)) > room or of.per_device(first) >= whole:
        return of.per_device(first) if low <= room else 0
    tokens, more = of.per_device(first), shaped(2 * of.per_device(first))
    if of.per_device(more) <= tokens:
        return tokens
    high, twice = peak(more), of.per_device(more)
    a_token = max((high - low) / (twice - tokens), 1e-9)
    best = twice if high <= room else tokens
    guess = shaped(min(int(tokens + (room - low) / a_token), whole))
    while of.per_device(guess) > best:
        if peak(guess) <= room:
            return of.per_device(guess)
        guess = shaped(int(of.per_device(guess) * 0.9))
    return best


def step_seconds(setup: Setup, chip: Chip, update: Choice) -> dict[str, float]:
    """Return the seconds of a step's stages, under the assumptions `ASSUMED`.

    `update` is how a batch passes through the update: whether it recomputes activations.
    """
    config, devices = setup.config, setup.mesh.size
    rows, room = config.rollout.batch_size, config.rollout.max_tokens
    prompt = np.full(rows, config.data.max_prompt_tokens)
    work, student = Work.of(prompt, np.full(rows, room)), setup.student.model
    each = devices * chip.flops * PRODUCTS
    forward = work.flops(student)
    scored = [spec.model for spec in setup.teachers]
    if config.method.score.student != "decode":
        scored.append(student)
    recomputed = 1 if update.remat == "full" else 0  # `dots` computes no product again
    return {
        "rollout": Work.prefill(prompt).flops(student) / each + _decode_s(setup, chip),
        "score": sum(work.flops(model) for model in scored) / each,
        "update": (3 + recomputed) * forward / each * config.run.updates_per_rollout,
    }


def _decode_s(setup: Setup, chip: Chip) -> float:
    """Return the seconds of reading parameters, and half-full caches, for every token."""
    config, c = setup.config, setup.student.model.config
    rows = -(-config.rollout.batch_size // replica_count(setup.mesh))
    width, room = config.data.max_prompt_tokens, config.rollout.max_tokens
    shape = Shape.of(rows, width, room, config.rollout.slots)
    size = 2 if c.dtype == "bfloat16" else 4
    weights = parameter_count(setup.student.model.shapes()) * size
    cache = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * size
    read = weights + shape.slots * cache * (width + room / 2)
    steps = room * -(-rows // shape.slots)
    return steps * read / setup.mesh.shape["tensor"] / (chip.bandwidth * READS)


def _loaded(config: Config) -> set[str]:
    """Return the folder names of the models that a run loads, which it does not make at random."""
    models: dict[str, ModelConfig] = {f"teacher {n}": t for n, t in config.teachers.items()}
    models["student_start"] = config.student
    return {slug(n) for n, model in models.items() if model.path is not None and model.sft is None}


def _model(spec: ModelSpec, setup: Setup) -> Model:
    model: LanguageModel = spec.model
    params = abstract_params(model, Placement(setup.mesh))
    whole = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(params))
    return Model(parameter_count(params), whole, nbytes(params))


def _program(need: Need, peak: int) -> Program:
    collectives = need.collectives if isinstance(need, Looked) else {}
    return Program(need.arguments, need.beyond, peak, collectives)
