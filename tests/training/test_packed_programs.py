"""What compiled programs of packed rows hold: nothing of S x S, nothing of tokens x vocabulary."""

import dataclasses

import jax
import numpy as np
import pytest

from fireopd_jax.method.filtering import TeacherQuantile
from fireopd_jax.method.losses.sampled_token import SampledReverseKL
from fireopd_jax.method.reweighting import ConfidenceConfusion
from fireopd_jax.method.scoring import SampledToken, TopK
from fireopd_jax.training.update import gradients
from tests import cases

ROWS, P, T, VOCABULARY, PASS = 4, 144, 624, 8200, 768
"""Rows, prompt and response tokens, token ids, tokens of a pass: numbers of no other axis."""
WIDTHS = {1, 16}
"""Other axes of an array with an axis of token ids."""
MODEL = cases.tiny_model(VOCABULARY, num_hidden_layers=2)


def rollout():
    given = cases.make_rollout(np.ones((ROWS, T), bool))
    return dataclasses.replace(given, prompts=cases.make_prompts([1, 2, 3, P], P))


def scored(stage):
    params = MODEL.init(jax.random.key(0))
    return lambda of: cases.scored(stage, (MODEL, params), [(MODEL, params)], of, 1.0)


def program(name, tokens):
    """Return the compiled score or update as text; rows are padded where `tokens` is None."""
    if name != "update":
        stage = {"sampled": SampledToken, "top_k": lambda **of: TopK(k=4, **of)}[name]
        return jax.jit(scored(stage(micro_batch_tokens=tokens))).lower(rollout()).compile()
    stages = TeacherQuantile(drop_fraction=0.25), ConfidenceConfusion()
    scores = scored(SampledToken())(rollout())
    batch = cases.assembled(rollout(), scores, *stages, "seq", 1)[0]

    def update(params, batch):
        of = {"micro_batch_tokens": tokens}
        return gradients(MODEL, SampledReverseKL(), params, batch, 1.0, **of)[0]

    return jax.jit(update).lower(MODEL.init(jax.random.key(0)), batch).compile()


def too_large(compiled):
    """Yield shapes with the length of a row or pack twice, or with all logits of many tokens."""
    for shape in cases.compiled_shapes(compiled.as_text()):
        if sum(size in (P + T, P + T - 1, PASS) for size in shape) > 1:
            yield shape
        if VOCABULARY in shape and not {n for n in shape if n != VOCABULARY} <= WIDTHS:
            yield shape


@pytest.mark.parametrize("name", ["sampled", "top_k", "update"])
def test_no_array_of_length_squared_nor_of_all_logits_is_in_a_program(name):
    assert not set(too_large(program(name, PASS)))


def test_such_arrays_are_found():
    def naive(x, matrix):
        return (x @ x.T).sum() + jax.nn.logsumexp(x @ matrix, axis=1).sum()

    x, matrix = (
        jax.ShapeDtypeStruct((PASS, 16), "float32"),
        jax.ShapeDtypeStruct((16, VOCABULARY), "float32"),
    )
    assert len(set(too_large(jax.jit(naive).lower(x, matrix).compile()))) == 2
