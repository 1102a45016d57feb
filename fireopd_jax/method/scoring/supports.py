"""Supports and overlaps from the top-K sets of student and teacher.

token ids and log-probabilities of both models, K each -> Support, Overlap
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Bool, Float32, Int32

from fireopd_jax.types import Array, Overlap, Support

Kind = Literal["teacher", "student", "union", "intersection"]
Ids = Int32[Array, "B T K"]
List = tuple[Ids, Float32[Array, "B T K"]]


def make_support(
    kind: Kind,
    student: List,
    teacher: List | None,
    teacher_at_student: Float32[Array, "B T K"] | None,
    *,
    sampled: tuple[Int32[Array, "B T"], Float32[Array, "B T"]] | None = None,
    size: int,
) -> Support:
    """Return the support: K slots, 2 K for a union, one more for the sampled token; -1 if empty.

    `teacher_at_student` are the teacher's log-probabilities at the student's top-K ids, required
    for "student" and "union". Token ids from `size` on are outside the student's vocabulary and
    are left out.

    Raises ValueError where `teacher_at_student` or, for another kind than "student", `teacher` is
    missing.
    """
    own, _ = student
    if teacher is None:
        if kind != "student":
            raise ValueError(f"support {kind!r} needs the teacher's top-K")
        teacher = own[..., :0], jnp.zeros((*own.shape[:-1], 0), jnp.float32)
    theirs, of_theirs = teacher
    if kind == "teacher":
        ids, logprob = theirs, of_theirs
    elif kind == "intersection":
        common = _is_in(own, theirs)
        same = jnp.asarray(own)[..., :, None] == jnp.asarray(theirs)[..., None, :]
        at_own = jnp.where(same, jnp.asarray(of_theirs)[..., None, :], 0.0).sum(axis=-1)
        ids, logprob = jnp.where(common, own, -1), at_own
    else:
        if teacher_at_student is None:
            raise ValueError(
                f"support {kind!r} needs the teacher's log-probabilities at the student's top-K"
            )
        ids, logprob = own, teacher_at_student
        if kind == "union":
            new = jnp.where(_is_in(theirs, own), -1, theirs)
            ids = jnp.concatenate([ids, new], axis=-1)
            logprob = jnp.concatenate([logprob, of_theirs], axis=-1)
    ids = jnp.where(jnp.asarray(ids) < size, ids, -1)
    if sampled is not None:
        token, of_token = (jnp.asarray(each)[..., None] for each in sampled)
        token = jnp.where(_is_in(token, ids), -1, token)
        ids = jnp.concatenate([ids, token], axis=-1)
        logprob = jnp.concatenate([logprob, of_token], axis=-1)
    return Support(ids, jnp.where(ids >= 0, logprob, -jnp.inf))


def overlap(student: List, teacher: List) -> Overlap:
    """Return the overlap of the two top-K sets at each position.

    References: arXiv 2604.13016, Eq. 6, 7, 9 and 10.
    """
    (own, of_own), (theirs, of_theirs) = student, teacher
    in_own, in_theirs = _is_in(own, theirs), _is_in(theirs, own)
    student_mass = jnp.where(in_own, jnp.exp(of_own), 0.0).sum(axis=-1)
    teacher_mass = jnp.where(in_theirs, jnp.exp(of_theirs), 0.0).sum(axis=-1)
    same = jnp.asarray(own)[..., :, None] == jnp.asarray(theirs)[..., None, :]
    at_own = jnp.where(same, jnp.asarray(of_theirs)[..., None, :], 0.0).sum(axis=-1)
    log_p = jnp.where(in_own, of_own, 0.0) - _log(student_mass)[..., None]
    log_q = at_own - _log(teacher_mass)[..., None]
    advantage = jnp.where(in_own, jnp.exp(log_p) * (log_q - log_p), 0.0).sum(axis=-1)
    count = in_own.sum(axis=-1)
    return Overlap(
        ratio=count / own.shape[-1],
        student_mass=student_mass,
        teacher_mass=teacher_mass,
        advantage=advantage / jnp.maximum(count, 1),
    )


def _is_in(ids: Int32[Array, "B T N"], others: Ids) -> Bool[Array, "B T N"]:
    """Return which of the ids occur among the others; False in empty slots."""
    ids = jnp.asarray(ids)
    same = ids[..., :, None] == jnp.asarray(others)[..., None, :]
    return same.any(axis=-1) & (ids >= 0)


def _log(mass: Array) -> Array:
    return jnp.log(jnp.where(mass > 0, mass, 1.0))
