"""Small models, prompts, rollouts and scores for tests."""

import os
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireopd_jax.method.batch import assemble, stage_context
from fireopd_jax.method.scoring import Resident, ScoreInputs
from fireopd_jax.models.decoder import DecoderConfig
from fireopd_jax.models.language_model import LanguageModel
from fireopd_jax.ops import pallas_gpu_tile
from fireopd_jax.ops.attention import attend, visible_keys
from fireopd_jax.ops.dispatch import has_one_hopper_gpu
from fireopd_jax.ops.head import head_stats
from fireopd_jax.rollout.loop import Loop
from fireopd_jax.rollout.sampling import Sampling
from fireopd_jax.rollout.state import Shape, empty_requests, initial_state
from fireopd_jax.session.session import Session
from fireopd_jax.types import Prompts, Rollout, Scores, TokenStats


def one_device():
    """Return the environment of a process with one device, and the same compiler as here.

    Another level of optimisation would give other bits.
    """
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    return os.environ | {"XLA_FLAGS": flags}


def make_rollout(mask, teacher=None, logprob=None):
    """Return a rollout with this mask; its tokens and prompts are arbitrary."""
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
        writer=np.zeros(mask.shape, np.int32),
    )


def make_session(setup, generate=None):
    """Return a session without a folder, which samples by `generate`."""
    session = object.__new__(Session)
    session.setup, session.generate = setup, generate
    return session


def assembled(rollout, scores, filter, reweight, aggregate="seq", num_teachers=1, **known):
    """Return the batch assembled by stateless stages, and the keep mask."""
    context = stage_context(rollout, num_teachers, **known)
    out = assemble(rollout, scores, filter, reweight, aggregate, context)
    return out.batch, out.keep


def scored(stage, student, teachers, rollout, temperature=1.0, **known):
    """Return the scores by models given as (model, parameters)."""
    base = known.pop("base", None)
    return stage(
        ScoreInputs(
            rollout,
            Resident(*student),
            [Resident(*each) for each in teachers],
            temperature,
            base=None if base is None else Resident(*base),
            **known,
        )
    )


def make_scores(student_logprob, teacher_logprob, student_entropy, teacher_entropy):
    """Return the scores of a student and a teacher, in float32."""
    arrays = (student_logprob, student_entropy, teacher_logprob, teacher_entropy)
    student, of_student, teacher, of_teacher = (jnp.asarray(x, jnp.float32) for x in arrays)
    return Scores(TokenStats(student, of_student), TokenStats(teacher, of_teacher))


def random_case(seed, rows=7, tokens=6, num_teachers=2):
    """Return (scores, mask, teacher); row 1 is empty, values outside the mask are NaN."""
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


def tiny_model(vocab_size=32, **architecture):
    """Return a one-layer decoder without parameters; keywords are fields of its architecture."""
    small = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 24,
    }
    return LanguageModel(DecoderConfig(**small | architecture), vocab_size)


def random_params(model, seed=0):
    """Return random parameters with spread logits and norm scales different from 1."""
    rng = np.random.default_rng(seed)
    shapes, tree = jax.tree.flatten_with_path(jax.eval_shape(model.init, jax.random.key(0)))
    leaves = []
    for path, leaf in shapes:
        noise = rng.standard_normal(leaf.shape)
        name = jax.tree_util.keystr(path[-1:], simple=True)
        if name == "scale":
            value = 1 + 0.2 * noise
        else:
            value = noise * (leaf.shape[-2] ** -0.5 if name == "kernel" else 0.5)
        leaves.append(jnp.asarray(value, jnp.float32))
    return jax.tree.unflatten(tree, leaves)


def same_structure(params, model):
    """Return whether `params` have the names and shapes of the model's parameters."""
    expected = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.structure(params) == jax.tree.structure(expected) and all(
        a.shape == b.shape
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True)
    )


def response_stats(
    model,
    params,
    prompt,
    prompt_length,
    tokens,
    mask,
    temperature=1.0,
    implementation=None,
    chunk=None,
    *,
    adapters=None,
    remat="none",
):
    """Return the log-probability of each response token and its distribution's entropy, f32[B, T].

    Values where `mask` is false are arbitrary.
    """
    hidden, head = model.response_hidden(
        params, prompt, prompt_length, tokens, mask, adapters=adapters, remat=remat
    )
    options = model.head_options(temperature, implementation, chunk)
    stats = head_stats(hidden, head, tokens, **options)
    return TokenStats(logprob=stats.logprob, entropy=stats.entropy)


def make_prompts(lengths, width, vocab_size=32, seed=0, sample_id=None, teacher=None):
    """Return prompts of these lengths; teacher prompts have one token more. Padding is random."""
    rng = np.random.default_rng(seed)
    length = np.asarray(lengths, np.int32)
    rows = np.arange(len(length), dtype=np.int32)
    tokens, theirs = (
        rng.integers(0, vocab_size, (len(rows), columns)).astype(np.int32)
        for columns in (width, width + 1)
    )
    return Prompts(
        tokens=tokens,
        length=length,
        teacher_tokens=theirs,
        teacher_length=length + np.int32(1),
        teacher=np.zeros_like(rows) if teacher is None else np.asarray(teacher, np.int32),
        row=rows,
        sample_id=rows if sample_id is None else np.asarray(sample_id, np.int32),
        group=rows,
    )


def through_cache(model, params, rows, prompt, memory, piece=8):
    """Return the hidden states of sequences: prompts by prefill, then token by token in slots."""
    prompt = np.asarray(prompt, np.int32)
    total = np.array([len(row) for row in rows], np.int32)
    capacity = -(-int(total.max()) // piece) * piece
    tokens = np.zeros((len(rows), capacity), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    order, held = jnp.arange(len(rows), dtype=jnp.int32), jnp.asarray(prompt)
    dtype = jnp.dtype(model.config.dtype)
    decode_params = jax.jit(model.to_decode_layout)(params)

    @jax.jit
    def prefill(decode_params, state, start):
        decoder, layers = model.bind_decode(decode_params)
        at = jnp.broadcast_to(start + jnp.arange(piece), (len(rows), piece))
        new = jnp.take_along_axis(tokens, at, axis=1)
        attention = memory.prefill(state, start, dtype)
        hidden, cache = decoder.extend(layers, new, at, attention, memory.prompt_cache(state))
        return hidden, memory.with_prompt_cache(state, cache)

    @jax.jit
    def decode(decode_params, state, position):
        decoder, layers = model.bind_decode(decode_params)
        going = position < total
        state = memory.allocate_tokens(state, position, going)
        new = jnp.take_along_axis(tokens, jnp.minimum(position, capacity - 1)[:, None], axis=1)
        attention = memory.decode(state, position, going, dtype)
        cache = memory.slot_cache(state)
        hidden, cache = decoder.extend(layers, new, position[:, None], attention, cache)
        return hidden, memory.with_slot_cache(state, cache)

    shape = Shape(len(rows), len(rows), piece, capacity, prompt=capacity)
    state = memory.allocate_prompts(memory.init(model.config, shape), held)
    parts = [[] for _ in rows]
    for start in range(0, int(prompt.max()), piece):
        hidden, state = prefill(decode_params, state, jnp.int32(start))
        for i, length in enumerate(prompt):
            parts[i].append(hidden[i, : max(0, int(length) - start)])
    state = jax.jit(lambda s: memory.insert(s, order, order, held, piece))(state)
    for t in range(int((total - prompt).max())):
        hidden, state = decode(decode_params, state, jnp.asarray(prompt + np.int32(t)))
        for i in range(len(rows)):
            if prompt[i] + t < total[i]:
                parts[i].append(hidden[i])
    return [np.concatenate([np.asarray(p, np.float32) for p in part]) for part in parts]


def plain_kernel(q, pool, lengths, tables, *_, sm_scale, sliding_window, **blocks):
    """Do what JAX's ragged paged attention does for one query a row, in plain JAX."""
    pages = pool[tables]
    rows, count, page, heads, width = pages.shape
    lines = pages.reshape(rows, count * page, heads // 2, 2, width).transpose(3, 0, 2, 1, 4)
    distance = lengths[:, None] - 1 - jnp.arange(count * page)[None]
    mask = visible_keys(distance, sliding_window)[:, None]
    return attend(q[:, None], *lines, mask, sm_scale)[:, 0]


def qwen_loop(memory, dtype="bfloat16"):
    """Return an engine's loop for two layers of Qwen3-0.6B's sizes, and its arguments' shapes."""
    config = tiny_model(
        hidden_size=1024,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3072,
        dtype=dtype,
    ).config
    model = LanguageModel(config, 151936)
    shape = Shape.of(64, 256, 768, 16, memory.align)
    loop = Loop(model, memory, shape.piece)

    def start(key):
        params = model.to_decode_layout(model.init(key))
        requests = empty_requests(64, 256, 768, Sampling.of((), 768, 0))
        cache = memory.init(config, shape)
        return params, initial_state(requests, shape.slots, shape.entries, cache)

    # The decode layout of the target, an accelerator: on a CPU, kernels would be transposed.
    with mock.patch.object(jax, "default_backend", lambda: "accelerator"):
        params, state = jax.eval_shape(start, jax.random.key(0))
    flat, tree = jax.tree.flatten((params, state, jnp.int32(0), jnp.int32(0)))
    return lambda *leaves: loop.run(*jax.tree.unflatten(tree, leaves)), flat


def equations_of(jaxpr):
    """Yield all equations of a traced program, also inside loops, branches and kernels."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations_of(inner)


def shapes_of(jaxpr):
    """Yield the shapes of all inputs and outputs of a traced program's equations."""
    for equation in equations_of(jaxpr):
        for variable in (*equation.invars, *equation.outvars):
            yield getattr(variable.aval, "shape", ())


def compiled_shapes(text):
    """Return the shapes of all arrays in the text of a compiled program."""
    found = re.findall(r"\b(?:f32|f16|bf16|s32|u32|pred)\[([\d,]+)\]", text)
    return {tuple(int(size) for size in each.split(",")) for each in found}


def skip_unless_hopper_kernels_run():
    """Skip a test of the Hopper kernels on other GPUs and on older JAX."""
    oldest = pallas_gpu_tile.OLDEST_JAX
    if jax.__version_info__ < oldest or not has_one_hopper_gpu():
        pytest.skip(f"needs one H100 or H200 and JAX {'.'.join(map(str, oldest))}")
