"""A world in which a wrong first step cannot be repaired: distilling rollouts against rewrites.

After a wrong prefix the teacher's next token is a mixture of going on and of beginning a correction
(arXiv 2606.08432). On the student's own responses (OPD) it proposes that beginning again at each
deeper wrong prefix, because the response goes on without it: targets and contexts do not join into
a correction. On a response that the teacher rewrote (TRD), each target is the context of the next.

Vocabulary: RIGHT steps solve the problem, WRONG ones do not, ONSET is "wait", OTHER the rest. The
student tells prefixes apart by their position and by whether a step was wrong: it is a table of
logits. Of a prefix with an onset in it, which no rollout of the start has, it knows no more.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireopd_jax.method.batch import total_loss
from fireopd_jax.method.filtering import KeepAll
from fireopd_jax.method.losses.vocabulary import VocabularyDivergence
from fireopd_jax.method.reweighting import Uniform
from fireopd_jax.ops.divergence import head_divergence
from fireopd_jax.ops.formulas import ForwardKL, ReverseKL
from fireopd_jax.types import Scores, TokenStats
from tests import cases

RIGHT, WRONG, ONSET, OTHER = range(4)
STEPS, ROWS = 6, 16
EYE = jnp.eye(4)
LOSS = VocabularyDivergence(divergence=ForwardKL())


def start():
    """Return the student's logits [position, 2 (right or wrong so far), V] before training.

    It begins with a wrong step almost always, and never says an onset.
    """
    p = np.empty((STEPS, 2, 4))
    p[:, 0], p[:, 1] = [0.3, 0.6, 1e-4, 0.1], [0.01, 0.95, 1e-4, 0.04]
    p[0] = [0.004, 0.99, 1e-4, 0.006]
    return jnp.asarray(np.log(p / p.sum(axis=-1, keepdims=True)), jnp.float32)


def teacher(prefix, refining):
    """Return the teacher's next-token distribution.

    Unasked, it makes the student's mistake, too, and notices afterwards. Asked to rewrite a
    response that it has before it, it knows the mistake.
    """
    if refining:
        return np.array([0.985, 0.005, 0.005, 0.005])
    if not prefix:
        return np.array([0.05, 0.94, 0.005, 0.005])
    if WRONG in prefix:
        return np.array([0.01, 0.38, 0.6, 0.01])
    return np.array([0.95, 0.03, 0.01, 0.01])


def wrong_before(tokens):
    """Return, [B, T], whether a step before the position was wrong."""
    seen = np.cumsum(tokens == WRONG, axis=1) > 0
    return np.pad(seen, ((0, 0), (1, 0)))[:, :-1].astype(np.int32)


def roll_out(next_token, rng):
    """Return responses [ROWS, STEPS] sampled from `next_token(prefix)`, a distribution."""
    rows = np.empty((ROWS, STEPS), np.int32)
    for row in rows:
        for t in range(STEPS):
            row[t] = rng.choice(4, p=next_token(row[:t].tolist()))
    return rows


def of_student(table):
    """Return the student's next-token distribution as a function of a prefix."""
    p = np.asarray(jax.nn.softmax(table, axis=-1), np.float64)
    return lambda prefix: p[len(prefix), int(WRONG in prefix)] / p[len(prefix), 0].sum()


def batch_of(tokens, refining):
    """Return a batch of responses, and the teacher's logits at each of their tokens, [B, T, V]."""
    q = [[teacher(row[:t].tolist(), refining) for t in range(STEPS)] for row in tokens]
    mask = np.ones(tokens.shape, bool)
    rollout = dataclasses.replace(cases.make_rollout(mask), tokens=jnp.asarray(tokens))
    zero = TokenStats(jnp.zeros(mask.shape), jnp.zeros(mask.shape))
    batch, _ = cases.assembled(rollout, Scores(zero, None), KeepAll(), Uniform(), "token")
    return batch, jnp.asarray(np.log(q), jnp.float32)


def objective(z, batch, of_teacher, loss):
    """Return the batch's loss for the student's logits `z`, [B, T, V]."""
    value = head_divergence(loss.exact_divergence.divergence, z, EYE, of_teacher, EYE)
    none = jnp.zeros(value.shape)
    return total_loss(loss(TokenStats(none, none, divergence=value), batch), batch)


def trained(table, tokens, refining, loss=LOSS, updates=400):
    """Return the student's table after gradient descent on the responses."""
    batch, of_teacher = batch_of(tokens, refining)
    position, wrong = np.arange(STEPS), wrong_before(tokens)

    def gradient(table):
        return jax.grad(lambda x: objective(x[position, wrong], batch, of_teacher, loss))(table)

    descend = jax.jit(
        lambda x: jax.lax.fori_loop(0, updates, lambda _, x: x - 5.0 * gradient(x), x)
    )
    return descend(table)


def greedy(table):
    """Return the student's most probable response."""
    distribution, tokens = of_student(table), []
    for _ in range(STEPS):
        tokens.append(int(np.argmax(distribution(tokens))))
    return tokens


def chance_to_solve(table):
    """Return the probability of RIGHT at every step."""
    distribution = of_student(table)
    return float(np.prod([distribution([RIGHT] * t)[RIGHT] for t in range(STEPS)]))


@functools.cache
def responses():
    """Return the student's rollouts, and the teacher's rewrites of them."""
    rng = np.random.default_rng(0)
    return roll_out(of_student(start()), rng), roll_out(lambda p: teacher(p, True), rng)


def pulls(tokens, refining):
    """Return -dL/dz at each token, times the number of tokens, and q - p there: [B, T, V]."""
    batch, of_teacher = batch_of(tokens, refining)
    z = start()[np.arange(STEPS), wrong_before(tokens)]
    gradient = jax.jit(jax.grad(objective), static_argnums=3)(z, batch, of_teacher, LOSS)
    exact = jax.nn.softmax(of_teacher, axis=-1) - jax.nn.softmax(z, axis=-1)
    return -np.asarray(gradient) * tokens.size, np.asarray(exact)


def test_the_rollouts_are_wrong_from_the_first_step_and_have_no_onset():
    rollouts, rewrites = responses()
    assert (rollouts[:, 0] == WRONG).mean() > 0.9 and not (rollouts == ONSET).any()
    assert (rewrites == RIGHT).all(axis=1).mean() > 0.8


def test_on_its_rollouts_the_student_is_pulled_to_the_onset_at_each_deeper_wrong_prefix():
    rollouts, _ = responses()
    pull, exact = pulls(rollouts, refining=False)
    np.testing.assert_allclose(pull, exact, atol=1e-5)
    deep = wrong_before(rollouts) == 1
    assert deep.sum() > ROWS * (STEPS - 2)
    assert (pull.argmax(axis=-1)[deep] == ONSET).all()
    # No pair of a target and the next context shares a token: the onset is never what follows.
    joined = pull.argmax(axis=-1)[:, :-1] == rollouts[:, 1:]
    assert not joined[deep[:, :-1]].any() and (rollouts[deep] != ONSET).all()


def test_on_the_rewrites_every_target_is_the_next_context():
    _, rewrites = responses()
    pull, exact = pulls(rewrites, refining=True)
    np.testing.assert_allclose(pull, exact, atol=1e-5)
    path = (rewrites == RIGHT).all(axis=1)
    np.testing.assert_array_equal(pull.argmax(axis=-1)[path], rewrites[path])
    assert np.abs(pull[..., ONSET]).max() < 0.01


ENDS = {
    "forward_kl": (ForwardKL(), [WRONG] + [ONSET] * (STEPS - 1)),
    # Its gradient p (rho - KL) is that small where p is: the student goes on as before.
    "reverse_kl": (ReverseKL(), [WRONG] * STEPS),
}


@pytest.mark.parametrize("name", ENDS)
def test_after_training_opd_does_not_solve_and_trd_does(name):
    rollouts, rewrites = responses()
    assert chance_to_solve(start()) < 1e-4 and greedy(start()) == [WRONG] * STEPS
    divergence, expected = ENDS[name]
    loss = VocabularyDivergence(divergence=divergence)
    opd = trained(start(), rollouts, refining=False, loss=loss)
    assert greedy(opd) == expected
    assert chance_to_solve(opd) < 0.01
    trd = trained(start(), rewrites, refining=True)
    assert greedy(trd) == [RIGHT] * STEPS
    assert chance_to_solve(trd) > 0.85
