"""One optimizer step over a batch, in strided micro-batches.

    loss = sum over the global batch of coefficient * weight * per-token loss

Coefficients already contain the global denominators, so that gradients of micro-batches add up. A
step without a finite gradient changes only the counters; its metrics count non-finite values.
"""

import dataclasses
from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Float

from fireopd_jax.method.batch import total_loss
from fireopd_jax.method.diagnostics import of_sampler
from fireopd_jax.method.losses.base import TokenLoss
from fireopd_jax.method.losses.support import on_support, tail_bucket
from fireopd_jax.metrics import Max, Mean, Metrics
from fireopd_jax.models.comparison import divergence_from
from fireopd_jax.models.decoder import Remat
from fireopd_jax.models.language_model import LanguageModel, Params
from fireopd_jax.models.lora import LoraConfig
from fireopd_jax.models.placement import Placement
from fireopd_jax.ops.formulas import ForwardKL, ReverseKL
from fireopd_jax.ops.head import HeadOptions, head_gather, head_stats
from fireopd_jax.sharding.mesh import micro_batches
from fireopd_jax.training.packed import packed_gradients
from fireopd_jax.training.state import TrainState
from fireopd_jax.types import Array, Batch, TokenStats


@runtime_checkable
class Update(Protocol):
    """One optimizer step over a batch."""

    def __call__(
        self,
        state: TrainState,
        batch: Batch,
        temperature: Array,
        base: Params | None = None,
        teacher_params: Params | None = None,
    ) -> tuple[TrainState, Metrics]:
        """Return the next state and the metrics of the step.

        `base` are the frozen parameters under adapters, if any; `teacher_params` are those of the
        model that the loss's exact divergence is from, if it has one (`TokenLoss.judge`).
        """
        ...


FAR = 0.2
"""|ratio - 1| above which `policy/ratio_far_fraction` counts a token: the usual clipping range."""
CAUSES = {
    "nonfinite/teacher_logprob": "the teacher's log-probs",
    "nonfinite/scored_student_logprob": "the student's log-probs when scored",
    "nonfinite/token_weight": "the token weights",
    "nonfinite/student_logprob": "the student's log-probs in the update",
}


def gradients(
    model: LanguageModel,
    loss: TokenLoss,
    params: Params,
    batch: Batch,
    temperature: Float[Array, ""] | float = 1.0,
    *,
    micro_batch_size: int | None = None,
    micro_batch_tokens: int | None = None,
    head: str | None = None,
    head_chunk: int | None = None,
    remat: Remat = "none",
    lora: LoraConfig | None = None,
    base: Params | None = None,
    teacher: tuple[LanguageModel, Params] | None = None,
    mesh: Mesh | None = None,
) -> tuple[Params, Metrics]:
    """Return the gradient of the batch's loss in float32, and metrics, summed over micro-batches.

    With `micro_batch_tokens`, rows are packed without padding, so many tokens of each device in a
    pass (`training.packed`); else a pass has `micro_batch_size` padded rows, or all.

    With `lora`, `params` are adapters and `base` the frozen parameters. `teacher`, model and
    parameters, is needed for losses with an `exact_divergence`: the model that it is from, which
    may be the base policy. `mesh` holds the devices that the rows are sharded over.
    `metrics["loss"].total` is the loss.
    """
    options = model.head_options(temperature, head, head_chunk, mesh)
    constrain = (lambda tree: tree) if mesh is None else Placement(mesh).constrain

    def run(params: Params) -> tuple[Params, Any]:
        """Return the frozen parameters and the adapters, or the parameters and None."""
        return (params, None) if base is None else (base, lora and lora.scaled(params))

    def of_states(hidden: Array, matrix: Array, part: Batch) -> tuple[Array, Metrics]:
        student = _student_stats(loss, hidden, matrix, part, options, teacher)
        total = total_loss(loss(student, part), part)
        return total, _update_metrics(total, student, part)

    if micro_batch_tokens is not None:

        def hidden_of(params: Params, *sequences: Array) -> tuple[Array, Array]:
            frozen, adapters = run(params)
            return model.hidden(frozen, *sequences, adapters=adapters, remat=remat, mesh=mesh)

        return packed_gradients(
            hidden_of,
            of_states,
            params,
            batch,
            micro_batch_tokens,
            groups=1 if mesh is None else mesh.size,
            whole_rows=loss.whole_rows,
            constrain=constrain,
        )

    def loss_of(params: Params, part: Batch) -> tuple[Array, Metrics]:
        rollout, (frozen, adapters) = part.rollout, run(params)
        hidden, matrix = model.response_hidden(
            frozen,
            rollout.prompts.tokens,
            rollout.prompts.length,
            rollout.tokens,
            rollout.mask,
            adapters=adapters,
            remat=remat,
            mesh=mesh,
        )
        return of_states(hidden, matrix, part)

    return _padded_gradients(loss_of, params, batch, micro_batch_size, constrain)


def _padded_gradients(
    loss_of: Callable[[Params, Batch], tuple[Array, Metrics]],
    params: Params,
    batch: Batch,
    micro_batch_size: int | None,
    constrain: Callable[[Params], Params],
) -> tuple[Params, Metrics]:
    """Return the gradient in float32, and the metrics, summed over micro-batches of whole rows."""
    differentiate = jax.grad(loss_of, has_aux=True)

    def add(sums: Params, part: Batch) -> tuple[Params, Metrics]:
        grads, metrics = differentiate(params, part)
        wide = optax.tree.cast(grads, jnp.float32)
        metrics["grad_square"] = Mean(optax.tree.norm(wide, squared=True), jnp.float32(1))
        return constrain(jax.tree.map(jnp.add, sums, wide)), metrics

    rows = batch.coefficient.shape[0]
    if micro_batch_size in (None, rows):
        grads, metrics = differentiate(params, batch)
        return constrain(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), grads)), metrics
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
    grads, metrics = jax.lax.scan(
        add, constrain(zeros), micro_batches(batch, rows // micro_batch_size)
    )
    return grads, {name: metric.fold() for name, metric in metrics.items()}


def _student_stats(
    loss: TokenLoss,
    hidden: Array,
    head: Array,
    part: Batch,
    options: HeadOptions,
    teacher: tuple[LanguageModel, Params] | None,
) -> TokenStats:
    """Return the student's statistics that the loss and the metrics use."""
    support, tokens = part.scores.support, part.rollout.tokens
    if support is None:
        stats = head_stats(hidden, head, tokens, **options)
        few = None
    else:
        stats = head_gather(hidden, head, tokens, support.ids, **options)
        few = stats.support_logprob
    exact, value = loss.exact_divergence, None
    if exact is not None:
        of_judge = loss.judge([part.scores.teacher_hidden], part.scores.base_hidden)
        if teacher is None or of_judge is None:
            raise ValueError(
                f"a divergence over the whole vocabulary needs the {exact.judge}'s hidden states"
            )
        value = divergence_from(teacher, of_judge, exact.divergence, hidden, head, options)
    return TokenStats(stats.logprob, stats.entropy, few, value)


def _update_metrics(total: Array, student: TokenStats, part: Batch) -> Metrics:
    counted = part.coefficient > 0
    gap = student.logprob - part.scores.student.logprob

    def bad(x: Array) -> Mean:
        return _sum((counted & ~jnp.isfinite(x)).sum().astype(jnp.float32))

    teacher = part.scores.teacher
    of_teacher = {} if teacher is None else {"nonfinite/teacher_logprob": bad(teacher.logprob)}
    return {
        "loss": _sum(total),
        "policy/log_ratio_max": Max.of(jnp.abs(gap), counted),
        "policy/ratio_far_fraction": Mean.of(jnp.abs(jnp.expm1(gap)) > FAR, counted),
        "entropy": Mean.of(student.entropy, counted),
        **of_support(student, part, counted),
        **of_chunks(student, part, counted),
        **({} if part.rollout.policy is None else of_sampler(student, part.rollout)),
        "nonfinite/student_logprob": bad(student.logprob),
        "nonfinite/scored_student_logprob": bad(part.scores.student.logprob),
        **of_teacher,
        "nonfinite/token_weight": bad(part.weight),
    }


def of_support(student: TokenStats, part: Batch, counted: Array) -> Metrics:
    """Return the metrics of student against teacher on the support and one bucket for the rest.

    A falling `policy/support_mass` moves to tokens outside the support. The divergences are lower
    bounds of those over the whole vocabulary.
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


def of_chunks(student: TokenStats, part: Batch, counted: Array) -> Metrics:
    """Return the loss on audited tokens, and KL(base || student) on the others; {} without audit.

    The first is -pi-hat log pi per audited token, without a baseline, as in the paper's curves.
    """
    chunks = part.scores.chunks
    if chunks is None or student.divergence is None:
        return {}
    audited = jnp.asarray(chunks.audited)
    return {
        "audit/loss": Mean.of(-chunks.target * student.logprob, counted & audited),
        "audit/base_kl": Mean.of(student.divergence, counted & ~audited),
    }


def _sum(total: Array) -> Mean:
    """Return a sum over micro-batches with count 0; `_of_step` sets the count to 1."""
    return Mean(total=total, count=jnp.float32(0))


def skip_reason(values: Mapping[str, float]) -> str:
    """Return the reason of a skipped update, from the step's metrics."""
    if not values["loss_tokens"]:
        return "no token is left to train on"
    causes = [
        f"{text} ({values[key]:.0f} tokens)" for key, text in CAUSES.items() if values.get(key)
    ]
    if not causes:
        causes = ["the gradient" if not isfinite(values["grad_norm"]) else "the optimizer's step"]
    return f"not finite: {', '.join(causes)}"


def make_update(
    model: LanguageModel,
    loss: TokenLoss,
    optimizer: optax.GradientTransformation,
    *,
    micro_batch_size: int | None = None,
    micro_batch_tokens: int | None = None,
    head: str | None = None,
    head_chunk: int | None = None,
    remat: Remat = "none",
    lora: LoraConfig | None = None,
    teacher: LanguageModel | None = None,
    mesh: Mesh | None = None,
    decay: float | None = None,
) -> Update:
    """Return one optimizer step as a pure function, to be jitted.

    With `lora`, the state holds adapters, and `base` the frozen parameters. `teacher` is the model
    that the loss's exact divergence is from, if it has one; `mesh` holds the devices that the rows
    are sharded over; `decay` is that of the moving average of the parameters, if the state has one.
    """

    def update(
        state: TrainState,
        batch: Batch,
        temperature: Array,
        base: Params | None = None,
        teacher_params: Params | None = None,
    ):
        judge = None if teacher is None or teacher_params is None else (teacher, teacher_params)
        grads, metrics = gradients(
            model, loss, state.params, batch, temperature,
            micro_batch_size=micro_batch_size, micro_batch_tokens=micro_batch_tokens, head=head,
            head_chunk=head_chunk, remat=remat, lora=lora, base=base, teacher=judge, mesh=mesh,
        )  # fmt: skip
        norm = optax.tree.norm(grads)
        if (each := metrics.pop("grad_square", None)) is not None:
            # Over M parts g_m: (mean |g_m|^2 - |mean g_m|^2) / |mean g_m|^2.
            metrics["grad_noise"] = Mean(each.count * each.total - norm**2, norm**2)
        usable = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"].total)
        counted = (batch.coefficient > 0).sum()
        usable &= counted > 0
        steps, opt_state = optimizer.update(grads, state.opt_state, state.params)
        usable &= jnp.isfinite(optax.tree.norm(steps))
        moved = (optax.apply_updates(state.params, steps), opt_state)
        kept = (state.params, state.opt_state)
        params, opt_state = jax.tree.map(lambda new, old: jnp.where(usable, new, old), moved, kept)
        average = state.average
        if decay is not None and average is not None:
            later = optax.incremental_update(params, average, 1 - decay)
            average = jax.tree.map(lambda new, old: jnp.where(usable, new, old), later, average)
        state = dataclasses.replace(
            state,
            params=params,
            average=average,
            opt_state=opt_state,
            updates=state.updates + 1,
            skipped=state.skipped + ~usable,
        )
        return state, _of_step(metrics, counted, norm, usable)

    return update


def _of_step(metrics: Metrics, counted: Array, norm: Array, usable: Array) -> Metrics:
    """Return the metrics of a whole step; sums over its micro-batches get count 1."""
    one = jnp.float32(1)
    for name in metrics:
        if name == "loss" or name.startswith("nonfinite/"):
            metrics[name] = Mean(total=metrics[name].total, count=one)
    return metrics | {
        "loss_tokens": Mean(total=counted.astype(jnp.float32), count=one),
        "grad_norm": Mean(total=norm, count=one),
        "skipped": Mean(total=1 - usable.astype(jnp.float32), count=one),
    }
