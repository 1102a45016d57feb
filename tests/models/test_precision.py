"""Float32 products name their precision, so that no platform multiplies in fewer bits.

Checked for scores, their gradients and rollouts; losses use the same head products.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fireopd_jax.models.architecture import MoEConfig
from fireopd_jax.models.quantized import quantize_params
from fireopd_jax.rollout.engine import generate
from fireopd_jax.rollout.kv_dense import Dense
from fireopd_jax.rollout.kv_paged import Paged
from fireopd_jax.rollout.kv_paged_gpu import PagedGPU
from fireopd_jax.rollout.sampling import Sampling
from tests.cases import equations_of, make_prompts, random_params, response_stats, tiny_model

ROOM = 4
PROMPTS = make_prompts([3, 2], 3)
TOKENS, MASK = np.ones((2, ROOM), np.int32), np.ones((2, ROOM), bool)


PRODUCTS = "dot_general", "ragged_dot", "ragged_dot_general"


def products(jaxpr):
    """Return all float32 products of a traced program."""
    for equation in equations_of(jaxpr):
        types = {operand.aval.dtype for operand in equation.invars[:2]}
        if equation.primitive.name in PRODUCTS and types == {jnp.dtype("float32")}:
            yield equation


def check(function, *arguments, least):
    found = list(products(jax.make_jaxpr(function)(*arguments).jaxpr))
    assert len(found) >= least
    for equation in found:
        assert equation.params["precision"] == (lax.Precision.HIGHEST,) * 2, equation


MODELS = {
    "dense": ({}, False),
    "mixture": ({"moe": MoEConfig(num_experts=4, moe_intermediate_size=8)}, False),
    "quantised": ({}, True),
    "quantised mixture": ({"moe": MoEConfig(num_experts=4, moe_intermediate_size=8)}, True),
}


@pytest.mark.parametrize(("architecture", "quantised"), MODELS.values(), ids=MODELS)
def test_scores_and_their_gradients(architecture, quantised):
    model = tiny_model(**architecture)
    params = random_params(model)

    def score(params):
        params = quantize_params(params) if quantised else params
        stats = response_stats(model, params, PROMPTS.tokens, PROMPTS.length, TOKENS, MASK)
        return stats.logprob.sum()

    # Four projections, two products of attention, three of the MLP or its experts, the head.
    check(score, params, least=10)
    if not quantised:
        check(jax.grad(score), params, least=20)


@pytest.mark.parametrize(
    "memory", [Dense(), Paged(page_size=16), PagedGPU(page_size=16)], ids=lambda m: m.kind
)
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_rollouts(memory):
    model = tiny_model(head_dim=16)

    def respond(params):
        sampling = Sampling.of((), ROOM, 0)
        return generate(
            model, params, PROMPTS, sampling, jnp.int32(0), max_tokens=ROOM, memory=memory
        )

    check(respond, random_params(model), least=18)
