"""The compiled programs of the quickstart's recipe: what they never hold."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from fireopd_jax.recipe.schema import load_config
from fireopd_jax.session.setup import set_up
from fireopd_jax.training.programs import make_programs
from fireopd_jax.types import Prompts, Rollout
from tests import cases

VOCABULARY, CHUNK, ROWS = 6000, 512, 32


def programs(head):
    """Compile score and update of the quickstart with a vocabulary that is worth a chunk."""
    arguments = [
        f"{model}.architecture.vocab_size={VOCABULARY}" for model in ("student", "teacher")
    ]
    config = load_config(
        [
            "quickstart",
            *arguments,
            f"rollout.batch_size={ROWS}",
            "mesh.data=1",
            f"method.score.head={head}",
            f"method.score.head_chunk={CHUNK}",
        ]
    )
    setup = set_up(config)
    # The byte tokenizer's few ids would cut the head; here all of it shall count.
    student, *teachers = (unpadded(spec) for spec in (setup.student, *setup.teachers))
    setup = dataclasses.replace(setup, student=student, teachers=tuple(teachers))
    made = make_programs(setup, config.method, config.optim)
    shape = np.zeros
    prompt, row = shape((ROWS, 16), np.int32), shape((ROWS,), np.int32)
    response = config.rollout.max_tokens
    tokens, values = (shape((ROWS, response), dtype) for dtype in (np.int32, np.float32))
    mask, finished = shape((ROWS, response), bool), shape((ROWS,), bool)
    prompts = Prompts(prompt, row, prompt, row, row, row, row, row)
    rollout = Rollout(prompts, tokens, mask, values, values, finished, tokens, tokens)
    key, temperature = jax.random.key(0), shape((), np.float32)
    params = jax.eval_shape(setup.student.model.init, key)
    teachers = [jax.eval_shape(teacher.model.init, key) for teacher in setup.teachers]
    state = jax.eval_shape(made.init, params)
    inputs = params, teachers, rollout, temperature, state.updates, state.stages, None
    score = made.score.jitted.lower(*inputs)
    batch, *_ = jax.eval_shape(made.score.jitted, *inputs)
    update = made.update.lower(state, batch, temperature)
    return config, {"score": score.compile().as_text(), "update": update.compile().as_text()}


def unpadded(spec):
    """Return the spec with every row of the head as a token."""
    return dataclasses.replace(spec, model=dataclasses.replace(spec.model, valid=None))


def of_logits(shape, tokens, columns):
    """Return whether an array has a logit for each of these tokens and columns."""
    return math.prod(shape) >= tokens * columns and any(size >= columns for size in shape)


@pytest.mark.parametrize(
    ("head", "born"), [("null", False), pytest.param("reference", True, marks=pytest.mark.slow)]
)
def test_no_program_holds_the_logits_of_a_batch(head, born):
    config, texts = programs(head)
    micro = {"score": ROWS, "update": config.optim.micro_batch_size or ROWS}
    for name, text in texts.items():
        tokens = micro[name] * config.rollout.max_tokens
        seen = cases.compiled_shapes(text)
        found = {shape for shape in seen if of_logits(shape, tokens, VOCABULARY)}
        assert bool(found) == born, f"{name} holds {found}"
        chunks = {shape for shape in seen if math.prod(shape) == tokens * CHUNK}
        assert chunks or born, f"{name}: the walk does not see the chunks"
        models = [config.student, *config.teachers.values()]
        widest = max(model.architecture.hidden_size for model in models)
        allowed = max(tokens * CHUNK, VOCABULARY * widest)
        if not born:
            largest = max(seen, key=math.prod)
            assert math.prod(largest) <= allowed, f"{name} holds {largest}"
