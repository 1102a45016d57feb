"""Every shipped method: how a batch is cut, padded and spread over devices changes no gradient.

    rollout -> score -> assemble -> gradient to all parameters, and the loss, which NumPy has, too

The reference run is whole, on one device. Against it stand two runs with more padding behind
prompts and responses: one in two micro-batches, when scored and when learnt from, and one on all
devices. Where both are off it is the padding. Models are bigrams, and for one method decoders, too,
whose compilation takes most of the time.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from fireopd_jax.method.batch import assemble
from fireopd_jax.method.config import MethodConfig
from fireopd_jax.method.scoring import ChunkAgreement, Resident, ScoreInputs
from fireopd_jax.models.language_model import LanguageModel, Params
from fireopd_jax.models.placement import Placement
from fireopd_jax.recipe.layers import SHIPPED
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.sharding.mesh import MeshConfig, make_mesh, shard_rows
from fireopd_jax.training.update import gradients
from fireopd_jax.types import Array, Batch, Rollout, Scores
from fireopd_jax.verify import cases, expected, reference, reference_batch, reference_stages
from fireopd_jax.verify.pool import compiled, in_parallel
from fireopd_jax.verify.reference_losses import Seen
from fireopd_jax.verify.table import Row, relative

LOSS_BOUND = 1e-5
"""Of the sum of |terms|: a loss may be a small sum of large terms of both signs."""
GRADIENT_BOUND = 1e-5
"""Of the largest element of each parameter's gradient: float32 adds up in another order."""

PACK = 128
"""Tokens of a pack: several rows, in several packs."""


@dataclasses.dataclass(frozen=True)
class Models:
    """A student, its teacher and the base policy; all share one architecture."""

    model: LanguageModel
    student: Params
    teacher: Params
    base: Params
    mesh: Mesh | None = dataclasses.field(default=None, kw_only=True)

    def on(self, mesh: Mesh) -> "Models":
        """Return the models on the devices, as training shards them."""
        place = Placement(mesh)
        params = (
            jax.device_put(each, place.of(each)) for each in (self.student, self.teacher, self.base)
        )
        return Models(self.model, *params, mesh=mesh)


def shipped_methods() -> list[str]:
    """List the methods that come with the package, by the names of their files."""
    folder: Path = next(folder for folder in SHIPPED if folder.is_dir())
    return sorted(file.stem for file in (folder / "method").glob("*.yaml"))


def rows(methods: Sequence[str] | None = None, with_decoder: str = "fire_opd") -> Iterator[Row]:
    """Verify the methods, by default all that are shipped, and one with a decoder, too."""
    mesh = make_mesh(MeshConfig())
    count = mesh.size * -(-8 // mesh.size)
    plain, padded = cases.small_rollout(count), cases.small_rollout(count, more=3)
    programs = Programs()

    def of(item: tuple[str, LanguageModel]) -> Iterator[Row]:
        name, model = item
        method = load_config(["smoke", f"method/{name}"]).method
        models = Models(model, *(cases.random_params(model, seed) for seed in range(3)))
        spread = models.on(mesh)
        if model is decoder:
            name = f"{name} of a decoder"
        batch, whole = programs.run(models, method, plain)
        terms = exact_terms(models, method, batch, programs)
        error = abs(float(whole["loss"]) - terms.sum()) / np.abs(terms).sum()
        yield Row(f"{name}: loss", float(error), LOSS_BOUND)
        rows = shard_rows(mesh, padded)
        others = {
            "padding, micro-batches": programs.run(models, method, padded, count // 2),
            f"padding, {mesh.size} devices": programs.run(spread, method, rows),
            "packed": programs.run(models, method, padded, tokens=PACK),
            f"packed, {mesh.size} devices": programs.run(spread, method, rows, tokens=PACK),
        }
        for what, (_, other) in others.items():
            yield relative(f"{name}: {what}", pairs(other, whole), GRADIENT_BOUND)

    small, decoder = cases.bigram(), cases.small_model()
    named = shipped_methods() if methods is None else methods
    yield from in_parallel(of, [*((name, small) for name in named), (with_decoder, decoder)])


def pairs(ours: Any, theirs: Any) -> list[tuple[Any, Any]]:
    """Set the leaves of two trees side by side."""
    return list(zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))


class Programs:
    """The three steps, compiled once for all methods that share a stage."""

    def __init__(self):
        self._score = compiled(score, 0, 1, 2)
        self._assemble = compiled(of_one_teacher, 2, 3, 4)
        self._gradients = compiled(gradient, 0, 1, 2, 3, 4)
        self.states = compiled(lambda model, *x: model.response_hidden(*x), 0)

    def run(
        self,
        models: Models,
        method: MethodConfig,
        rollout: Rollout,
        micro_batch_size: int | None = None,
        tokens: int | None = None,
    ) -> tuple[Batch, dict[str, Any]]:
        """Return the batch, and loss and gradient of the student's parameters."""
        stage = dataclasses.replace(
            method.score, micro_batch_size=micro_batch_size, micro_batch_tokens=tokens
        )
        params = models.student, models.teacher, models.base
        if "rollout.correct" in method.asked_of_rollout:
            rollout = dataclasses.replace(rollout, correct=graded(rollout))
        scores = self._score(stage, models.model, models.mesh, params, rollout)
        batch = self._assemble(rollout, scores, method.filter, method.reweight, method.aggregate)
        return batch, self._gradients(
            method.loss, models.model, models.mesh, micro_batch_size, tokens, *params, batch
        )


def score(
    stage: Any,
    model: LanguageModel,
    mesh: Mesh | None,
    params: tuple[Params, ...],
    rollout: Rollout,
) -> Scores:
    """Score a rollout by student, teacher and base policy."""
    student, teacher, base = (Resident(model, each) for each in params)
    return stage(ScoreInputs(rollout, student, [teacher], 1.0, mesh, base))


def graded(rollout: Rollout) -> np.ndarray:
    """Return grades by which every other row is right."""
    return np.asarray(rollout.prompts.row % 2, np.float32)


def of_one_teacher(
    rollout: Rollout, scores: Scores, filter: Any, reweight: Any, aggregate: Any
) -> Batch:
    """Return the batch of rows that share a teacher."""
    return assemble(rollout, scores, filter, reweight, aggregate).batch


def gradient(
    loss: Any,
    model: LanguageModel,
    mesh: Mesh | None,
    micro_batch_size: int | None,
    micro_batch_tokens: int | None,
    student: Params,
    teacher: Params,
    base: Params,
    batch: Batch,
) -> dict[str, Any]:
    """Return the loss and its gradient to the student's parameters."""
    judge = loss.judge([teacher], base)
    grads, metrics = gradients(
        model,
        loss,
        student,
        batch,
        micro_batch_size=micro_batch_size,
        micro_batch_tokens=micro_batch_tokens,
        teacher=None if judge is None else (model, judge),
        mesh=mesh,
    )
    return {"loss": metrics["loss"].total, "gradient": grads}


def exact_terms(
    models: Models, method: MethodConfig, batch: Batch, programs: Programs
) -> np.ndarray:
    """Compute each token's part of the loss: NumPy from the models' final states on."""
    rollout = batch.rollout
    prompts, mask = rollout.prompts, np.asarray(rollout.mask)
    of_student = prompts.tokens, prompts.length
    of_teacher = prompts.teacher_tokens, prompts.teacher_length

    def logits(params: Params, prompt: tuple[Array, Array]) -> np.ndarray:
        asked = params, *prompt, rollout.tokens, rollout.mask
        hidden, head = programs.states(models.model, *asked)
        return cases.logits(hidden, head)

    z, z_q = logits(models.student, of_student), logits(models.teacher, of_teacher)
    support = batch.scores.support
    seen = Seen(
        z=z,
        z_q=z_q,
        z_old=z,
        z_base=logits(models.base, of_student),
        tokens=np.asarray(rollout.tokens),
        mask=mask,
        support=np.zeros((*mask.shape, 0), int) if support is None else np.asarray(support.ids),
        drawn=np.asarray(rollout.logprob, np.float64),
    )
    if isinstance(method.score, ChunkAgreement):
        seen = cases.audited(seen, rollout, method.score.alpha)
    stats = {
        f"{name}_{what}": value
        for name, of_model in (("student", z), ("teacher", z_q))
        for what, value in (
            ("logprob", seen.logprob(of_model)),
            ("entropy", seen.entropy(of_model)),
        )
    }
    stats["reverse_kl"] = np.zeros(mask.shape)
    for at in zip(*np.nonzero(mask), strict=True):
        stats["reverse_kl"][at] = reference.reverse_kl(z[at], z_q[at])[0]
    shift = gap = None
    if method.score.margin is not None:
        pair = stats["teacher_logprob"], stats["student_logprob"]
        of_rows = mask, np.asarray(prompts.group), graded(rollout) > 0
        shift, gap = reference_stages.margins(*pair, *of_rows, method.score.margin.delta)
    sample_id = np.asarray(prompts.sample_id)
    kept = expected.keep(method.filter, stats, mask, gap=gap, sample_id=sample_id)
    weight = expected.weight(method.reweight, stats, mask, kept)
    share = reference_batch.coefficients(mask, kept, method.aggregate)
    trained = mask & (kept if kept.ndim == 2 else kept[:, None])
    seen = dataclasses.replace(seen, kept=trained)
    return share * weight * expected.loss(method.loss, seen, shift)[0]
