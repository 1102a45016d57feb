"""The initial models of a run: loaded, or initialised at random, with supervised training if any.

a frozen model with a path             -> read from there, never copied
models/NAME of this run, if complete   -> restored
else its path, or random parameters    -> supervised training, if any -> models/NAME
"""

import dataclasses
import functools
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from fireopd_jax.config import UserError
from fireopd_jax.data.pipeline import Encoded, PromptLoader, eval_prompts
from fireopd_jax.models.language_model import Params
from fireopd_jax.models.placement import Placement
from fireopd_jax.recipe.optim import Context, SftConfig
from fireopd_jax.rollout.sampling import seed_for
from fireopd_jax.runs.checkpoints import restore_params, save_model
from fireopd_jax.runtime.processes import by_leader, fetched, leads
from fireopd_jax.runtime.signals import Interrupted
from fireopd_jax.session.contexts import voice_of, with_privileged
from fireopd_jax.session.parameters import abstract_params, load_or_make, quantized
from fireopd_jax.session.session import Session, as_teacher
from fireopd_jax.session.setup import Setup
from fireopd_jax.session.specs import ModelSpec
from fireopd_jax.terminal.progress import progress
from fireopd_jax.terminal.working import LONG_S, working
from fireopd_jax.text.chat import decode
from fireopd_jax.training.guard import Guard
from fireopd_jax.training.sft import SftPrograms, supervise

Make = Callable[[Path], Params]
Ready = Callable[[ModelSpec], SftPrograms | None]
"""Waits for the programs that make a model; returns those of its supervised training, if any."""
DIGITS = "0123456789"
ERRORS = 1 / 3
"""Fraction of wrong digits after the first error of an attempt."""


def check_trainable(student: ModelSpec, teachers: Sequence[ModelSpec]) -> None:
    """Raise UserError for a model that is to be trained but is stored in eight bits."""
    for spec in (student, *teachers):
        if spec.stored is not None and (spec is student or spec.config.sft is not None):
            raise UserError(
                f"{spec.name}: {spec.config.path} holds {spec.stored} weights, which cannot be "
                "trained; expected a model saved without quantize"
                + ("" if spec is student else ", or no sft")
            )


def is_kept(session: Session, name: str) -> bool:
    """Return whether model `name` of this run has been made and saved."""
    return by_leader((session.folder.path / "models" / name / "model.json").is_file)


def kept(session: Session, spec: ModelSpec, name: str, make: Make) -> Params:
    """Return the parameters of model `name` of this run: restored, or made and saved."""
    home = session.folder.path / "models" / name
    if is_kept(session, name):
        place = Placement(session.setup.mesh)
        with working(f"reading {name} of this run", after=LONG_S):
            return restore_params(home, abstract_params(spec.model, place))
    home.mkdir(parents=True, exist_ok=True)
    params = make(home)
    if not spec.builtin_tokenizer and leads():
        spec.tokenizer.save_pretrained(home / "tokenizer")
    with working(f"saving {name}", after=LONG_S), session.stop.saving():
        save_model(home, params, spec.description())
    if leads():
        shutil.rmtree(home / "checkpoints", ignore_errors=True)  # of supervised training
    return params


def first_params(session: Session, spec: ModelSpec) -> Params:
    """Return a model's initial parameters: from its path, or random."""
    place, seed = Placement(session.setup.mesh), session.setup.config.run.seed
    if spec.config.path is None:
        with working(f"making {spec.name}", after=LONG_S):
            return load_or_make(spec, place, seed)
    with working(f"loading {spec.name} from {spec.config.path}"):
        return load_or_make(spec, place, seed)


def make_teacher(session: Session, index: int, ready: Ready) -> Params:
    """Return one teacher's parameters, after supervised training on its own rows if it has any."""
    spec = session.setup.teachers[index]
    if spec.read_each_time:
        return first_params(session, spec)
    if spec.config.path is None and spec.config.sft is None:
        session.log(f"{spec.name}: neither path nor sft is given, its parameters are random")
    rows = session.setup.own_rows(session.setup.train, index)
    return kept(session, spec, spec.slug, _maker(session, spec, rows, (), ready))


def read_base(session: Session) -> Params | None:
    """Return the parameters of the base policy, if one is named."""
    spec = session.setup.base
    return None if spec is None else first_params(session, spec)


class StudentStart:
    """The student's parameters before distillation, in memory only while they are needed.

    On disk there is a copy only where supervised training, or chance, has made them.
    """

    def __init__(self, session: Session, teachers: Sequence[Params], ready: Ready):
        self.session, self.spec = session, session.setup.student
        self._teachers: Sequence[Params] | None = teachers
        self._params: Params | None = None
        self._ready = ready
        self.held = False
        """Whether the parameters are kept for the whole run: they must not be donated."""

    @property
    def shapes(self) -> Params:
        """Shapes, dtypes and sharding; nothing is allocated."""
        return abstract_params(self.spec.model, Placement(self.session.setup.mesh))

    @property
    def finished(self) -> bool:
        """Whether the parameters have been saved in this run's folder, or need not be."""
        return self.spec.read_each_time or is_kept(self.session, "student_start")

    def read(self) -> Params:
        """Return the parameters, made or restored if they are not in memory."""
        if self._params is None and self.spec.read_each_time:
            self._params = first_params(self.session, self.spec)
        elif self._params is None:
            train, teachers = self.session.setup.train, self._teachers or ()
            make = _maker(self.session, self.spec, train, teachers, self._ready)
            self._params = kept(self.session, self.spec, "student_start", make)
        return self._params

    def hold(self) -> Params:
        """Return the parameters for use during the whole run; they will not be donated."""
        self.held = True
        return self.read()

    def take(self) -> Params:
        """Return the parameters for donation: a copy if they are held."""
        params = self.read()
        if self.held:
            place = Placement(self.session.setup.mesh)
            copied = jax.jit(
                lambda tree: jax.tree.map(jax.numpy.copy, tree), out_shardings=place.of(params)
            )
            return copied(params)
        self._params = None
        return params

    def drop(self) -> None:
        """Drop the parameters, held or not, once nothing uses them."""
        self.held, self._params = False, None

    def release(self) -> None:
        """Drop the parameters unless they are held."""
        if not self.held:
            self._params = None


def _maker(
    session: Session,
    spec: ModelSpec,
    rows: np.ndarray,
    teachers: Sequence[Params],
    ready: Ready,
) -> Make:
    place = Placement(session.setup.mesh)

    def make(home: Path) -> Params:
        programs = ready(spec)
        if spec.config.sft is None:
            return first_params(session, spec)
        exact = dataclasses.replace(spec, model=dataclasses.replace(spec.model, quantize=None))
        params = supervise(
            spec.slug,
            exact.model,
            functools.partial(first_params, session, exact),
            _loader(session, spec, spec.config.sft, rows, teachers),
            spec.config.sft,
            mesh=session.setup.mesh,
            home=home,
            stop=session.stop,
            log=session.log,
            guard=Guard(spec.name, session.setup.config.run.max_nonfinite),
            trackers=session.trackers,
            programs=programs,
        )
        return quantized(spec, params, place)

    return make


def _loader(
    session: Session,
    spec: ModelSpec,
    config: SftConfig,
    rows: np.ndarray,
    teachers: Sequence[Params],
) -> PromptLoader:
    encoded = session.setup.encoded
    if config.source == "teacher":
        encoded = _answered_by_teachers(session, teachers, rows, config.teacher_rows)
    if spec is not session.setup.student:
        encoded = of_own_sources(in_teacher_template(spec, encoded), rows)
    encoded, rows = in_contexts(session.setup, spec, encoded, rows, config.contexts)
    return PromptLoader(
        encoded,
        rows,
        prompts_per_step=config.batch_size,
        group_size=1,
        seed=seed_for(session.setup.config.run.seed, f"sft {spec.name}"),
        references=True,
    )


def of_own_sources(encoded: Encoded, rows: np.ndarray) -> Encoded:
    """Return the rows with the weights of those sources only that have rows of a teacher."""
    if not encoded.weights:
        return encoded
    own = np.unique(encoded.source[rows])
    return dataclasses.replace(
        encoded,
        source=np.searchsorted(own, encoded.source).astype(np.int32),
        weights=tuple(encoded.weights[index] for index in own),
    )


def in_contexts(
    setup: Setup,
    spec: ModelSpec,
    encoded: Encoded,
    rows: np.ndarray,
    contexts: Sequence[Context],
) -> tuple[Encoded, np.ndarray]:
    """Return the rows once for each kind of prompt, and the indices of the training rows.

    Prompts that quote texts are those of the run's method; rows that lack a text have none.
    """
    if tuple(contexts) == ("prompt",):
        return encoded, rows
    method, voice = setup.config.method, voice_of(spec)
    usable = [i for i in rows.tolist() if encoded.references[i] is not None]
    prompts, references, sources, indices = [], [], [], []
    width = encoded.max_prompt_tokens
    for context in contexts:
        if context == "prompt":
            own, asked = usable, [encoded.prompts[i] for i in usable]
        else:
            refined = context == "rewrite"
            asking = (method.refine.prompt if refined else method.teacher.prompt) or ""
            own = [i for i in usable if not method.privileged or _is_told(setup, i)]
            seed = seed_for(setup.config.run.seed, f"errors {spec.name}")
            attempts = [
                with_errors(decode(spec.tokenizer, ids_of(encoded, i)), seed + i) if refined else ""
                for i in own
            ]
            quoted = [setup.rows[i] for i in own]
            asked = voice.ids(
                [
                    with_privileged(row, asking, attempt)
                    for row, attempt in zip(quoted, attempts, strict=True)
                ],
                quoted,
            )
        if usable and not own:
            raise UserError(
                f"{spec.name}: sft.contexts: no training row has the solution that the prompt "
                f"{context!r} quotes; name its column as data.privileged_column"
            )
        indices += range(len(prompts), len(prompts) + len(own))
        prompts += asked
        references += [encoded.references[i] for i in own]
        sources += [encoded.source[i] for i in own]
        width = max([width, *(len(ids) for ids in asked)])
    return dataclasses.replace(
        encoded,
        prompts=prompts,
        teacher_prompts=prompts,
        references=references,
        route=np.zeros(len(prompts), np.int32),
        source=np.asarray(sources, np.int32),
        kept=np.asarray(indices, np.int64),
        max_prompt_tokens=width,
        max_teacher_prompt_tokens=width,
    ), np.asarray(indices, np.int64)


def _is_told(setup: Setup, index: int) -> bool:
    return setup.rows[index].privileged is not None


def ids_of(encoded: Encoded, index: int) -> Sequence[int]:
    """Return the token ids of a row's response, none where it has no response."""
    ids = encoded.references[index]
    return () if ids is None else ids.tolist()


def with_errors(text: str, seed: int) -> str:
    """Return a text with one digit replaced, and `ERRORS` of the digits after it."""
    chance = random.Random(seed)
    places = [i for i, character in enumerate(text) if character in DIGITS]
    if not places:
        return text
    first, characters = chance.choice(places), list(text)
    for i in places:
        if i == first or (i > first and chance.random() < ERRORS):
            characters[i] = chance.choice(DIGITS.replace(characters[i], ""))
    return "".join(characters)


def by_turns(rows: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Return row indices such that sources take turns; those of one source keep their order."""
    turn = np.zeros(len(rows), np.int64)
    for each in np.unique(source[rows]):
        own = np.flatnonzero(source[rows] == each)
        turn[own] = np.arange(len(own))
    return rows[np.argsort(turn, kind="stable")]


def _answered_by_teachers(
    session: Session, teachers: Sequence[Params], rows: np.ndarray, limit: int
) -> Encoded:
    """Return the rows with responses sampled from their teachers as references, where finished."""
    setup = session.setup
    references: list[np.ndarray | None] = [None] * len(setup.rows)
    chosen = by_turns(rows[np.isin(rows, setup.encoded.kept)], setup.encoded.source)[:limit]
    for index, (spec, params) in enumerate(zip(setup.teachers, teachers, strict=True)):
        own = session.setup.own_rows(chosen, index)
        sampling = setup.sampling("teacher references", temperature=1.0, spec=spec)
        batches = eval_prompts(setup.encoded, own, 1, setup.config.eval_batch_size)
        with progress(f"answers of {spec.name}", len(batches)) as bar:
            for prompts in batches:
                if session.stop:
                    raise Interrupted(f"answers of {spec.name}: stopped")
                rollout = session.generate(spec, params, as_teacher(prompts), sampling)
                rollout = fetched(rollout)
                for i in np.flatnonzero(rollout.finished):
                    ids = rollout.tokens[i][rollout.mask[i]]
                    references[int(prompts.row[i])] = with_own_eos(setup.student, ids)
                bar(1)
    return dataclasses.replace(setup.encoded, references=references)


def in_teacher_template(spec: ModelSpec, encoded: Encoded) -> Encoded:
    """Return the rows in the teacher's template, with references that end in its EOS token."""
    references = [None if ids is None else with_own_eos(spec, ids) for ids in encoded.references]
    return dataclasses.replace(encoded, prompts=encoded.teacher_prompts, references=references)


def with_own_eos(spec: ModelSpec, ids: np.ndarray) -> np.ndarray | None:
    """Return a response with its last token replaced by the model's EOS, unless a stop token.

    None if the response has a token id outside the model's vocabulary.
    """
    if ids[-1] not in spec.stop:
        ids = np.append(ids[:-1], np.int32(spec.stop[0]))
    return ids if ids.max() < spec.model.size else None
