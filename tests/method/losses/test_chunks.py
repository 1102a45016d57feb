"""The chunk loss through the real update: its gradient rows, and what leaves them as they are."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireopd_jax.method.batch import assemble
from fireopd_jax.method.filtering import KeepAll
from fireopd_jax.method.losses.chunks import ChunkPolicyGradient
from fireopd_jax.method.reweighting import Uniform
from fireopd_jax.method.scoring import ChunkAgreement, Resident, ScoreInputs
from fireopd_jax.models.language_model import LanguageModel
from fireopd_jax.training.update import gradients
from fireopd_jax.types import Audit, Prompts
from fireopd_jax.verify import reference
from fireopd_jax.verify import reference_stages as oracle
from fireopd_jax.verify.cases import audit_arrays
from tests import cases

V, ROWS, ROOM, ALPHA = 13, 4, 9, 1.0
LENGTH = np.array([9, 6, 0, 4])
MASK = np.arange(ROOM)[None] < LENGTH[:, None]
GROUP = np.array([0, 0, 1, 1], np.int32)


@dataclasses.dataclass(frozen=True)
class Table(LanguageModel):
    """A model whose parameters are its logits, one table per row: the gradient is that to them."""

    def bind(self, params):
        """Return an object with the identity as its head."""
        return types.SimpleNamespace(head=jnp.eye(V, dtype=params["z"].dtype))

    def response_hidden(
        self, params, prompt, length, tokens, mask, *, adapters=None, remat=None, mesh=None
    ):
        """Return the logits of the rows that the prompts name."""
        table = params["z"]
        return table[prompt[:, 0]], jnp.eye(V, dtype=table.dtype)


MODEL = Table(cases.tiny_model(V).config, V)


def logits(seed, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(ROWS, ROOM, V)) * 1.5, dtype)


def make_rollout(audit):
    rng = np.random.default_rng(3)
    rows = np.arange(ROWS, dtype=np.int32)
    ones = np.ones(ROWS, np.int32)
    prompts = Prompts(rows[:, None], ones, rows[:, None], ones, 0 * rows, rows, rows, GROUP)
    tokens = rng.integers(0, V, MASK.shape).astype(np.int32)
    return dataclasses.replace(cases.make_rollout(MASK), prompts=prompts, tokens=tokens,
                               audit=audit)  # fmt: skip


def make_audit(empty=False):
    anchor = np.array([[1, 6], [2, -1], [-1, -1], [0, -1]], np.int32)
    if empty:
        anchor = np.full_like(anchor, -1)
    real = anchor >= 0
    samples = np.where(real, 10, 0).astype(np.float32)
    agreement = np.array([[9, 0], [4.5, 0], [0, 0], [2, 0]], np.float32) * real
    return Audit(anchor, np.where(real, 3, 0).astype(np.int32), agreement, samples)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(loss, micro_batch_size, student, base, rollout, keep=None):
    """Return gradient, metrics and batch: scored, assembled and differentiated by the package."""
    score = ChunkAgreement(alpha=ALPHA)
    student, base = {"z": student}, {"z": base}
    own, anchor = Resident(MODEL, student), Resident(MODEL, base)
    scores = score(ScoreInputs(rollout, own, [], 1.0, None, anchor))
    batch = assemble(rollout, scores, KeepAll(), Uniform(), "token").batch
    if keep is not None:
        batch = dataclasses.replace(batch, coefficient=batch.coefficient * keep[:, None])
    grads, metrics = gradients(
        MODEL, loss, student, batch, micro_batch_size=micro_batch_size, teacher=(MODEL, base)
    )
    return grads["z"], metrics, batch


def rows_of_the_gradient(loss, student, base, rollout):
    """The spec's rows: target (p - onehot) where audited, beta (p - p_base) elsewhere."""
    z, z_base = (np.asarray(x, np.float64) for x in (student, base))
    p, p_base = (np.exp(z - np.logaddexp.reduce(z, axis=-1, keepdims=True)) for z in (z, z_base))
    logprob = np.log(np.take_along_axis(p, rollout.tokens[..., None], axis=-1)[..., 0])
    found = oracle.chunk_targets(logprob, audit_arrays(rollout.audit), GROUP, ALPHA)
    audited, target, _, baseline = found
    reward = target - (baseline[:, None] if loss.baseline == "leave_one_out" else 0)
    of_chunks = reward[..., None] * (p - np.eye(V)[rollout.tokens])
    rows = np.where(audited[..., None], of_chunks, loss.beta * (p - p_base))
    kl = (p_base * np.log(p_base / p)).sum(axis=-1)
    value = np.where(audited, -reward * logprob, loss.beta * kl)
    count = MASK.sum()
    return rows * MASK[..., None] / count, (value * MASK).sum() / count, (audited, kl)


@pytest.mark.parametrize("micro_batch_size", [None, 1, 2])
@pytest.mark.parametrize("loss", [
    ChunkPolicyGradient(),
    ChunkPolicyGradient(beta=0.7),
    ChunkPolicyGradient(baseline="leave_one_out"),
], ids=str)  # fmt: skip
def test_gradient_rows_are_those_of_the_paper_under_any_split(loss, micro_batch_size):
    student, base, rollout = logits(0), logits(1), make_rollout(make_audit())
    grads, metrics, _ = run(loss, micro_batch_size, student, base, rollout)
    exact, value, (audited, kl) = rows_of_the_gradient(loss, student, base, rollout)
    np.testing.assert_allclose(np.asarray(grads), exact, atol=2e-8)
    assert float(metrics["loss"].total) == pytest.approx(value, rel=1e-5)
    assert np.abs(exact[audited]).max() > 1e-3 and not np.asarray(grads)[~MASK].any()
    unaudited = MASK & ~audited
    assert float(metrics["audit/base_kl"].result()) == pytest.approx(kl[unaudited].mean(), rel=1e-5)


def test_bfloat16_gradients_are_those_of_the_rounded_logits():
    student, base = logits(0, jnp.bfloat16), logits(1, jnp.bfloat16)
    rollout, loss = make_rollout(make_audit()), ChunkPolicyGradient()
    grads, _, _ = run(loss, None, student, base, rollout)
    exact, _, _ = rows_of_the_gradient(
        loss, *(np.asarray(z, np.float32) for z in (student, base)), rollout
    )
    assert grads.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(grads), exact, atol=2e-2 * np.abs(exact).max())


def test_without_an_audit_the_loss_is_the_anchor_alone():
    student, base, rollout = logits(0), logits(1), make_rollout(make_audit(empty=True))
    loss = ChunkPolicyGradient(beta=0.3)
    grads, metrics, _ = run(loss, None, student, base, rollout)
    pairs = zip(np.asarray(student)[MASK], np.asarray(base)[MASK], strict=True)
    terms = [reference.forward_kl(z, z_base) for z, z_base in pairs]
    assert float(metrics["loss"].total) == pytest.approx(0.3 * np.mean([v for v, _ in terms]))
    exact = 0.3 * np.stack([slope for _, slope in terms]) / MASK.sum()
    np.testing.assert_allclose(np.asarray(grads)[MASK], exact, atol=2e-8)
    grads, metrics, _ = run(loss, None, base, base, rollout)
    assert abs(float(metrics["loss"].total)) < 1e-6 and np.abs(np.asarray(grads)).max() < 1e-7
    assert np.isnan(float(metrics["audit/loss"].result()))


def test_the_baseline_is_the_mean_target_of_the_other_responses():
    """Rows 0 and 1 share a prompt; row 3 shares its own with an empty row, and has no baseline."""
    student, base, rollout = logits(0), logits(1), make_rollout(make_audit())
    loss = ChunkPolicyGradient(baseline="leave_one_out")
    _, _, batch = run(loss, None, student, base, rollout)
    target = np.asarray(batch.scores.chunks.target)
    baseline = np.asarray(batch.scores.chunks.baseline)
    assert baseline[0] == pytest.approx(target[1, 2], rel=1e-6)
    assert baseline[1] == pytest.approx((target[0, 1] + target[0, 6]) / 2, rel=1e-6)
    assert baseline[2] == pytest.approx(target[3, 0]) and baseline[3] == 0


def test_a_dropped_row_gives_nothing_even_where_it_is_not_finite():
    student, base, rollout = logits(0), logits(1), make_rollout(make_audit())
    loss, keep = ChunkPolicyGradient(), jnp.array([1.0, 0.0, 1.0, 1.0])
    clean, _, _ = run(loss, None, student, base, rollout, keep)
    broken = student.at[1].set(jnp.nan)
    grads, metrics, _ = run(loss, None, broken, base, rollout, keep)
    np.testing.assert_array_equal(np.asarray(grads), np.asarray(clean))
    assert not np.asarray(clean)[1].any() and np.isfinite(float(metrics["loss"].total))
    grads, metrics, _ = run(loss, None, student, base, rollout, 0 * keep)
    assert not np.asarray(grads).any() and float(metrics["loss"].total) == 0


def test_padding_changes_nothing():
    student, base, rollout = logits(0), logits(1), make_rollout(make_audit())
    grads, metrics, _ = run(ChunkPolicyGradient(), None, student, base, rollout)
    more = ((0, 0), (0, 3))
    wide = dataclasses.replace(
        rollout,
        **{name: np.pad(getattr(rollout, name), more)
           for name in ("tokens", "mask", "logprob", "model_logprob", "version", "writer")},
    )  # fmt: skip
    filled = [jnp.pad(z, (*more, (0, 0)), constant_values=7.0) for z in (student, base)]
    padded, same, _ = run(ChunkPolicyGradient(), None, *filled, wide)
    np.testing.assert_allclose(np.asarray(padded)[:, :ROOM], np.asarray(grads), atol=1e-9)
    assert not np.asarray(padded)[:, ROOM:].any()
    assert float(same["loss"].total) == pytest.approx(float(metrics["loss"].total), rel=1e-6)


def test_what_is_missing_is_named():
    student, rollout = logits(0), make_rollout(None)
    with pytest.raises(ValueError, match=r"Rollout\.audit"):
        run(ChunkPolicyGradient(), None, student, student, rollout)
    scores = cases.random_case(0)[0]
    mask = cases.random_case(0)[1]
    batch, _ = cases.assembled(cases.make_rollout(mask), scores, KeepAll(), Uniform())
    with pytest.raises(ValueError, match="chunk_agreement"):
        ChunkPolicyGradient()(scores.student, batch)
