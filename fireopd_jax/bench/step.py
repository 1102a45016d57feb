"""CPU seconds, FLOPs and memory of one training step of FiRe-OPD, stage by stage.

    random student and teacher, requests -> [step of each layout, bare products, TRL] x rounds
    -> medians -> table, JSON

Responses have the requested lengths. CPU seconds are those of all threads of the process, without
compilation; ratios are of CPU seconds on a CPU, of wall-clock seconds elsewhere. The floor of a
stage is the time of its matrix products alone, over real tokens (`bench.floor`).
"""

import dataclasses
import json
import random
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, cast

import jax
import numpy as np

from fireopd_jax.bench.floor import (
    Floor,
    decode_floor,
    known_peak,
    measured_peak,
    pass_floor,
)
from fireopd_jax.bench.head import MIB, write_whole
from fireopd_jax.bench.step_report import (
    layout_row,
    packed_to_padded,
    print_tables,
    protocol,
    ratio_to_trl,
    seconds_of,
    us_per_token,
    usable_cores,
)
from fireopd_jax.bench.step_stages import (
    LAYOUTS,
    METHOD,
    Layout,
    TrainingStep,
    make_setup,
    random_params,
)
from fireopd_jax.bench.trl import check_trl, trl_contestants
from fireopd_jax.bench.workload import (
    QWEN3_0_6B,
    QWEN3_1_7B,
    SMALL,
    VOCABULARY,
    Workload,
    equal,
    ragged,
    to_fill,
)
from fireopd_jax.config import UserError, nearest
from fireopd_jax.models.architecture import DecoderConfig
from fireopd_jax.models.language_model import Params
from fireopd_jax.models.work import Work
from fireopd_jax.rollout.state import Shape
from fireopd_jax.runtime.compilation import release_after_compilations
from fireopd_jax.runtime.memory import resident_bytes
from fireopd_jax.session.setup import Setup

Row = dict[str, Any]
_STUDENT = dataclasses.replace(SMALL, tie_word_embeddings=False)
_TEACHER = dataclasses.replace(
    _STUDENT,
    hidden_size=512,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=8,
    intermediate_size=1536,
)
PAIRS: dict[str, tuple[DecoderConfig, DecoderConfig]] = {
    "small": (_STUDENT, _TEACHER),
    # Trained parameters are float32.
    "qwen3-0.6b": (dataclasses.replace(QWEN3_0_6B, param_dtype="float32"), QWEN3_1_7B),
    "qwen3-1.7b": (dataclasses.replace(QWEN3_1_7B, param_dtype="float32"), QWEN3_1_7B),
}
"""Student and teacher by the name of the model."""


FEWEST = 5
"""Rows of which the filter of FiRe-OPD, which drops a fifth, drops one."""


def heavy_tailed(rows: int) -> Workload:
    """Return prompts of 8 to 64 tokens with log-normal response lengths, of at most 256."""
    return dataclasses.replace(ragged(rows), name="heavy-tailed")


def nano(rows: int) -> Workload:
    """Return prompts and responses of 100 to 1,024 tokens, as the benchmark of nano-vllm has."""
    rng = np.random.default_rng(0)
    length, response = (rng.integers(100, 1025, rows).astype(np.int32) for _ in range(2))
    prompt = rng.integers(0, VOCABULARY, (rows, int(length.max()))).astype(np.int32)
    return Workload("nano", prompt, length, response)


WORKLOADS: dict[str, tuple[Callable[[int], Workload], int]] = {
    "equal": (equal, 8),
    "heavy-tailed": (heavy_tailed, 64),
    "nano": (nano, 256),
}
"""By name: requests of so many rows, and the rows by default."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    model: str = "small"
    lengths: str = "equal"
    rows: int | None = None
    fill: float | None = None
    layout: str = "packed"
    student_scores: str | None = None
    compare: str | None = None

    def check(self) -> None:
        """Raise UserError for an option that is unknown or cannot run here."""
        for option, given, known in (
            ("--model", self.model, list(PAIRS)),
            ("--lengths", self.lengths, list(WORKLOADS)),
            ("--layout", self.layout, [*LAYOUTS, "both"]),
            ("--student-scores", self.student_scores, ["decode", "forward"]),
            ("--compare", self.compare, ["trl"]),
        ):
            if given is not None and given not in known:
                expected = f"expected {', '.join(known)}{nearest(given, known)}"
                raise UserError(f"{option} {given}: {expected}")
        if self.rows is not None and self.rows < FEWEST:
            raise UserError(f"--rows: expected at least {FEWEST}, got {self.rows}")
        if self.fill is not None and not 0 < self.fill <= 1:
            raise UserError(f"--fill: expected a share above 0 and up to 1, got {self.fill}")
        if self.compare is not None:
            check_trl()

    def work(self) -> Workload:
        """Return the requests."""
        make, rows = WORKLOADS[self.lengths]
        work = make(rows if self.rows is None else self.rows)
        return work if self.fill is None else to_fill(work, self.fill)

    def __str__(self) -> str:
        """Return the options that were given, as on the command line."""
        return " ".join(
            f"--{name.replace('_', '-')} {value}"
            for name, value in dataclasses.asdict(self).items()
            if value is not None
        )


def bench_step(
    options: Options, rounds: int, file: Path | None = None, *, result_line: bool = False
) -> Row:
    """Measure a step, print a table, write JSON and return its contents.

    With `result_line`, the last line is that which programs read that compare several trainers.
    """
    options.check()
    if rounds < 1:
        raise UserError(f"--rounds: expected at least 1, got {rounds}")
    release_after_compilations()  # as in training
    student, teacher = PAIRS[options.model]
    work = options.work()
    setup = make_setup(student, teacher, work)
    steps, peaks = prepared(options, setup, work)
    params = [random_params(setup, 0), *steps[0].teachers]
    floors = make_floors(setup, params, work)
    square, square_flops = measured_peak(student.dtype)
    cases = [square, *(each.case for parts in floors.values() for each in parts)]
    for case in cases:
        jax.block_until_ready(case.run())
    with ExitStack() as stack:
        others = trl_contestants(stack, setup, params, work, rounds) if options.compare else []
        contestants = [each.round for each in (*steps, *cases, *others)]
        order = random.Random(0)
        for _ in range(rounds):
            for run in order.sample(contestants, len(contestants)):
                run()
    clock = "cpu" if jax.default_backend() == "cpu" else "wall"
    published = known_peak(student.dtype)
    speed = published or square_flops / seconds_of(square, clock)
    rows = [layout_row(each, floors, speed, clock, peaks[each.layout]) for each in steps]
    trl = [other.row() for other in others]
    result = {
        "command": f"fireopd bench step {options} --rounds {rounds}",
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "cores": usable_cores(),
        "jax": jax.__version__,
        "rounds": rounds,
        "clock": clock,
        "method": METHOD,
        "workload": describe(work),
        "flops_per_second": speed,
        "flops_per_second_is": "published" if published else "measured",
        **{key: value for key, value in rows[0].items() if key != "seconds"},
        "ratio_to_trl": ratio_to_trl(rows[0], trl, clock),
        "packed_to_padded": packed_to_padded(rows, clock),
        "us_per_token": us_per_token(rows[0], work, clock),
        "layouts": rows,
        "trl": trl,
    }
    print_tables(result)
    if file is not None:
        write_whole(file, json.dumps(result, indent=2) + "\n")
    if result_line:
        print("RESULT " + json.dumps(protocol(rows[0], work)), flush=True)
    return result


def prepared(
    options: Options, setup: Setup, work: Workload
) -> tuple[list[TrainingStep], dict[str, float]]:
    """Return the steps of the layouts, after two of each, and the peak of memory of each in MiB.

    Of a second layout the peak includes the first.
    """
    layouts = LAYOUTS if options.layout == "both" else (cast(Layout, options.layout),)
    scores = cast(Literal["decode", "forward"] | None, options.student_scores)
    steps: list[TrainingStep] = []
    teachers: list[Params] = []
    made, peaks = {}, {}
    for layout in layouts:
        steps.append(TrainingStep(setup, work, layout, scores, made))
        teachers = teachers or [random_params(setup, 1)]
        steps[-1].begin(teachers)
        for _ in range(2):  # after the second, all buffers have been made
            steps[-1].round(measured=False)
        peaks[layout] = resident_bytes("VmHWM") / MIB
    return steps, peaks


def describe(work: Workload) -> Row:
    """Return the sizes of the workload; `fill` is the share of real tokens in padded rows."""
    rows, width = work.prompt.shape
    real = int(work.length.sum()) + work.tokens
    return {
        "lengths": work.name,
        "rows": rows,
        "prompt_width": width,
        "room": work.room,
        "prompt_tokens": int(work.length.sum()),
        "response_tokens": work.tokens,
        "fill": real / (rows * (width + work.room)),
    }


def make_floors(setup: Setup, params: list[Params], work: Workload) -> dict[str, list[Floor]]:
    """Return the bare products of each stage; those of the update are of all rows."""
    student, teacher = setup.student.model, setup.teachers[0].model
    whole, prefill = Work.of(work.length, work.response), Work.prefill(work.length)
    rows, width = work.prompt.shape
    slots = Shape.of(rows, width, work.room, setup.config.rollout.slots).slots
    rest = whole.without(prefill)
    decode = decode_floor(student, params[0], rest, work.response, slots)
    return {
        "rollout": [
            pass_floor(student, params[0], prefill, backward=False),
            *([] if decode is None else [decode]),
        ],
        "score_student": [pass_floor(student, params[0], whole, backward=False)],
        "score_teacher": [pass_floor(teacher, params[1], whole, backward=False)],
        "update": [pass_floor(student, params[0], whole, backward=True)],
    }
