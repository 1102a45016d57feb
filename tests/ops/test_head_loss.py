"""The fused loss: the same value and gradients as the statistics and autodiff give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from fireopd_jax.ops.head import head_gather, head_loss
from fireopd_jax.ops.logits import HeadSharding
from fireopd_jax.verify import reference_batch as oracle


def make_inputs(tokens, vocabulary, width=6, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(tokens, width)) * 1.5, dtype)
    head = jnp.asarray(rng.normal(size=(vocabulary, width)), dtype)
    ids = jnp.asarray(rng.integers(0, vocabulary, tokens), jnp.int32)
    support = jnp.asarray(rng.integers(0, vocabulary, (tokens, 3)), jnp.int32).at[:, 2:].set(-1)
    target = jnp.asarray(rng.normal(size=tokens), jnp.float32)
    return hidden, head, ids, support, target


def loss(stats, target):
    inside = jnp.isfinite(stats.support_logprob)
    at_support = jnp.where(inside, stats.support_logprob, 0.0).sum(-1)
    return target * stats.logprob**2 + 0.3 * stats.entropy * at_support + 0.1 * stats.logsumexp


def by_autodiff(hidden, head, ids, support, target, **options):
    stats = head_gather(hidden, head, ids, support, implementation="reference", **options)
    return loss(stats, target).sum()


def compare(inputs, tolerance=1e-5, truth=None, **options):
    hidden, head, ids, support, target = inputs
    both = jax.value_and_grad(
        lambda hidden, head: 2.0 * head_loss(loss, hidden, head, ids, support, target, **options),
        (0, 1),
    )
    value, found = jax.jit(both)(hidden, head)
    plain = {name: options[name] for name in ("valid", "softcap", "logit_scale") if name in options}
    if options.get("head_layout") == "dv":
        plain["head_layout"] = "dv"
    plainly = jax.value_and_grad(
        lambda hidden, head: 2.0 * by_autodiff(hidden, head, ids, support, target, **plain), (0, 1)
    )
    expected, gradients = jax.jit(plainly)(*(truth or (hidden, head)))
    np.testing.assert_allclose(value, expected, rtol=1e-4 if tolerance < 1e-3 else 1e-2, atol=1e-5)
    for ours, other, like in zip(found, gradients, (hidden, head), strict=True):
        assert ours.dtype == like.dtype
        difference = np.abs(np.asarray(ours, np.float64) - np.asarray(other, np.float64))
        assert difference.max(initial=0) <= tolerance * np.abs(other).max(initial=0)


@pytest.mark.parametrize("tokens", [0, 1, 5, 8])
@pytest.mark.parametrize("token_block", [1, 4, None])
def test_equals_autodiff(tokens, token_block):
    compare(make_inputs(tokens, 13), token_block=token_block)


@pytest.mark.parametrize("layout", ["vd", "dv"])
def test_options_equal_autodiff(layout):
    hidden, head, ids, support, target = make_inputs(5, 13)
    head = head.T if layout == "dv" else head
    inputs = (hidden, head, ids % 11, support % 11 - (support < 0) * 12, target)
    options = {"valid": 11, "softcap": 3.0, "logit_scale": 0.7, "head_layout": layout}
    compare(inputs, token_block=2, **options)


def test_bfloat16():
    hidden, head, *rest = make_inputs(16, 13, dtype=jnp.bfloat16)
    truth = hidden.astype(jnp.float32), head.astype(jnp.float32)
    compare((hidden, head, *rest), 2**-6, truth, token_block=4)


@pytest.mark.parametrize(("data", "tensor"), [(1, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize(("tokens", "valid"), [(8, 40), (7, 33)])
def test_shards_equal_one_device(data, tensor, tokens, valid):
    hidden, head, ids, support, target = make_inputs(tokens, 40)
    devices = np.array(jax.devices()[: data * tensor]).reshape(data, tensor)
    mesh = Mesh(devices, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    sharding = HeadSharding(mesh, ("data",), "tensor")
    inputs = (hidden, head, ids % valid, jnp.where(support >= valid, -1, support), target)
    compare(inputs, token_block=2, valid=valid, sharding=sharding)


def test_a_row_of_nan_that_nobody_weighs_reaches_nothing():
    hidden, head, ids, _, _ = make_inputs(4, 13)
    coefficient = jnp.asarray([1.0, 1.0, 0.0, 1.0])

    def outcome(hidden, head):
        def weighed(stats, coefficient):
            live = coefficient != 0
            return coefficient * jnp.where(live, stats.logprob, 0.0)

        return head_loss(weighed, hidden, head, ids, None, coefficient, token_block=2)

    broken = jax.jit(jax.grad(outcome, (0, 1)))(hidden.at[2].set(jnp.nan), head)
    zeros = np.zeros(4)
    truth = oracle.head_gradients(hidden, head, ids, [coefficient, zeros, zeros])
    for ours, expected in zip(broken, truth, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def products(jaxpr):
    """Count the matrix products of a program, those of a scan's body once."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == "dot_general"
        if equation.primitive.name == "cond":  # branches by platform: one of them runs
            count += products(equation.params["branches"][0].jaxpr)
            continue
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                count += products(inner)
    return count


def test_three_products_instead_of_four():
    hidden, head, ids, support, target = make_inputs(8, 16)

    def fused(hidden, head):
        return head_loss(loss, hidden, head, ids, support, target, token_block=8)

    def unfused(hidden, head):
        return loss(head_gather(hidden, head, ids, support, chunk=8), target).sum()

    counts = [
        products(jax.make_jaxpr(jax.grad(each, (0, 1)))(hidden, head).jaxpr)
        for each in (fused, unfused)
    ]
    assert counts == [3, 4]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"token_block": 0}, "token_block must be at least 1, got 0"),
        ({"chunk": 8}, "head_loss has one implementation: chunk has no effect"),
    ],
)
def test_options_without_meaning_are_refused(options, words):
    hidden, head, ids, support, target = make_inputs(2, 5)
    with pytest.raises(ValueError, match=words):
        head_loss(loss, hidden, head, ids, support, target, **options)
