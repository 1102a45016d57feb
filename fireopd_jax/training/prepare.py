"""The models that a run begins with: read, or drawn at random and trained on given responses.

models/NAME of this run, if whole -> read back
else path, or random parameters   -> supervised training, if any -> quantised, if so -> models/NAME
"""

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from fireopd_jax.config import UserError
from fireopd_jax.data.pipeline import Encoded, PromptLoader, eval_prompts
from fireopd_jax.models.hf_load import load, resolve
from fireopd_jax.models.language_model import Params
from fireopd_jax.models.quantized import quantize_params
from fireopd_jax.recipe.optim import SftConfig
from fireopd_jax.rollout.sampling import seed_for
from fireopd_jax.runs.checkpoints import restore_params, save_model
from fireopd_jax.runs.tracking import progress
from fireopd_jax.runtime.signals import Interrupted
from fireopd_jax.session.session import Session, as_teacher
from fireopd_jax.session.setup import ModelSpec
from fireopd_jax.sharding.mesh import replicate, replicated
from fireopd_jax.training.sft import supervise

Make = Callable[[Path], Params]


def check_learners(student: ModelSpec, teachers: Sequence[ModelSpec]) -> None:
    """Refuse to train a model whose kernels its folder keeps as whole numbers."""
    for spec in (student, *teachers):
        if spec.stored is not None and (spec is student or spec.config.sft is not None):
            raise UserError(
                f"{spec.name}: {spec.config.path} holds {spec.stored} weights, which cannot learn; "
                "expected a model that was saved without quantize"
                + ("" if spec is student else ", or no sft")
            )


def once(session: Session, spec: ModelSpec, name: str, make: Make) -> Params:
    """Read the finished model `name` of this run, or make it and write it down."""
    home = session.folder.path / "models" / name
    if (home / "model.json").is_file():
        return restore_params(home, _shapes(session, spec))
    home.mkdir(parents=True, exist_ok=True)
    params = make(home)
    if not spec.builtin_tokenizer:
        spec.tokenizer.save_pretrained(home / "tokenizer")
    save_model(home, params, spec.description())
    shutil.rmtree(home / "checkpoints", ignore_errors=True)  # of supervised training
    return params


def random_params(session: Session, spec: ModelSpec) -> Params:
    """Draw parameters from the run's seed and the model's name."""
    seed = seed_for(session.setup.config.run.seed, f"init {spec.name}")
    key = jax.random.key(seed, impl="threefry2x32")
    return replicate(session.setup.mesh, jax.jit(spec.model.init)(key))


def _shapes(session: Session, spec: ModelSpec) -> Params:
    """Give shapes, types and places of the parameters, none of which is allocated."""
    place = replicated(session.setup.mesh)
    shapes = jax.eval_shape(spec.model.init, jax.random.key(0))
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes
    )


def _first_params(session: Session, spec: ModelSpec) -> Params:
    """Read the parameters from the folder that is given, or draw them."""
    if spec.config.path is None:
        return random_params(session, spec)
    folder = resolve(spec.config.path)
    if (folder / "model.json").is_file():
        model = dataclasses.replace(spec.model, quantize=spec.stored)
        kept = _shapes(session, dataclasses.replace(spec, model=model))
        return restore_params(folder, kept)
    place = replicated(session.setup.mesh)
    model = spec.model
    return load(folder, model.config, model.vocab_size, place, model.quantize)


def make_teacher(session: Session, index: int) -> Params:
    """Make or read one teacher; its supervised training sees the rows routed to it."""
    spec = session.setup.teachers[index]
    if spec.config.path is None and spec.config.sft is None:
        session.log(f"{spec.name}: neither path nor sft is given, its parameters are random")
    rows = session.setup.own_rows(session.setup.train, index)
    return once(session, spec, spec.slug, _maker(session, spec, rows, ()))


def read_base(session: Session) -> Params | None:
    """Read the base policy that is named, if one is."""
    spec = session.setup.base
    return None if spec is None else _first_params(session, spec)


def make_student(session: Session, teachers: Sequence[Params]) -> Params:
    """Make or read the student as distillation will find it."""
    spec = session.setup.student
    return once(
        session, spec, "student_start", _maker(session, spec, session.setup.train, teachers)
    )


def _maker(session: Session, spec: ModelSpec, rows: np.ndarray, teachers: Sequence[Params]) -> Make:
    def make(home: Path) -> Params:
        if spec.config.sft is None:
            return _quantized(session, spec, _first_params(session, spec))
        whole = dataclasses.replace(spec, model=dataclasses.replace(spec.model, quantize=None))
        params = _first_params(session, whole)
        loader = _loader(session, spec, spec.config.sft, rows, teachers)
        params = supervise(
            spec.slug,
            whole.model,
            params,
            loader,
            spec.config.sft,
            mesh=session.setup.mesh,
            home=home,
            stop=session.stop,
            log=session.log,
        )
        return _quantized(session, spec, params)

    return make


def _quantized(session: Session, spec: ModelSpec, params: Params) -> Params:
    if spec.model.quantize is None:
        return params
    whole = replicated(session.setup.mesh)
    return jax.jit(quantize_params, out_shardings=whole)(params)


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
        encoded = as_teacher_learns(spec, encoded)
    return PromptLoader(
        encoded,
        rows,
        prompts_per_step=config.batch_size,
        group_size=1,
        seed=seed_for(session.setup.config.run.seed, f"sft {spec.name}"),
        references=True,
    )


def _answered_by_teachers(
    session: Session, teachers: Sequence[Params], rows: np.ndarray, limit: int
) -> Encoded:
    """Take as references what each row's own teacher answers, where it comes to an end."""
    setup = session.setup
    references: list[np.ndarray | None] = [None] * len(setup.rows)
    chosen = rows[np.isin(rows, setup.encoded.kept)][:limit]
    for index, (spec, params) in enumerate(zip(setup.teachers, teachers, strict=True)):
        own = session.setup.own_rows(chosen, index)
        sampling = setup.sampling("teacher references", temperature=1.0, spec=spec)
        batches = eval_prompts(setup.encoded, own, 1, setup.config.eval_batch_size)
        with progress(f"answers of {spec.name}", len(batches)) as bar:
            for prompts in batches:
                if session.stop:
                    raise Interrupted(f"answers of {spec.name}: stopped")
                rollout = session.generate(spec, params, as_teacher(prompts), sampling)
                rollout = jax.device_get(rollout)
                for i in np.flatnonzero(rollout.finished):
                    ids = rollout.tokens[i][rollout.mask[i]]
                    references[int(prompts.row[i])] = said_by(setup.student, ids)
                bar(1)
    return dataclasses.replace(setup.encoded, references=references)


def as_teacher_learns(spec: ModelSpec, encoded: Encoded) -> Encoded:
    """Give the rows in a teacher's own template, with references that end as it does."""
    references = [None if ids is None else said_by(spec, ids) for ids in encoded.references]
    return dataclasses.replace(encoded, prompts=encoded.teacher_prompts, references=references)


def said_by(spec: ModelSpec, ids: np.ndarray) -> np.ndarray | None:
    """Let a response end as a model's own do; None if it has a token that the model lacks."""
    if ids[-1] not in spec.stop:
        ids = np.append(ids[:-1], np.int32(spec.stop[0]))
    return ids if ids.max() < spec.model.size else None
