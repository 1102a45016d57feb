"""Head statistics with tokens and vocabulary split over a mesh: equal to the oracle's whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from fireopd_jax.ops.head import head_gather, head_stats, head_topk
from fireopd_jax.ops.logits import HeadSharding
from fireopd_jax.verify import reference_batch as oracle


def make_sharding(tokens, vocabulary, own_tokens=False):
    devices = np.array(jax.devices()[: tokens * vocabulary]).reshape(tokens, vocabulary)
    mesh = Mesh(devices, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    return HeadSharding(mesh, ("data",), "tensor", own_tokens=own_tokens)


def make_inputs(tokens, vocabulary, support=3, width=6, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(tokens, width)) * 1.5, dtype)
    head = jnp.asarray(rng.normal(size=(vocabulary, width)), dtype)
    ids = jnp.asarray(rng.integers(0, vocabulary, tokens), jnp.int32)
    support = jnp.asarray(rng.integers(-1, vocabulary + 1, (tokens, support)), jnp.int32)
    return hidden, head, ids, support


MESHES = pytest.mark.parametrize(("data", "tensor"), [(1, 4), (2, 4), (2, 2), (4, 1)])


@MESHES
@pytest.mark.parametrize(
    ("tokens", "rows", "valid", "layout"),
    [(8, 40, 40, "vd"), (7, 40, 33, "vd"), (3, 40, 9, "dv"), (0, 12, 12, "vd"), (5, 37, 37, "vd")],
)
def test_values_and_gradients_equal_the_oracle(data, tensor, tokens, rows, valid, layout):
    hidden, head, ids, support = make_inputs(tokens, rows)
    ids, support = ids % valid, jnp.where(support >= valid, -1, support)
    rng = np.random.default_rng(1)
    weights = [jnp.asarray(rng.normal(size=tokens), jnp.float32) for _ in range(3)]
    weights.append(jnp.asarray(rng.normal(size=support.shape), jnp.float32))
    turn = (lambda x: x.T) if layout == "dv" else lambda x: x

    @jax.jit
    def outcome(hidden, head):
        found = head_gather(
            hidden,
            turn(head),
            ids,
            support,
            valid=valid,
            logit_scale=0.8,
            softcap=4.0,
            chunk=4,
            head_layout=layout,
            sharding=make_sharding(data, tensor, own_tokens=tokens % 2 == 1),
        )
        values = (found.logprob, found.entropy, found.logsumexp, found.support_logprob)
        shares = (
            jnp.where(jnp.isfinite(v), w * v, 0.0) for v, w in zip(values, weights, strict=True)
        )
        return sum(share.sum() for share in shares), values

    (_, values), found = jax.value_and_grad(outcome, (0, 1), has_aux=True)(hidden, head)
    z = oracle.head_logits(hidden, head, 0.8, 4.0, valid)
    for ours, truth in zip(values, oracle.head_gather(z, ids, np.asarray(support)), strict=True):
        np.testing.assert_allclose(ours, truth, rtol=1e-5, atol=1e-5)
    truths = oracle.head_gather_gradients(hidden, head, ids, support, weights, 0.8, 4.0, valid)
    for ours, truth in zip(found, truths, strict=True):
        assert np.abs(ours - truth).max(initial=0) <= 1e-5 * np.abs(truth).max(initial=0)


@MESHES
@pytest.mark.parametrize(("rows", "valid", "k"), [(40, 40, 5), (39, 33, 12), (40, 7, 9)])
def test_top_k_equals_the_oracle_and_ties_fall_to_the_lowest_id(data, tensor, rows, valid, k):
    # Whole numbers: equal columns are equal bits in every shard.
    rng = np.random.default_rng(k)
    hidden = jnp.asarray(rng.integers(-2, 3, (6, 3)), jnp.float32)
    head = jnp.asarray(rng.integers(-1, 2, (rows, 3)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, valid, 6), jnp.int32)
    options = {"valid": valid, "chunk": 4, "sharding": make_sharding(data, tensor)}
    found = jax.jit(lambda *inputs: head_topk(*inputs, k=k, **options))(hidden, head, ids)
    top_ids, top_logprob = oracle.head_topk(oracle.head_logits(hidden, head, valid=valid), k)
    np.testing.assert_array_equal(found.top_ids, top_ids)
    np.testing.assert_allclose(found.top_logprob, top_logprob, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("data", "tensor"),
    [(2, 4), *(pytest.param(*each, marks=pytest.mark.slow) for each in [(1, 4), (2, 2), (4, 1)])],
)
def test_weights_are_those_of_the_whole_vocabulary(data, tensor):
    hidden, head, ids, _ = make_inputs(6, 40)
    entropy = jnp.linspace(0.0, 3.0, 6)
    options = {"k": 2, "student_entropy": entropy, "alpha": 0.5, "beta": 2.0, "valid": 37}
    options |= {"sharding": make_sharding(data, tensor)}
    found = jax.jit(lambda *inputs: head_topk(*inputs, **options))(hidden, head, ids)
    weight = (1 + 0.5 * (1 - found.entropy / np.log(37))) * (1 + 2.0 * entropy / np.log(37))
    np.testing.assert_allclose(found.weight, weight, rtol=1e-6)


def test_bfloat16_gradients_of_the_head_are_summed_in_float32():
    hidden, head, ids, _ = make_inputs(64, 32, dtype=jnp.bfloat16)

    def gradient(sharding):
        def outcome(head):
            return head_stats(hidden, head, ids, chunk=8, sharding=sharding).logprob.sum()

        return np.asarray(jax.jit(jax.grad(outcome))(head), np.float64)

    one, ones = np.ones(64), np.zeros(64)
    truth = oracle.head_gradients(hidden, head, ids, [one, ones, ones])[1]
    for sharding in (None, make_sharding(8, 1)):
        # One rounding of d z and one of the sum, as on one device.
        assert np.abs(gradient(sharding) - truth).max() <= 2**-7 * np.abs(truth).max()


def test_nan_stays_in_its_row():
    hidden, head, ids, support = make_inputs(8, 40)
    sharding = make_sharding(2, 4)
    gather = jax.jit(lambda hidden: head_gather(hidden, head, ids, support, sharding=sharding))
    clean, found = gather(hidden), gather(hidden.at[3].set(jnp.nan))
    assert np.isnan(found.entropy[3]) and np.isnan(found.logprob[3])
    others = np.delete(np.arange(8), 3)
    np.testing.assert_array_equal(found.entropy[others], clean.entropy[others])
    np.testing.assert_array_equal(found.support_logprob[others], clean.support_logprob[others])


def test_no_device_holds_the_whole_head_or_all_tokens():
    hidden, head, ids, support = make_inputs(32, 4096, width=16)
    sharding = make_sharding(2, 4)

    def outcome(hidden, head):
        found = head_gather(hidden, head, ids, support, chunk=64, sharding=sharding)
        return found.entropy.sum() + found.logprob.sum()

    split = jax.NamedSharding(sharding.mesh, jax.P("data"))
    rows = jax.NamedSharding(sharding.mesh, jax.P("tensor"))
    program = jax.jit(
        jax.grad(outcome, (0, 1)), in_shardings=(split, rows), out_shardings=(split, rows)
    )
    text = program.lower(hidden, head).compile().as_text()
    assert "f32[1024,16]" in text, "the share of a device does not appear"
    assert "f32[4096,16]" not in text and "f32[32,16]" not in text
    assert "all-gather" not in text


def test_the_gradient_of_states_is_scattered_to_the_devices_that_have_their_tokens():
    hidden, head, ids, _ = make_inputs(32, 4096, width=16)
    sharding = make_sharding(2, 4, own_tokens=True)
    place = jax.NamedSharding(sharding.mesh, jax.P(("data", "tensor")))

    def outcome(hidden):
        return head_stats(hidden, head, ids, chunk=64, sharding=sharding).entropy.sum()

    program = jax.jit(jax.grad(outcome), in_shardings=place, out_shardings=place)
    text = program.lower(hidden).compile().as_text()
    assert "reduce-scatter" in text and "f32[4,16]" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": ("rows",)}, "no axis 'rows'; it has data, tensor"),
        ({"tokens": ("tensor",)}, "axis 'tensor' shards both tokens and vocabulary"),
        (
            {"implementation": "reference"},
            "'reference' computes full logits and does not support sharding",
        ),
    ],
)
def test_shardings_that_do_not_fit_are_refused(change, words):
    hidden, head, ids, _ = make_inputs(4, change.get("rows", 40))
    mesh = make_sharding(2, 4).mesh
    sharding = HeadSharding(mesh, change.get("tokens", ("data",)), "tensor")
    with pytest.raises(ValueError, match=words):
        head_stats(
            hidden, head, ids, sharding=sharding, implementation=change.get("implementation")
        )
