"""FiRe-OPD's filter and token weights in one call, for use in another training loop.

log-probabilities and entropies of the whole rollout batch -> weight f32[B, T], keep bool[B]
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32, Int32

from fireopd_jax.method.filtering import TeacherQuantile
from fireopd_jax.method.reweighting import ConfidenceConfusion, Scope
from fireopd_jax.types import Array, Scores, StageContext, TokenStats


def fire_weights(
    teacher_logprob: Float[Array, "B T"],
    teacher_entropy: Float[Array, "B T"],
    student_entropy: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    drop_fraction: float = 0.2,
    alpha: float = 1.0,
    beta: float = 1.0,
    filter_scope: Literal["batch", "teacher"] = "batch",
    max_scope: Scope = "batch",
    teacher: Int32[Array, " B"] | None = None,
    num_teachers: int | None = None,
    vocab_size: int | None = None,
) -> tuple[Float32[Array, "B T"], Bool[Array, " B"]]:
    """Return the token weights w~, f32[B, T], and the keep mask of the trajectories, bool[B].

    The arrays must hold the global batch, never a micro-batch. Use both results: dropped rows have
    weights, too. With several teachers give `teacher`, the index of each row's teacher, and
    `num_teachers`; `max_scope="vocabulary"` needs `vocab_size`.

    Raises ValueError when only one of `teacher` and `num_teachers` is given, or `vocab_size` is
    missing.

    References: arXiv 2606.02684, Eq. 4-8.
    """
    logprob, of_teacher, of_student = (
        jnp.asarray(value, jnp.float32)
        for value in (teacher_logprob, teacher_entropy, student_entropy)
    )
    if (teacher is None) != (num_teachers is None):
        raise ValueError("teacher and num_teachers go together: give both, or neither")
    if teacher is None or num_teachers is None:
        teacher, num_teachers = jnp.zeros(mask.shape[0], jnp.int32), 1
    # Neither stage uses the student's log-probability.
    scores = Scores(
        student=TokenStats(logprob=jnp.zeros_like(logprob), entropy=of_student),
        teacher=TokenStats(logprob=logprob, entropy=of_teacher),
    )
    context = StageContext(mask, teacher, num_teachers, vocab_size)
    keep, _ = TeacherQuantile(drop_fraction=drop_fraction, scope=filter_scope)(scores, context)
    reweight = ConfidenceConfusion(alpha=alpha, beta=beta, max_scope=max_scope)
    return reweight.weight(scores, context, keep), keep
