"""Full-vocabulary divergences of two heads: the oracle's values and gradients, without logits."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from fireopd_jax.ops.divergence import head_divergence
from fireopd_jax.ops.formulas import (
    AdaptiveKL,
    ForwardKL,
    JensenShannon,
    PointwiseClipped,
    ReverseKL,
    SkewedForwardKL,
    SkewedReverseKL,
)
from fireopd_jax.ops.head import head_stats
from fireopd_jax.ops.logits import HeadSharding
from fireopd_jax.verify import reference as objectives
from fireopd_jax.verify import reference_batch as oracle

GOLDEN = json.loads((Path(__file__).parents[1] / "golden_objectives.json").read_text())
EACH = pytest.mark.parametrize("implementation", ["reference", "chunked"])
FAMILY = {
    "reverse_kl": (ReverseKL(), objectives.reverse_kl),
    "forward_kl": (ForwardKL(), objectives.forward_kl),
    "gkd_jsd_0.5": (JensenShannon(), lambda z, q: objectives.jensen_shannon(z, q, 0.5)),
    "gkd_jsd_0.1": (JensenShannon(beta=0.1), lambda z, q: objectives.jensen_shannon(z, q, 0.1)),
    "jsd at 0": (JensenShannon(beta=0), objectives.forward_kl),
    "jsd at 1": (JensenShannon(beta=1), objectives.reverse_kl),
    "skewed_forward_kl_0.1": (
        SkewedForwardKL(),
        lambda z, q: objectives.skewed_forward_kl(z, q, 0.1),
    ),
    "skewed_reverse_kl_0.1": (
        SkewedReverseKL(),
        lambda z, q: objectives.skewed_reverse_kl(z, q, 0.1),
    ),
    "skewed at 0": (SkewedForwardKL(alpha=0), objectives.forward_kl),
    "adaptive": (AdaptiveKL(), lambda z, q: objectives.adaptive_kl(z, q, 0.5)),
    "adaptive of one": (AdaptiveKL(mu=0.0), lambda z, q: objectives.adaptive_kl(z, q, 0.0)),
    "adaptive of all": (AdaptiveKL(mu=1.0), lambda z, q: objectives.adaptive_kl(z, q, 1.0)),
}
CLIPPED = (
    (ReverseKL(), 0.0),
    (ForwardKL(), 0.0),
    (JensenShannon(beta=0.3), 0.3),
    (JensenShannon(beta=0), 0.0),
    (JensenShannon(beta=1), 1.0),
    (SkewedForwardKL(), 0.1),
    (SkewedReverseKL(), 0.1),
)
LIMIT = 0.05
"""Of OPSD. Of each position's 37 terms two to five are above it in these tests."""
FAMILY |= {
    f"clipped {divergence.kind} {share:g}": (
        PointwiseClipped(divergence, LIMIT),
        functools.partial(objectives.clipped, kind=divergence.kind, limit=LIMIT, share=share),
    )
    for divergence, share in CLIPPED
}


def make_inputs(tokens, vocabulary, dtype=jnp.float32, seed=0, more=0, spread=1.0):
    """Return hidden, head, those of a wider teacher with `more` token ids, and cotangents."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape) * spread, dtype)

    inputs = (
        draw(tokens, 5),
        draw(vocabulary, 5),
        draw(tokens, 7),
        draw(vocabulary + more, 7) * 0.6,
    )
    return inputs, jnp.asarray(rng.normal(size=tokens), jnp.float32)


def ours(divergence, inputs, cotangent, **options):
    @jax.jit
    def both(inputs, cotangent):
        value, pull = jax.vjp(lambda *each: head_divergence(divergence, *each, **options), *inputs)
        return value, pull(cotangent)

    return both(inputs, cotangent)


def truth(formula, inputs, cotangent, scale=1.0, valid=None, caps=(None, None)):
    hidden, head, of_teacher, teacher_head = (np.asarray(x, np.float64) for x in inputs)
    valid = valid or min(len(head), len(teacher_head))
    z = oracle.head_logits(hidden, head, scale, caps[0], valid)
    z_q = oracle.head_logits(of_teacher, teacher_head, scale, caps[1], valid)
    values, d_hidden, d_head = [], np.zeros_like(hidden), np.zeros_like(head)
    for n, (row, other) in enumerate(zip(z, z_q, strict=True)):
        value, d_z = formula(row, other)
        values.append(value)
        d_z = scale * float(cotangent[n]) * d_z
        if caps[0] is not None:
            d_z = d_z * (1 - (row / scale / caps[0]) ** 2)
        d_hidden[n] = head[:valid].T @ d_z
        d_head[:valid] += np.outer(d_z, hidden[n])
    return np.array(values), d_hidden, d_head


def check(name, inputs, cotangent, tolerance=1e-5, gradient_tolerance=1e-5, **options):
    divergence, formula = FAMILY[name]
    value, (d_hidden, d_head, *of_teacher) = ours(divergence, inputs, cotangent, **options)
    caps = options.get("softcap"), options.get("teacher_softcap")
    expected = truth(
        formula, inputs, cotangent, options.get("logit_scale", 1.0), options.get("valid"), caps
    )
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected[0], rtol=tolerance, atol=tolerance)
    for gradient, source, exact in zip((d_hidden, d_head), inputs, expected[1:], strict=False):
        assert gradient.dtype == source.dtype
        size = max(np.abs(exact).max(initial=0), 1e-2)
        np.testing.assert_allclose(
            np.asarray(gradient, np.float64), exact, rtol=0, atol=gradient_tolerance * size
        )
    assert not any(np.any(each) for each in of_teacher)


@EACH
@pytest.mark.parametrize("name", [n for n in FAMILY if n in GOLDEN["objectives"]])
def test_golden_vectors(name, implementation):
    """The logits are the hidden states themselves, the head the identity."""
    z, z_q = (jnp.asarray([GOLDEN[key]], jnp.float32) for key in ("z_student", "z_teacher"))
    eye = jnp.eye(6)
    value, (gradient, *_) = ours(
        FAMILY[name][0], (z, eye, z_q, eye), jnp.ones(1), implementation=implementation, chunk=4
    )
    golden = GOLDEN["objectives"][name]
    np.testing.assert_allclose(value[0], golden["value"], atol=6e-7)
    np.testing.assert_allclose(gradient[0], golden["gradient"], atol=1e-6)


@EACH
@pytest.mark.parametrize("name", FAMILY)
def test_equals_oracle(name, implementation):
    inputs, cotangent = make_inputs(5, 37)
    options = {"implementation": implementation, "chunk": 8, "logit_scale": 1 / 0.8}
    check(name, inputs, cotangent, gradient_tolerance=2e-5, **options)


@pytest.mark.parametrize(("tokens", "vocabulary", "chunk"), [(1, 6, 64), (3, 16, 4)])
def test_chunks_of_any_size(tokens, vocabulary, chunk):
    inputs, cotangent = make_inputs(tokens, vocabulary)
    check("gkd_jsd_0.1", inputs, cotangent, gradient_tolerance=2e-5, chunk=chunk)


@EACH
@pytest.mark.parametrize("name", ["reverse_kl", "adaptive"])
def test_options_equal_oracle(name, implementation):
    inputs, cotangent = make_inputs(4, 33, more=3)
    check(
        name,
        inputs,
        cotangent,
        gradient_tolerance=2e-5,
        implementation=implementation,
        chunk=8,
        softcap=2.0,
        teacher_softcap=3.0,
        valid=30,
    )


def test_bfloat16_equals_oracle():
    inputs, cotangent = make_inputs(4, 21, jnp.bfloat16)
    check("gkd_jsd_0.5", inputs, cotangent, gradient_tolerance=2**-6, chunk=8)


def test_clipped_terms_in_bfloat16_equal_oracle():
    inputs, cotangent = make_inputs(4, 21, jnp.bfloat16)
    check("clipped forward_kl 0", inputs, cotangent, gradient_tolerance=2**-6, chunk=8)


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), JensenShannon(beta=0.3)])
def test_a_limit_above_every_term_changes_the_rounding_only(divergence):
    inputs, cotangent = make_inputs(5, 37)
    plain, expected = ours(divergence, inputs, cotangent, chunk=8)
    value, gradients = ours(PointwiseClipped(divergence, 1e9), inputs, cotangent, chunk=8)
    np.testing.assert_allclose(value, plain, rtol=1e-5)
    for ours_, theirs in zip(gradients[:2], expected[:2], strict=True):
        np.testing.assert_allclose(ours_, theirs, atol=1e-5 * np.abs(theirs).max())


def test_terms_above_the_limit_have_no_gradient_and_the_sum_can_be_negative():
    """q is sharp where p is not: its one large term is clipped, the negative ones are not."""
    q, p = np.array([0.94, 0.02, 0.02, 0.02]), np.array([0.1, 0.3, 0.3, 0.3])
    inputs = (jnp.log(p)[None], jnp.eye(4), jnp.log(q)[None], jnp.eye(4))
    value, (gradient, *_) = ours(PointwiseClipped(ForwardKL(), 0.05), inputs, jnp.ones(1))
    negative = 3 * 0.02 * np.log(0.02 / 0.3)
    assert value[0] == pytest.approx(0.05 + negative, abs=1e-6) and value[0] < 0
    # Without the clip this is p - q, which raises the first token's probability.
    slope = np.array([0.0, -0.02, -0.02, -0.02])
    np.testing.assert_allclose(gradient[0], slope - p * slope.sum(), atol=1e-6)
    assert gradient[0, 0] > 0 > p[0] - q[0]


@pytest.mark.parametrize(
    "name",
    [
        "reverse_kl",
        "gkd_jsd_0.1",
        "skewed_reverse_kl_0.1",
        "adaptive",
        "clipped forward_kl 0",
        "clipped reverse_kl 0",
    ],
)
def test_equal_models_have_zero_divergence_and_gradient(name):
    (hidden, head, *_), cotangent = make_inputs(4, 21, spread=2.0)
    value, gradients = ours(FAMILY[name][0], (hidden, head) * 2, cotangent, chunk=8)
    assert np.abs(value).max() < 1e-6
    assert all(np.abs(each).max() < 2e-6 for each in gradients)


@pytest.mark.parametrize("name", ["reverse_kl", "skewed_reverse_kl_0.1"])
def test_sharp_models_stay_finite(name):
    inputs, cotangent = make_inputs(4, 21, spread=8.0)
    # p rho and p KL are a hundred here and cancel: 1e-5 of what they are is left.
    check(name, inputs, cotangent, tolerance=1e-4, gradient_tolerance=1e-2, chunk=8)


@pytest.mark.parametrize("name", ["adaptive", "clipped reverse_kl 0"])
def test_a_broken_state_spoils_its_own_position(name):
    inputs, cotangent = make_inputs(4, 21)
    broken = (inputs[0].at[1].set(jnp.nan), *inputs[1:])
    cotangent = cotangent.at[1].set(0.0)
    value, gradients = ours(FAMILY[name][0], broken, cotangent, chunk=8)
    clean, expected = ours(FAMILY[name][0], inputs, cotangent, chunk=8)
    np.testing.assert_array_equal(np.isnan(value), [False, True, False, False])
    np.testing.assert_allclose(np.delete(value, 1), np.delete(clean, 1), rtol=1e-6)
    for one, other in zip(gradients[:2], expected[:2], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "shape", "rows", "more", "valid"),
    [
        ("adaptive", (8, 1), 24, 0, 22),
        ("adaptive", (2, 4), 24, 0, 22),
        ("adaptive", (4, 2), 21, 4, None),
        ("gkd_jsd_0.1", (4, 2), 24, 0, 22),
        ("reverse_kl", (1, 8), 24, 0, 22),
        ("reverse_kl", (2, 4), 37, 3, None),  # neither divides; the teacher has more token ids
        ("skewed_reverse_kl_0.1", (2, 4), 24, -3, None),  # the student has more
        ("clipped forward_kl 0", (2, 4), 24, 0, 22),
    ],
)
def test_shards_equal_one_device(name, shape, rows, more, valid):
    mesh = jax.make_mesh(shape, ("data", "tensor"), (AxisType.Auto,) * 2)
    inputs, cotangent = make_inputs(6, rows, more=more)
    columns = "tensor" if shape[1] > 1 else None
    sharding = HeadSharding(mesh, ("data",), columns, own_tokens=shape[0] == 2)
    options = {"chunk": 3} | ({} if valid is None else {"valid": valid})
    check(name, inputs, cotangent, gradient_tolerance=2e-5, sharding=sharding, **options)


def test_leading_axes_and_no_position_at_all():
    (hidden, head, of_teacher, teacher_head), _ = make_inputs(6, 9)
    flat = head_divergence(ReverseKL(), hidden, head, of_teacher, teacher_head)
    shaped = head_divergence(
        ReverseKL(), hidden.reshape(2, 3, 5), head.T, of_teacher.reshape(2, 3, 7), teacher_head.T,
        head_layout="dv",
    )  # fmt: skip
    np.testing.assert_allclose(shaped.reshape(-1), flat, rtol=1e-6)
    none = head_divergence(AdaptiveKL(), hidden[:0], head, of_teacher[:0], teacher_head)
    assert none.shape == (0,)


def test_what_does_not_fit_is_refused():
    (hidden, head, of_teacher, teacher_head), _ = make_inputs(6, 9)
    both = (hidden, head, of_teacher, teacher_head)
    with pytest.raises(ValueError, match="did you mean 'chunked'"):
        head_divergence(ReverseKL(), *both, implementation="chunk")
    with pytest.raises(ValueError, match="head_layout='dv'"):
        head_divergence(ReverseKL(), hidden, head.T, of_teacher, teacher_head)
    mesh = jax.make_mesh((8,), ("tensor",), (AxisType.Auto,))
    with pytest.raises(ValueError, match="does not support sharding"):
        sharding = HeadSharding(mesh, (), "tensor")
        head_divergence(ReverseKL(), *both, sharding=sharding, implementation="reference")


def scratch(function, tokens, width, vocabulary):
    shape = jax.ShapeDtypeStruct
    arrays = [shape((tokens, width), jnp.float32), shape((vocabulary, width), jnp.float32)] * 2
    compiled = jax.jit(jax.value_and_grad(function, (0, 1))).lower(*arrays).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    "name",
    ["reverse_kl", "gkd_jsd_0.5", "skewed_reverse_kl_0.1", "adaptive", "clipped forward_kl 0"],
)
def test_at_most_twice_the_scratch_of_the_head_statistics(name):
    def statistics(hidden, head, of_teacher, teacher_head):
        stats = head_stats(hidden, head, jnp.zeros(hidden.shape[:1], jnp.int32))
        return (stats.logprob + 0.1 * stats.entropy).sum()

    def divergence(*inputs):
        return head_divergence(FAMILY[name][0], *inputs).sum()

    size = (1024, 64, 32768)
    assert scratch(divergence, *size) <= 2 * scratch(statistics, *size)
