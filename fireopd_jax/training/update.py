"""One optimizer step over a batch, in strided micro-batches.

    loss = sum over the global batch of coefficient * weight * per-token loss

Coefficients already hold the global denominators, so the gradients of any micro-batches simply
add up. A step without a usable gradient changes nothing but the counters, and its metrics say
what was not finite.
"""

import dataclasses
from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Float, Float32, Int32

from fireopd_jax.method.batch import total_loss
from fireopd_jax.method.losses.support import on_support, tail_bucket
from fireopd_jax.metrics import Max, Mean
from fireopd_jax.models.comparison import divergence_from
from fireopd_jax.models.decoder import Remat
from fireopd_jax.models.language_model import LanguageModel, Params
from fireopd_jax.models.lora import LoraConfig
from fireopd_jax.ops.formulas import Divergence, ForwardKL, ReverseKL
from fireopd_jax.ops.head import HeadOptions, head_gather, head_stats
from fireopd_jax.recipe.optim import OptimConfig
from fireopd_jax.sharding.mesh import micro_batches
from fireopd_jax.types import Array, Batch, TokenStats, pytree

Metrics = dict[str, Any]
"""Name -> Mean or Max."""

FAR = 0.2
"""How far from 1 a ratio of probabilities is far: the usual bound of a clipped surrogate."""
CAUSES = {
    "nonfinite/teacher_logprob": "the teacher's log-probs",
    "nonfinite/scored_student_logprob": "the student's log-probs when scored",
    "nonfinite/token_weight": "the token weights",
    "nonfinite/student_logprob": "the student's log-probs in the update",
}


@runtime_checkable
class Loss(Protocol):
    """Per-token loss of the stats that carry the gradient."""

    @property
    def divergence_from_teacher(self) -> Divergence | None:
        """The divergence over the whole vocabulary that the update must compute, if any."""
        ...

    def __call__(self, student: TokenStats, batch: Batch) -> Float32[Array, "B T"]:
        """Give the loss of each response token, not yet weighted.

        `student` has the log-probabilities of a support where the scores have one, and the
        divergence from the teacher where the loss has a `divergence_from_teacher`.
        """
        ...


@pytree
class TrainState:
    """All that an update changes."""

    params: Params
    """What learns: all parameters, or adapters alone."""
    opt_state: Any
    updates: Int32[Array, ""]
    """Updates tried; those skipped are counted in both."""
    skipped: Int32[Array, ""]
    recent: Float32[Array, "W B 2"] | None = None
    """Scores of earlier batches, for a filter that ranks by them, too."""


def learning_rate(config: OptimConfig, updates: int) -> optax.Schedule:
    """Build the schedule over `updates` optimizer steps."""
    peak, end = config.learning_rate, config.learning_rate * config.final_fraction
    rest = max(updates - config.warmup_steps, 1)
    courses = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, end, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, config.final_fraction),
    }
    course = courses[config.schedule]()
    if not config.warmup_steps:
        return course
    rise = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([rise, course], [config.warmup_steps])


def make_optimizer(config: OptimConfig, updates: int) -> optax.GradientTransformation:
    """Build AdamW with its schedule and clipping; it works in float32 on parameters of any type."""
    adamw = optax.adamw(
        learning_rate(config, updates),
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        mu_dtype=jnp.dtype(config.moment_dtype),
    )
    if config.clip_norm is not None:
        adamw = optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
    return in_float32(adamw, master=config.master)


def in_float32(
    optimizer: optax.GradientTransformation, *, master: bool
) -> optax.GradientTransformation:
    """Let an optimizer see float32 only; with `master`, it moves a copy that is never rounded."""

    def init(params: Any):
        wide = optax.tree.cast(params, jnp.float32)
        narrow = any(leaf.dtype != jnp.float32 for leaf in jax.tree.leaves(params))
        return wide if master and narrow else optax.EmptyState(), optimizer.init(wide)

    def update(updates: Any, state: Any, params: Any = None):
        kept, inner = state
        own = isinstance(kept, optax.EmptyState)
        wide = optax.tree.cast(params, jnp.float32)
        before = wide if own else kept
        steps, inner = optimizer.update(optax.tree.cast(updates, jnp.float32), inner, before)
        if own:
            return steps, (kept, inner)
        kept = optax.apply_updates(before, steps)
        rounded = jax.tree.map(lambda new, old: new.astype(old.dtype), kept, params)
        steps = jax.tree.map(lambda new, old: new.astype(jnp.float32) - old, rounded, wide)
        return steps, (kept, inner)

    return optax.GradientTransformation(init, update)


def init_state(
    params: Params, optimizer: optax.GradientTransformation, recent: Array | None = None
) -> TrainState:
    """Begin training from `params`."""
    return TrainState(
        params=params,
        opt_state=optimizer.init(params),
        updates=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        recent=recent,
    )


def gradients(
    model: LanguageModel,
    loss: Loss,
    params: Params,
    batch: Batch,
    temperature: Float[Array, ""] | float = 1.0,
    *,
    micro_batch_size: int | None = None,
    head: str | None = None,
    head_chunk: int | None = None,
    remat: Remat = "none",
    lora: LoraConfig | None = None,
    base: Params | None = None,
    teacher: tuple[LanguageModel, Params] | None = None,
    mesh: Mesh | None = None,
) -> tuple[Params, Metrics]:
    """Give the gradient of the batch's loss in float32, and metrics, summed over micro-batches.

    With `lora`, `params` are adapters of `base`. `teacher` lends its head to a loss that has a
    `divergence_from_teacher`. `metrics["loss"].total` is the loss itself.
    """
    options = model.head_options(temperature, head, head_chunk, mesh)

    def loss_of(params: Params, part: Batch) -> tuple[Array, Metrics]:
        rollout = part.rollout
        hidden, matrix = model.response_hidden(
            params if base is None else base,
            rollout.prompts.tokens,
            rollout.prompts.length,
            rollout.tokens,
            rollout.mask,
            adapters=None if lora is None else lora.scaled(params),
            remat=remat,
        )
        student = _student_stats(loss, hidden, matrix, part, options, teacher)
        total = total_loss(loss(student, part), part)
        return total, _update_metrics(total, student, part)

    differentiate = jax.grad(loss_of, has_aux=True)

    def add(sums: Params, part: Batch) -> tuple[Params, Metrics]:
        grads, metrics = differentiate(params, part)
        wide = optax.tree.cast(grads, jnp.float32)
        metrics["grad_square"] = _sum(optax.tree.norm(wide, squared=True))
        return jax.tree.map(jnp.add, sums, wide), metrics

    rows = batch.coefficient.shape[0]
    if micro_batch_size in (None, rows):
        grads, metrics = differentiate(params, batch)
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), grads), metrics
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
    grads, metrics = jax.lax.scan(add, zeros, micro_batches(batch, rows // micro_batch_size))
    return grads, {name: metric.fold() for name, metric in metrics.items()}


def _student_stats(
    loss: Loss,
    hidden: Array,
    head: Array,
    part: Batch,
    options: HeadOptions,
    teacher: tuple[LanguageModel, Params] | None,
) -> TokenStats:
    """Read from the student's states what the loss and the metrics want."""
    support, tokens = part.scores.support, part.rollout.tokens
    if support is None:
        stats = head_stats(hidden, head, tokens, **options)
        few = None
    else:
        stats = head_gather(hidden, head, tokens, support.ids, **options)
        few = stats.support_logprob
    divergence, value = loss.divergence_from_teacher, None
    if divergence is not None:
        of_teacher = part.scores.teacher_hidden
        if teacher is None or of_teacher is None:
            raise ValueError("a divergence over the whole vocabulary needs the teacher's states")
        value = divergence_from(teacher, of_teacher, divergence, hidden, head, options)
    return TokenStats(stats.logprob, stats.entropy, few, value)


def _update_metrics(total: Array, student: TokenStats, part: Batch) -> Metrics:
    counted = part.coefficient > 0
    gap = student.logprob - part.scores.student.logprob

    def bad(x: Array) -> Mean:
        return _sum((counted & ~jnp.isfinite(x)).sum().astype(jnp.float32))

    return {
        "loss": _sum(total),
        "policy/log_ratio_max": Max.of(jnp.abs(gap), counted),
        "policy/ratio_far_fraction": Mean.of(jnp.abs(jnp.expm1(gap)) > FAR, counted),
        "entropy": Mean.of(student.entropy, counted),
        **of_support(student, part, counted),
        "nonfinite/student_logprob": bad(student.logprob),
        "nonfinite/scored_student_logprob": bad(part.scores.student.logprob),
        "nonfinite/teacher_logprob": bad(part.scores.teacher.logprob),
        "nonfinite/token_weight": bad(part.weight),
    }


def of_support(student: TokenStats, part: Batch, counted: Array) -> Metrics:
    """Compare the models on the support and a bucket of all the rest.

    A falling mass is lost to the words outside. The divergences are never above those over the
    whole vocabulary.
    """
    if student.support is None or part.scores.support is None:
        return {}
    log_p, log_q, valid = on_support(student, part)
    mass = jnp.where(valid, jnp.exp(log_p), 0.0).sum(axis=-1)
    return {
        "policy/support_mass": Mean.of(mass, counted),
        "policy/support_reverse_kl": Mean.of(
            tail_bucket(ReverseKL(), log_p, log_q, valid), counted
        ),
        "policy/support_forward_kl": Mean.of(
            tail_bucket(ForwardKL(), log_p, log_q, valid), counted
        ),
    }


def _sum(total: Array) -> Mean:
    """Give a sum over micro-batches; `make_update` counts it once."""
    return Mean(total=total, count=jnp.float32(0))


def skip_reason(values: Mapping[str, float]) -> str:
    """Say, from a step's metrics, why its update was skipped."""
    if not values["loss_tokens"]:
        return "no valid row is left in the batch"
    causes = [f"{text} ({values[key]:.0f} tokens)" for key, text in CAUSES.items() if values[key]]
    if not causes:
        causes = ["the gradient" if not isfinite(values["grad_norm"]) else "the optimizer's step"]
    return f"not finite: {', '.join(causes)}"


def make_update(
    model: LanguageModel,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    micro_batch_size: int | None = None,
    head: str | None = None,
    head_chunk: int | None = None,
    remat: Remat = "none",
    lora: LoraConfig | None = None,
    teacher: LanguageModel | None = None,
    mesh: Mesh | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Close over what is static; the result is pure and ready to be jitted.

    With `lora`, the state holds adapters, and `base` what they are added to. `teacher` is the model
    whose head a divergence over the whole vocabulary reads.
    """

    def update(
        state: TrainState,
        batch: Batch,
        temperature: Array,
        base: Params | None = None,
        teacher_params: Params | None = None,
    ):
        lent = None if teacher is None or teacher_params is None else (teacher, teacher_params)
        grads, metrics = gradients(
            model, loss, state.params, batch, temperature,
            micro_batch_size=micro_batch_size, head=head, head_chunk=head_chunk,
            remat=remat, lora=lora, base=base, teacher=lent, mesh=mesh,
        )  # fmt: skip
        norm = optax.tree.norm(grads)
        if (each := metrics.pop("grad_square", None)) is not None:
            # Over M parts g_m: (mean |g_m|^2 - |mean g_m|^2) / |mean g_m|^2.
            parts = batch.coefficient.shape[0] // (micro_batch_size or 1)
            metrics["grad_noise"] = Mean(parts * each.total - norm**2, norm**2)
        usable = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"].total)
        counted = (batch.coefficient > 0).sum()
        usable &= counted > 0
        steps, opt_state = optimizer.update(grads, state.opt_state, state.params)
        usable &= jnp.isfinite(optax.tree.norm(steps))
        moved = (optax.apply_updates(state.params, steps), opt_state)
        kept = (state.params, state.opt_state)
        params, opt_state = jax.tree.map(lambda new, old: jnp.where(usable, new, old), moved, kept)
        state = dataclasses.replace(
            state,
            params=params,
            opt_state=opt_state,
            updates=state.updates + 1,
            skipped=state.skipped + ~usable,
        )
        one = jnp.float32(1)
        for name in metrics:
            if name == "loss" or name.startswith("nonfinite/"):
                metrics[name] = Mean(total=metrics[name].total, count=one)
        metrics["loss_tokens"] = Mean(total=counted.astype(jnp.float32), count=one)
        metrics["grad_norm"] = Mean(total=norm, count=one)
        metrics["skipped"] = Mean(total=1 - usable.astype(jnp.float32), count=one)
        return state, metrics

    return update
