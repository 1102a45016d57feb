"""Compare heads, supports, filters, weights and coefficients with the NumPy reference."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fireopd_jax.method.batch import coefficients
from fireopd_jax.method.chunks import make_chunks, select
from fireopd_jax.method.filtering import (
    AllOf,
    GapBound,
    HardTokens,
    KeepAll,
    LeastLikely,
    LengthDrop,
    Prefix,
    RandomDrop,
    Reopold,
    RepetitionGuard,
    SpecialTokens,
    TeacherQuantile,
    Tip,
)
from fireopd_jax.method.reweighting import (
    ConfidenceConfusion,
    Progressive,
    SoftTrajectories,
    Uniform,
)
from fireopd_jax.method.scoring.supports import Kind
from fireopd_jax.ops.head import HeadOptions, head_gather, head_topk
from fireopd_jax.types import Array, Audit, Margin, Scores, StageContext, TokenStats
from fireopd_jax.verify import cases, expected, reference_batch, reference_stages
from fireopd_jax.verify.cases import HEAD, SCALE, K, States
from fireopd_jax.verify.objectives import describe
from fireopd_jax.verify.pool import compiled, in_parallel
from fireopd_jax.verify.table import Row, differing, relative

BOUND = 1e-5
"""Relative to the largest value; float32 rounds at 6e-8, long sums worse."""

TEACHERS = 2
FILTERS = (
    (KeepAll(), 0.0),
    (TeacherQuantile(drop_fraction=0.4), 0.0),
    (TeacherQuantile(drop_fraction=0.4, scope="teacher"), 0.0),
    (TeacherQuantile(drop_fraction=0.4, score="student_relative"), 0.0),
    (Reopold(), 0.0),
    (Reopold(), 0.75),
    (TeacherQuantile(drop_fraction=0.4, window=2), 0.0),
    (RandomDrop(drop_fraction=0.4), 0.0),
    (LengthDrop(drop_fraction=0.4), 0.0),
    (LengthDrop(drop_fraction=0.4, drop="shortest"), 0.0),
    (Tip(), 0.0),
    (HardTokens(beta=2.0), 0.0),
    (LeastLikely(keep_fraction=0.4), 0.0),
    (Prefix(window=3, least=-0.5), 0.0),
    (RepetitionGuard(ngram=2, limit=0.2), 0.0),
    (SpecialTokens(log_ratio=2.0, least=3), 0.0),
    (GapBound(largest=1.0), 0.0),
    (AllOf(filters=(Prefix(window=3, least=-1.0), TeacherQuantile(drop_fraction=0.3))), 0.0),
)
"""Filters, each with the progress of the run: the fraction of its updates that are done."""
WEIGHTS = (
    Uniform(),
    ConfidenceConfusion(),
    ConfidenceConfusion(alpha=2.0, beta=0.5, max_scope="kept"),
    ConfidenceConfusion(max_scope="teacher"),
    ConfidenceConfusion(max_scope="row"),
    ConfidenceConfusion(max_scope="vocabulary"),
    ConfidenceConfusion(max_quantile=0.8),
    Progressive(),
    SoftTrajectories(temperature=0.5, tokens=ConfidenceConfusion()),
)
SUPPORTS: tuple[tuple[Kind, bool], ...] = (
    ("teacher", False),
    ("student", False),
    ("union", True),
    ("intersection", True),
)


def rows() -> Iterator[Row]:
    """Verify heads, top-K lists, supports, overlap, filters, weights and coefficients."""
    states = cases.make_states()
    capped: HeadOptions = {**HEAD, "softcap": 3.0, "valid": 300}
    parts = (
        lambda: of_head("head", states, HEAD, None, None),
        lambda: of_head("head softcap=3 valid=300", states, capped, 3.0, 300),
        lambda: of_lists(states),
        of_batches,
        of_chunks,
    )
    yield from in_parallel(lambda part: part(), parts)


def of_head(
    name: str,
    states: States,
    options: HeadOptions,
    softcap: float | None,
    valid: int | None,
) -> Iterator[Row]:
    """Verify logprob, entropy, log-sum-exp and logprobs at given ids, and their gradients."""
    rng = np.random.default_rng(5)
    hidden, head = states.hidden.reshape(-1, cases.WIDTH), states.head
    count, size = len(hidden), valid or cases.VOCABULARY
    ids = rng.integers(0, size, count).astype(np.int32)
    support = rng.integers(-1, size, (count, K)).astype(np.int32)
    to = [rng.normal(size=count) for _ in range(3)] + [rng.normal(size=support.shape)]

    def read(own: tuple[Array, Array]) -> tuple[Array, ...]:
        stats = head_gather(*own, jnp.asarray(ids), jnp.asarray(support), **options)
        return stats.logprob, stats.entropy, stats.logsumexp, stats.support_logprob

    def both(own: tuple[Array, Array]) -> Any:
        values, pull = jax.vjp(read, own)
        return values, pull(tuple(jnp.float32(each) for each in to))[0]

    values, gradient = compiled(both)((hidden, head))
    z = reference_batch.head_logits(hidden, head, SCALE, softcap, valid)
    exact = reference_batch.head_gather(z, ids, support)
    inside = support >= 0
    names = ("log-prob", "entropy", "log-sum-exp")
    for what, ours, truth in zip(names, values, exact, strict=False):
        yield relative(f"{name}: {what}", [(ours, truth)], BOUND)
    found = (np.asarray(values[3])[inside], exact[3][inside])
    yield relative(f"{name}: log-probs at given token ids", [found], BOUND)
    d_exact = reference_batch.head_gather_gradients(
        hidden, head, ids, support, to, SCALE, softcap, valid
    )
    yield relative(f"{name}: gradient", zip(gradient, d_exact, strict=True), BOUND)


def of_lists(states: States) -> Iterator[Row]:
    """Verify the top-K lists, the supports made of them, and their overlap."""
    rollout = cases.dummy_rollout()
    tokens = jnp.asarray(rollout.tokens)
    own, theirs = compiled(
        lambda s: (
            head_topk(s.old, s.head, tokens, k=K, **HEAD),
            head_topk(s.teacher_hidden, s.teacher_head, tokens, k=K, **HEAD),
        )
    )(states)
    z = cases.logits(states.old, states.head, SCALE).reshape(-1, cases.VOCABULARY)
    z_q = cases.logits(states.teacher_hidden, states.teacher_head, SCALE).reshape(z.shape)
    lists = [reference_batch.head_topk(logits, K) for logits in (z, z_q)]
    ours = [np.asarray(x.top_ids).reshape(-1, K) for x in (own, theirs)]
    yield differing("top-K: token ids", ours, [ids for ids, _ in lists])
    values = [(np.asarray(own.top_logprob).reshape(-1, K), lists[0][1])]
    yield relative("top-K: log-probs", values, BOUND)
    score = compiled(cases.score, 2, 3)
    for kind, sampled in SUPPORTS:
        scores = score(states, rollout, kind, sampled)
        yield from of_support(kind, sampled, scores, lists, z_q, np.asarray(tokens).reshape(-1))
    exact = reference_batch.overlap(z, z_q, K)
    for name, truth in exact.items():
        ours = np.asarray(getattr(scores.overlap, name)).reshape(-1)
        yield relative(f"overlap: {name.replace('_', ' ')}", [(ours, truth)], BOUND)


def of_support(
    kind: Kind, sampled: bool, scores: Scores, lists: Any, z_q: np.ndarray, tokens: np.ndarray
) -> Iterator[Row]:
    """Verify the token ids of a support, each once, and the teacher's logprobs of them."""
    assert scores.support is not None
    ids = np.asarray(scores.support.ids).reshape(len(z_q), -1)
    ours = [sorted(row[row >= 0].tolist()) for row in ids]
    (own, _), (theirs, _) = lists
    exact = [
        sorted(reference_batch.support(kind, s, t, int(y) if sampled else None))
        for s, t, y in zip(own.tolist(), theirs.tolist(), tokens, strict=True)
    ]
    name = f"support: {kind}" + (" + sampled" if sampled else "")
    wrong = sum(a != b for a, b in zip(ours, exact, strict=True))
    yield Row(f"{name}: token ids", float(wrong), 0.0)
    truth = reference_batch.head_gather(z_q, tokens, ids)[3]
    found = np.asarray(scores.support.teacher).reshape(ids.shape)
    inside = ids >= 0
    yield relative(f"{name}: teacher's log-probs", [(found[inside], truth[inside])], BOUND)


def of_batches() -> Iterator[Row]:
    """Verify filters, weights and coefficients, on rows of two teachers."""
    rng = np.random.default_rng(6)
    count, room, size = 12, 7, 50
    lengths = rng.integers(1, room + 1, count)
    lengths[3] = 0
    mask = np.arange(room)[None] < lengths[:, None]
    names = ("student_logprob", "teacher_logprob", "student_entropy", "teacher_entropy")
    # NaN where masked: the stages must not use those values.
    stats = {
        name: np.where(mask, rng.exponential(2.0, mask.shape), np.nan).astype(np.float32)
        for name in names
    }
    stats |= {name: -stats[name] for name in names[:2]}
    stats["reverse_kl"] = rng.exponential(1.0, mask.shape).astype(np.float32)
    teacher = rng.integers(0, TEACHERS, count).astype(np.int32)
    gap = rng.normal(0.0, 1.5, count).astype(np.float32)
    scores = Scores(
        TokenStats(jnp.asarray(stats["student_logprob"]), jnp.asarray(stats["student_entropy"])),
        TokenStats(jnp.asarray(stats["teacher_logprob"]), jnp.asarray(stats["teacher_entropy"])),
        reverse_kl=jnp.asarray(stats["reverse_kl"]),
        margin=Margin(jnp.zeros(count, jnp.float32), jnp.asarray(gap)),
    )
    recent = rng.exponential(2.0, (2, count, 2)) * np.array([-1.0, 0.0])
    recent = recent.astype(np.float32)
    recent[0, :5, 0] = np.nan
    known = {
        "tokens": rng.integers(0, 6, mask.shape).astype(np.int32),
        "sample_id": np.arange(count, dtype=np.int32),
        "special": (1,),
        "stop": (2,),
    }

    def filtered(filter, progress, scores, mask, teacher):
        context = StageContext(mask, teacher, TEACHERS, progress=progress, **known)
        state = recent if jax.tree.leaves(filter.init(count)) else ()
        return filter(scores, context, state)[0]

    def weighed(reweight, scores, mask, teacher, kept):
        return reweight(scores, StageContext(mask, teacher, TEACHERS, size), kept)[0]

    stats = {name: value.astype(np.float64) for name, value in stats.items()}
    on_device = jnp.asarray(mask), jnp.asarray(teacher)
    kept = {}
    for filter, progress in FILTERS:
        ours = compiled(filtered, 0, 1)(filter, progress, scores, *on_device)
        of_batch = known | {"teacher": teacher, "progress": progress, "gap": gap, "recent": recent}
        exact = expected.keep(filter, stats, mask, **of_batch)
        late = f" at {progress:g} of the updates" if progress else ""
        yield differing(f"filter {describe(filter)}{late}", ours, exact)
        kept[exact.ndim] = exact
    for reweight in WEIGHTS:
        ours = compiled(weighed, 0)(reweight, scores, *on_device, jnp.asarray(kept[1]))
        of_batch = {"teacher": teacher, "vocab_size": size}
        exact = expected.weight(reweight, stats, mask, kept[1], **of_batch)
        yield relative(f"weight {describe(reweight)}", [(ours, exact)], BOUND)
    for aggregate in ("seq", "token"):
        for dimensions, unit in ((1, "rows"), (2, "tokens")):
            ours = compiled(coefficients, 2)(on_device[0], jnp.asarray(kept[dimensions]), aggregate)
            exact = reference_batch.coefficients(mask, kept[dimensions], aggregate)
            yield relative(f"coefficient {aggregate}, {unit} kept", [(ours, exact)], BOUND)


def of_chunks() -> Iterator[Row]:
    """Verify anchors with ties and short rows, and the weights of the audited chunks."""
    rng = np.random.default_rng(8)
    count, room, alpha = 12, 40, 0.7
    mask = np.arange(room)[None] < rng.integers(0, room + 1, count)[:, None]
    entropy = np.where(mask, rng.integers(0, 6, mask.shape), np.nan).astype(np.float32)
    logprob = np.where(mask, -rng.exponential(1.0, mask.shape), np.nan).astype(np.float32)
    group = np.repeat(np.arange(count // 3, dtype=np.int32), 3)
    for chunks, size in ((4, 5), (9, 1), (2, 20)):
        ours = compiled(select, 2, 3)(entropy, mask, chunks, size)
        rows = reference_stages.anchors(entropy, mask, chunks, size)
        exact = np.array([row + [-1] * (chunks - len(row)) for row in rows], np.int32)
        yield differing(f"anchors: {chunks} of {size} tokens", ours, exact)
        real = exact >= 0
        samples = (10 * real).astype(np.float32)
        agreement = (samples * rng.uniform(0, 1, real.shape)).astype(np.float32)
        audit = Audit(exact, (size * real).astype(np.int32), agreement, samples)
        found = compiled(lambda *x: make_chunks(*x, alpha=alpha))(audit, logprob, group)
        names = found.audited, found.target, found.prior, found.baseline
        arrays = cases.audit_arrays(audit)
        truth = reference_stages.chunk_targets(logprob, arrays, group, alpha)
        pairs = [(np.float32(a), np.float64(b)) for a, b in zip(names, truth, strict=True)]
        yield relative(f"chunks: {chunks} of {size} tokens, weights", pairs, BOUND)
