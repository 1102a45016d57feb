"""The setup of a run: rows, token ids and models without parameters, from its configuration.

    Config -> Setup (rows, tokenizers, models, mesh)

Nothing here compiles, trains or writes files.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from fireopd_jax.config import UserError
from fireopd_jax.data.pipeline import Encoded, encode, split
from fireopd_jax.data.repeats import prompt_digest
from fireopd_jax.data.sources import Row, read_data, route
from fireopd_jax.evaluation.graders import check_kind, kind_of
from fireopd_jax.recipe.models import TeacherConfig
from fireopd_jax.recipe.schema import Config, MethodConfig, check, methods, used_teachers
from fireopd_jax.remote.settings import ServedConfig
from fireopd_jax.rollout.sampling import Sampling, seed_for
from fireopd_jax.session.eval_sets import OpenSet, open_sets
from fireopd_jax.session.specs import ModelSpec, make_spec, slug, stopped_at
from fireopd_jax.sharding.mesh import make_mesh
from fireopd_jax.terminal.progress import progress
from fireopd_jax.text.chat_templates import with_template
from fireopd_jax.text.checks import check_ids, check_teacher


@dataclasses.dataclass(frozen=True)
class ServedTeacher:
    """A teacher behind HTTP."""

    name: str
    served: ServedConfig
    config: TeacherConfig
    tokenizer: PreTrainedTokenizerBase
    """The student's, with the template that this teacher's prompts are written in."""

    @property
    def slug(self) -> str:
        """Name of its file of answers."""
        return slug(f"teacher {self.name}")


@dataclasses.dataclass(frozen=True)
class Setup:
    """Rows, tokenizers, models and mesh of a run."""

    config: Config
    mesh: Mesh
    student: ModelSpec
    teachers: tuple[ModelSpec, ...]
    """Those that some method of the run uses, or the student's supervised training; none where
    the teachers are served."""
    served: tuple[ServedTeacher, ...]
    """Teachers behind HTTP, by route."""
    base: ModelSpec | None
    """The base policy, if the configuration names one; else it is the student at its start."""
    rows: Sequence[Row]
    encoded: Encoded
    train: np.ndarray
    held_out: np.ndarray
    data_notes: tuple[str, ...] = ()
    """How the sources of the data were understood, for the log."""
    sets: tuple[OpenSet, ...] = ()
    """Evaluation sets."""

    def own_rows(self, indices: np.ndarray, teacher: int) -> np.ndarray:
        """Return the subset of row indices that are routed to one teacher."""
        return indices[self.encoded.route[indices] == teacher]

    def grader(self, row: int) -> str:
        """Return the kind of grader of a row of the data set; padding rows have the run's."""
        kind = self.config.data.grader
        return kind_of(self.rows[row], kind) if row >= 0 else kind

    def sampling(
        self,
        purpose: str,
        *,
        temperature: float,
        spec: ModelSpec | None = None,
        max_tokens: int | None = None,
        **filters: float | int,
    ) -> Sampling:
        """Return sampler settings with a seed for the purpose; stop tokens of `spec` or student."""
        return Sampling.of(
            (spec or self.student).stop,
            max_tokens or self.config.rollout.max_tokens,
            seed_for(self.config.run.seed, purpose),
            temperature=temperature,
            top_p=filters.get("top_p", 1.0),
            top_k=int(filters.get("top_k", 0)),
            min_p=filters.get("min_p", 0.0),
            min_tokens=int(filters.get("min_tokens", 0)),
            entropy=bool(filters.get("entropy", False)),
        )


def set_up(
    config: Config, moment: str | None = None, devices: Sequence[Any] | None = None
) -> Setup:
    """Return the setup of a run: read the data, describe the models, check them.

    `moment` is what the clocks of chat templates show, by default the time; `devices` are those of
    the mesh, by default those of this process. Raises UserError for data or models that do not fit
    the configuration.
    """
    check_kind(config.data.grader)
    mesh = make_mesh(config.mesh, devices)
    student = make_spec("student", config.student).stopped_at(moment)
    used = used_teachers(config)
    teachers = tuple(
        make_spec(f"teacher {name}", teacher).quantized(teacher.quantize).stopped_at(moment)
        for name, teacher in used.items()
        if teacher.served is None
    )
    served = tuple(
        served_teacher(name, teacher, student.tokenizer, moment)
        for name, teacher in used.items()
        if teacher.served is not None
    )
    base = None if config.base is None else make_spec("base", config.base).stopped_at(moment)
    others = teachers if base is None else (*teachers, base)
    for other in others:
        check_teacher(student.facts, other.facts, config.checks.allow, aliased(student, other))
    for spec in (student, *others):
        check_length(spec, config)
    # A teacher cannot score a token id that it lacks.
    student = student.limited(min(model.model.size for model in (student, *others)))
    data = read_data(config.data)
    rows = data.rows
    routes = np.zeros(len(rows), np.int32)
    if used:
        routes = route(rows, list(used), config.data.teacher_column)
    for index, name in enumerate(used):
        if not (routes == index).any():
            raise UserError(
                f"teachers.{name}: no row is routed to it; remove it, or see data.teacher_column"
            )
    encoded = encode(
        rows,
        tokenizer=student.tokenizer,
        template_kwargs=student.config.chat_template_kwargs,
        # Served teachers have the student's tokenizer; their servers may use another for texts.
        teacher_tokenizers=[teacher.tokenizer for teacher in (*teachers, *served)],
        teacher_template_kwargs=[t.config.chat_template_kwargs for t in (*teachers, *served)],
        teacher_models=[f"teacher {name}" for name in used],
        route=routes,
        config=config.data,
        max_reference_tokens=config.rollout.max_tokens,
        show=progress,
    )
    check_rows(student, teachers, encoded)
    for method in methods(config):
        check_support(method, student)
        special_ids(method.texts, student.tokenizer)
    kept = encoded.kept
    train, held_out = (kept[side] for side in split([rows[i] for i in kept], config.eval.problems))
    notes = [*data.notes(), *ungraded(config, [rows[i] for i in kept], len(held_out))]
    problems = len({prompt_digest(rows[i]) for i in held_out})
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, problems=problems))
    for method in methods(config):
        check_answers(method, [rows[index] for index in train])
        check_begun(method, [rows[index] for index in train])
    if (epochs := config.run.epochs) is not None:
        config, note = in_steps(config, epochs, len(train))
        notes.append(note)
    return Setup(
        config=config,
        mesh=mesh,
        student=student,
        teachers=teachers,
        served=served,
        base=base,
        rows=rows,
        encoded=encoded,
        train=train,
        held_out=held_out,
        data_notes=tuple(notes),
        sets=open_sets(config, student),
    )


def in_steps(config: Config, epochs: float, rows: int) -> tuple[Config, str]:
    """Return the configuration with `epochs` over so many training rows as `run.steps`.

    The second value is a line for the log. Raises UserError for what does not fit this length.
    """
    prompts = config.rollout.batch_size // config.rollout.group_size
    steps = max(1, math.ceil(epochs * rows / prompts - 1e-9))
    note = f"run.epochs={epochs:g}: {steps} steps of {prompts} prompts, over {rows} training rows"
    run = dataclasses.replace(config.run, steps=steps, epochs=None)
    config = dataclasses.replace(config, run=run)
    check(config)
    return config, note


def ungraded(config: Config, rows: Sequence[Row], held_out: int) -> Iterator[str]:
    """Yield a notice where nothing is held out, and so nothing graded, by default."""
    if held_out or config.eval.problems is not None:
        return
    answers = sum(row.answer is not None for row in rows)
    found = f"{answers} of {len(rows)} rows have" if answers else "no row has"
    yield (
        f"{found} an answer: nothing is held out, nor graded before and after (eval.problems; "
        "data.answer_column names the column of the answers)"
    )


def served_teacher(
    name: str, config: TeacherConfig, tokenizer: PreTrainedTokenizerBase, moment: str | None
) -> ServedTeacher:
    """Return a teacher behind HTTP, whose prompts are in its own template if it has one."""
    assert config.served is not None
    own = with_template(tokenizer, config.chat_template, f"teacher {name}")
    return ServedTeacher(name, config.served, stopped_at(config, own, moment), own)


def check_answers(method: MethodConfig, rows: Sequence[Row]) -> None:
    """Raise UserError for a training row without an answer, if the method grades responses."""
    if "rollout.correct" not in method.asked_of_rollout:
        return
    asking = "method.score.margin" if method.score.needs else "method.refine.drop_worse"
    for row in rows:
        if row.answer is None:
            raise UserError(f"{row.origin}: no answer to grade by, which {asking} needs")


def check_begun(method: MethodConfig, rows: Sequence[Row]) -> None:
    """Raise UserError for a training row that begins the response, if its text is asked about."""
    row = next((row for row in rows if row.begun), None)
    if row is not None and method.refine.asks_teacher:
        raise UserError(
            f"{row.origin}: the row begins the response, and method.refine.kind="
            f"{method.refine.kind} asks the teacher about whole responses; expected "
            "data.last_turn=reference, or rows that end with the user's turn"
        )


def aliased(student: ModelSpec, other: ModelSpec) -> bool:
    """Return whether a teacher's EOS is swapped with the student's.

    Raises UserError for `eos_alias` where both have the same EOS.
    """
    swaps = other.config.swaps_eos
    if swaps and student.stop[0] == other.stop[0]:
        raise UserError(f"{other.name}: eos_alias has no effect, its EOS is the student's")
    return swaps


def check_support(method: MethodConfig, student: ModelSpec) -> None:
    """Raise UserError where a top-K is longer than the vocabulary."""
    wanted, size = method.score.longest_list, student.model.size
    if wanted > size:
        raise UserError(f"method.score.k={wanted}: the vocabulary has {size} tokens")


def special_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the sorted token ids of all texts; raise UserError for a text without tokens."""
    ids: set[int] = set()
    for text in texts:
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not found:
            raise UserError(f"method.filter.strings: {text!r} has no tokens")
        ids.update(found)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return tuple(sorted(ids))


def check_rows(student: ModelSpec, teachers: Sequence[ModelSpec], encoded: Encoded) -> None:
    """Raise UserError for token ids outside a model's vocabulary."""
    check_ids("student: a prompt", encoded.prompts, student.model.vocab_size)
    check_ids("student: a reference", encoded.references, student.model.size)
    for index, teacher in enumerate(teachers):
        own = (encoded.teacher_prompts[row] for row in np.flatnonzero(encoded.route == index))
        check_ids(f"{teacher.name}: a prompt", own, teacher.model.vocab_size)


def check_length(spec: ModelSpec, config: Config) -> None:
    """Raise UserError where prompt and response may exceed `max_position_embeddings`."""
    room, limit = config.data.max_prompt_tokens, spec.model.config.max_position_embeddings
    longest = room + config.rollout.max_tokens
    if limit is not None and longest > limit:
        raise UserError(
            f"{spec.name}: data.max_prompt_tokens={room} and "
            f"rollout.max_tokens={config.rollout.max_tokens} make {longest} tokens, more than the "
            f"model's {limit} (max_position_embeddings)"
        )
