"""Checks between the sections of a configuration.

    Config -> one line for each conflict

The stages of a method declare what they need and assume; these declarations are compared here.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fireopd_jax.config import nearest
from fireopd_jax.evaluation.graders import KINDS
from fireopd_jax.method.config import MethodConfig
from fireopd_jax.recipe.models import ModelConfig
from fireopd_jax.recipe.optim import OptimConfig
from fireopd_jax.recipe.student_scores import obstacles
from fireopd_jax.rollout.settings import RolloutConfig

if TYPE_CHECKING:
    from fireopd_jax.recipe.schema import Config

RESERVED = ("student", "student_start", "student_hf", "base")
"""Model names that every run uses."""


def conflicts(config: "Config") -> Iterator[str]:
    """Yield a line for each conflict between sections, starting with the key."""
    if not config.teachers and config.method.teacher.resident:
        yield "teachers: none is given; expected `teacher: ...` or `teachers: {NAME: ...}`"
    yield from _method_conflicts(config.method, config.rollout, len(config.teachers))
    if config.method.loss.one_update and config.run.updates_per_rollout > 1:
        yield (
            f"run.updates_per_rollout={config.run.updates_per_rollout}: "
            f"{config.method.loss.kind} is exact only for the first update on a rollout; expected 1"
        )
    if config.method.score.student == "decode":
        for obstacle in obstacles(config, config.method):
            yield f"method.score.student=decode: {obstacle}; expected forward, or null"
    for key, size, divisor in _divisions(config):
        if size % divisor:
            yield f"{key}={divisor} does not divide the {size} rows of a batch"
    if config.rollout.temperature == 0:
        yield "rollout.temperature=0: greedy rollouts have no gradient; expected a positive value"
    for key, optim, updates in _optimizers(config):
        if optim.warmup_steps >= updates:
            yield f"{key}.warmup_steps={optim.warmup_steps}: expected fewer than {updates} updates"
    yield from _name_conflicts(config)
    yield from _grader_conflicts(config)
    yield from _served_conflicts(config)
    if len(config.teachers) > 1 and not config.data.routed:
        yield (
            f"data.teacher_column: with {len(config.teachers)} teachers, expected the column that "
            "names each row's teacher, or a mixture whose sources name theirs"
        )
    for name, teacher in config.teachers.items():
        if teacher.sft is not None and teacher.sft.source == "teacher":
            yield f"teachers.{name}.sft.source: a teacher can only be trained on 'rows'"


def _grader_conflicts(config: "Config") -> Iterator[str]:
    """Yield a grader that does not exist, or that cannot compare two responses."""
    kind, refine = config.data.grader, config.method.refine
    if kind not in KINDS and "." not in kind:
        yield (
            f"data.grader={kind}: expected {', '.join(KINDS)}, or the dotted name of a function"
            f"{nearest(kind, KINDS)}"
        )
    similarity = getattr(refine, "similarity", None)
    if similarity is not None and similarity.grades and kind not in KINDS[:3]:
        yield (
            f"data.grader={kind}: method.refine.similarity.kind=grader compares final answers; "
            f"expected {', '.join(KINDS[:3])}"
        )


def sft_conflicts(config: "Config") -> Iterator[str]:
    """Yield prompts of supervised training that the method of the run does not have."""
    for key, model in _models(config):
        contexts = () if model.sft is None else model.sft.contexts
        if model.sft is not None and not contexts:
            yield f"{key}.sft.contexts: none is given; expected one or more"
        if "teacher" in contexts and config.method.teacher.prompt is None:
            yield f"{key}.sft.contexts: teacher needs method.teacher.prompt"
        if "rewrite" in contexts and not config.method.refine.rewrites:
            yield f"{key}.sft.contexts: rewrite needs method.refine.kind=rewrite"
    served = [name for name, each in config.teachers.items() if each.served is not None]
    sft = config.student.sft
    if served and sft is not None and sft.source == "teacher":
        yield (
            f"student.sft.source=teacher: teachers.{served[0]} is served, and only samples of a "
            "teacher on this machine are trained on; expected rows"
        )


def _served_conflicts(config: "Config") -> Iterator[str]:
    """Yield what teachers behind HTTP cannot do."""
    method, score = config.method, config.method.score
    served = [name for name, each in config.teachers.items() if each.served is not None]
    if not served or not method.teacher.resident:
        return
    where = f"teachers.{served[0]}.served"
    if len(served) < len(config.teachers):
        other = next(name for name in config.teachers if name not in served)
        yield f"{where}: teacher {other} is not served; expected all teachers served, or none"
    if method.refine.rewrites:
        yield (
            f"{where}: method.refine.kind={method.refine.kind} trains on the rewriter's token ids, "
            "which a served teacher does not return; expected a teacher on this machine"
        )
    if not score.scores_teacher:
        return
    if config.rollout.window > 1:
        yield (
            f"{where}: rollout.window={config.rollout.window}: a served teacher is asked before "
            "the updates of a window, at token ids of a student that those replace; expected 1"
        )
    for stage in method.readers:
        if lacking := sorted(stage.needs & {"teacher.entropy", "teacher.hidden", "reverse_kl"}):
            yield (
                f"{where}: {stage.kind} needs {', '.join(lacking)}, and a served teacher returns "
                "log-probabilities only; expected other stages, such as those of method/opd, or a "
                "teacher on this machine"
            )
    if score.one_teacher:
        yield (
            f"{where}: method.score.kind={score.kind} needs the teacher's hidden states; expected "
            "sampled_token, or top_k with support=student"
        )
    temperature = score.temperature or config.rollout.temperature
    if temperature != 1:
        yield (
            f"{where}: log-probabilities are compared at temperature {temperature:g}, servers "
            "return them at 1; expected method.score.temperature=1"
        )


def _name_conflicts(config: "Config") -> Iterator[str]:
    if len(set(config.run.compare)) < len(config.run.compare):
        yield f"run.compare={list(config.run.compare)}: a method is named twice"
    for name in config.run.compare:
        if name in RESERVED or name.startswith("teacher_"):
            yield f"run.compare: {name}: reserved for a model of the run; rename the method's file"
    if "" in config.teachers:
        yield "teachers: a name is empty; expected a name, such as that of a data source"


def _method_conflicts(
    method: MethodConfig, rollout: RolloutConfig, num_teachers: int
) -> Iterator[str]:
    """Yield stages that these scores or rollouts make incorrect, useless or identically zero."""
    score, loss = method.score, method.loss
    yield from _teacher_conflicts(method, rollout)
    num_teachers = 1 if method.teacher.own else num_teachers
    for stage in method.readers:
        if missing := sorted(stage.needs - score.gives):
            yield (
                f"method: {stage.kind} needs {', '.join(missing)}, which "
                f"method.score ({score.kind}) does not provide"
            )
    for name in ("filter", "reweight"):
        for problem in getattr(method, name).problems(rollout.batch_size):
            yield f"method.{name}.{problem}"
    filtered = rollout.top_p < 1 or max(rollout.top_k, rollout.min_p, rollout.min_tokens) > 0
    if filtered and loss.unfiltered and loss.corrected_by is not None:
        yield (
            f"{loss.kind} is exact only for unfiltered rollouts: with rollout.top_p, top_k, min_p "
            f"or min_tokens set, give method.loss.{loss.corrected_by} too"
        )
    elif filtered and loss.unfiltered:
        yield (
            f"{loss.kind} assumes tokens sampled from the student's whole distribution: expected "
            "rollout.top_p=1, top_k=0, min_p=0 and min_tokens=0"
        )
    if rollout.on_policy_fraction < 1 and loss.on_policy:
        yield (
            f"rollout.on_policy_fraction={rollout.on_policy_fraction}: {loss.kind} assumes that "
            "every response is sampled from the student; expected 1, or a divergence on a support "
            "or over the vocabulary"
        )
    yield from _overprovision_conflicts(method, rollout)
    if rollout.window > 1 and loss.on_policy and not loss.corrects:
        yield (
            f"rollout.window={rollout.window}: {loss.kind} assumes that responses are sampled from "
            "the student as it is; expected 1"
            + (f", or method.loss.{loss.corrected_by}" if loss.corrected_by else "")
        )
    if score.unit_temperature and rollout.temperature != 1:
        yield (
            f"rollout.temperature={rollout.temperature}: {score.kind} is defined by the student's "
            "own distribution, at temperature 1; expected 1"
        )
    if rollout.group_size < loss.least_group:
        yield (
            f"rollout.group_size={rollout.group_size}: {loss.kind} compares the responses to one "
            f"prompt; expected {loss.least_group} or more, or method.loss.baseline=none"
        )
    scored_at = score.temperature or rollout.temperature
    if scored_at != rollout.temperature and loss.on_policy and not loss.corrects:
        yield (
            f"method.score.temperature={score.temperature}: {loss.kind} assumes responses sampled "
            f"from the scored distribution; expected rollout.temperature ({rollout.temperature})"
        )
    if score.margin is not None and rollout.group_size == 1:
        yield (
            "method.score.margin compares the responses to one prompt: expected rollout.group_size "
            "of 2 or more, found 1"
        )
    if score.margin is not None and not method.needs & {"margin"}:
        yield (
            "method.score.margin: neither filter nor loss uses it; expected null, or "
            "method.loss.margin=true"
        )
    if score.support_size is not None and score.support_size < loss.least_support:
        yield (
            f"method.score.k={score.support_size}: a single token, renormalised, has probability 1 "
            "in both models, so the loss is identically zero; expected k of 2 or more, or "
            "score.sampled=true"
        )
    if score.only_for_readers and not score.only_for_readers & method.needs:
        yield (
            f"method.score: {score.kind} computes {', '.join(sorted(score.only_for_readers))}, "
            "which neither filter, reweight nor loss uses; expected sampled_token or top_k"
        )
    if score.one_teacher and num_teachers > 1:
        yield (
            f"method.score: {score.kind} uses one teacher's head, {num_teachers} teachers are "
            "given; expected one, or score.kind=top_k"
        )


def _teacher_conflicts(method: MethodConfig, rollout: RolloutConfig) -> Iterator[str]:
    """Yield a teacher that cannot do what the other choices ask for, or that teaches nothing."""
    teacher, refine, loss = method.teacher, method.refine, method.loss
    if refine.asks_teacher and not (teacher.own or teacher.resident):
        yield f"method.refine: {refine.kind} asks a teacher, and method.teacher.kind={teacher.kind}"
    for problem in refine.problems(rollout.max_tokens):
        yield f"method.refine.{problem}"
    if refine.rewrites and rollout.on_policy_fraction < 1:
        yield (
            f"rollout.on_policy_fraction={rollout.on_policy_fraction}: method.refine.kind="
            f"{refine.kind} rewrites the student's own responses; expected 1"
        )
    if refine.rewrites and loss.on_policy:
        yield (
            f"method.refine.kind={refine.kind}: {loss.kind} assumes that every response is sampled "
            "from the student; expected a divergence on a support or over the vocabulary"
        )
    audit, needs = "rollout.audit", method.score.needs
    if audit in needs and audit not in refine.gives:
        yield (
            f"method.score: {method.score.kind} needs audited responses; expected "
            "method.refine.kind=audit"
        )
    if audit in refine.gives and audit not in needs:
        yield (
            f"method.refine: nothing uses the audits with method.score.kind={method.score.kind}; "
            "expected method.refine.kind=none, or method.score.kind=chunk_agreement"
        )
    if teacher.own and not (teacher.privileged or refine.rewrites):
        yield (
            "method.teacher.prompt: after its own prompt the student has nothing to learn from "
            "itself; expected prompt=reference, or a text with {problem} and {reference}"
        )


def _overprovision_conflicts(method: MethodConfig, rollout: RolloutConfig) -> Iterator[str]:
    """Yield what rows that are written over several steps make incorrect."""
    if not rollout.overprovision:
        return
    found, loss = f"rollout.overprovision={rollout.overprovision:g}", method.loss
    if rollout.window > 1:
        yield f"{found}: expected rollout.window=1 (it is {rollout.window}), or no overprovision"
    if rollout.on_policy_fraction < 1:
        yield (
            f"{found}: references need no time to be written; expected "
            f"rollout.on_policy_fraction=1 (it is {rollout.on_policy_fraction})"
        )
    if loss.least_group > 1 or method.score.margin is not None:
        yield (
            f"{found}: the responses to one prompt may end in different steps, and "
            f"{loss.kind if loss.least_group > 1 else 'method.score.margin'} compares them; "
            "expected 0"
        )
    if loss.on_policy and not loss.corrects:
        yield (
            f"{found}: {loss.kind} assumes that responses are sampled from the student as it is; "
            "expected 0" + (f", or method.loss.{loss.corrected_by}" if loss.corrected_by else "")
        )


def _divisions(config: "Config") -> Iterator[tuple[str, int, int]]:
    rows = config.rollout.batch_size
    yield "rollout.group_size", rows, config.rollout.group_size
    yield "optim.micro_batch_size", rows, config.optim.micro_batch_size or 1
    yield "method.score.micro_batch_size", rows, config.method.score.micro_batch_size or 1
    for key, model in _models(config):
        if model.sft is not None:
            micro = model.sft.optim.micro_batch_size or 1
            yield f"{key}.sft.optim.micro_batch_size", model.sft.batch_size, micro


def _models(config: "Config") -> Iterator[tuple[str, ModelConfig]]:
    yield "student", config.student
    for name, teacher in config.teachers.items():
        yield f"teachers.{name}", teacher


def _optimizers(config: "Config") -> Iterator[tuple[str, OptimConfig, int]]:
    """Yield key, configuration and number of updates of each optimizer, where it is known."""
    if config.run.epochs is None:
        yield "optim", config.optim, config.run.steps * config.run.updates_per_rollout
    for key, model in _models(config):
        if model.sft is not None:
            yield f"{key}.sft.optim", model.sft.optim, model.sft.steps
