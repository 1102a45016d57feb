"""Small rollouts and scores for the tests of the method's stages."""

import jax.numpy as jnp
import numpy as np

from fireopd_jax.types import Prompts, Rollout, Scores, TokenStats


def make_rollout(mask, teacher=None, logprob=None):
    """Return a rollout with this mask; its tokens and prompts mean nothing."""
    mask = np.asarray(mask)
    rows = np.arange(len(mask), dtype=np.int32)
    ones = np.ones((len(mask), 1), np.int32)
    teacher = np.zeros_like(rows) if teacher is None else np.asarray(teacher, np.int32)
    prompts = Prompts(ones, ones[:, 0], ones, ones[:, 0], teacher, rows, rows, rows)
    drawn = jnp.zeros(mask.shape) if logprob is None else jnp.asarray(logprob, jnp.float32)
    return Rollout(
        prompts=prompts,
        tokens=np.zeros(mask.shape, np.int32),
        mask=jnp.asarray(mask),
        logprob=drawn,
        model_logprob=drawn,
        finished=np.ones(len(mask), bool),
        version=np.zeros(mask.shape, np.int32),
    )


def make_scores(student_logprob, teacher_logprob, student_entropy, teacher_entropy):
    """Return the scores of a student and a teacher, in float32."""
    arrays = (student_logprob, student_entropy, teacher_logprob, teacher_entropy)
    student, of_student, teacher, of_teacher = (jnp.asarray(x, jnp.float32) for x in arrays)
    return Scores(TokenStats(student, of_student), TokenStats(teacher, of_teacher))


def random_case(seed, rows=7, tokens=6, num_teachers=2):
    """Return (scores, mask, teacher); row 1 is empty, values behind the mask are junk."""
    rng = np.random.default_rng(seed)
    length = rng.integers(1, tokens + 1, rows)
    length[0] = tokens
    if rows > 1:
        length[1] = 0
    mask = np.arange(tokens)[None, :] < length[:, None]
    junk = np.where(mask, 0, np.nan)
    shape = (rows, tokens)
    scores = make_scores(
        -rng.exponential(1.0, shape) + junk,
        -rng.exponential(1.0, shape) + junk,
        rng.exponential(1.0, shape) + junk,
        rng.exponential(1.0, shape) + junk,
    )
    return scores, mask, rng.integers(0, num_teachers, rows).astype(np.int32)
