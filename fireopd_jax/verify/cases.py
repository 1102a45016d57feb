"""Inputs of the verification: states and heads of two models, small models, ragged rollouts.

Everything is drawn by NumPy from fixed seeds, so that every machine verifies the same cases.
"""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int32

from fireopd_jax.method.chunks import make_chunks
from fireopd_jax.method.scoring.supports import Kind, make_support, overlap
from fireopd_jax.models.decoder import DecoderConfig
from fireopd_jax.models.language_model import (
    LanguageModel,
    Params,
)
from fireopd_jax.ops.head import HeadOptions, head_gather, head_stats, head_topk
from fireopd_jax.types import Array, Audit, Prompts, Rollout, Scores, Support, TokenStats, pytree
from fireopd_jax.verify import reference_stages
from fireopd_jax.verify.reference_losses import Seen

VOCABULARY, WIDTH, TEACHER_WIDTH = 320, 16, 24
LENGTHS, ROOM = (6, 4, 0, 1, 5), 6
"""Response lengths, and the padded length T: one row is empty, most are padded."""
GROUPS = (0, 0, 1, 1, 0)
"""The prompt of each row."""
ALPHA = 1.5
"""Strength of the prior of audited chunks."""
SCALE = 1.25
"""Inverse temperature of both models."""
HEAD: HeadOptions = {"logit_scale": SCALE, "chunk": 128}
"""The chunk is smaller than the vocabulary, so that the logits take several chunks."""
K, SLOTS = 8, 17
"""Token ids in a model's top-K list, and in the largest support: both lists and the token."""
SMALL_VOCABULARY = 64


@pytree
class States:
    """Final hidden states and heads of a student and its teacher."""

    hidden: Float32[Array, "B T D"]
    """Of the student under training."""
    old: Float32[Array, "B T D"]
    """Of the student at scoring time."""
    base: Float32[Array, "B T D"]
    """Of the base policy, which shares the student's head."""
    head: Float32[Array, "V D"]
    teacher_hidden: Float32[Array, "B T E"]
    teacher_head: Float32[Array, "V E"]


def make_states(*, equal: bool = False, later: bool = False) -> States:
    """Return the states of two random models.

    `equal`: the two have the same logits. `later`: the student has been updated since scoring.
    """
    rng = np.random.default_rng(0)

    def draw(size: float, *shape: int) -> Array:
        return jnp.asarray(rng.normal(size=shape) * size, jnp.float32)

    at = len(LENGTHS), ROOM
    hidden, head = draw(1.0, *at, WIDTH), draw(0.4, VOCABULARY, WIDTH)
    # The teacher shares part of the student's logits, so that their top-K lists overlap.
    teacher_hidden = jnp.concatenate([hidden, draw(1.0, *at, TEACHER_WIDTH - WIDTH)], axis=2)
    teacher_head = jnp.concatenate([head, draw(0.4, VOCABULARY, TEACHER_WIDTH - WIDTH)], axis=1)
    moved, base = draw(0.1, *at, WIDTH), draw(0.4, *at, WIDTH)
    if equal:
        # The same logits from a wider state: the extra dimensions are zero.
        more = TEACHER_WIDTH - WIDTH
        teacher_hidden = jnp.pad(hidden, ((0, 0), (0, 0), (0, more)))
        teacher_head = jnp.pad(head, ((0, 0), (0, more)))
    old = hidden + moved if later else hidden
    return States(hidden, old, hidden + base, head, teacher_hidden, teacher_head)


def make_mask() -> Bool[np.ndarray, "B T"]:
    """Return the mask of the response tokens."""
    return np.arange(ROOM)[None] < np.array(LENGTHS)[:, None]


def dummy_rollout(seed: int = 1) -> Rollout:
    """Return random responses over the models' vocabulary, with placeholder prompts."""
    rng = np.random.default_rng(seed)
    mask = make_mask()
    rows = np.arange(len(mask), dtype=np.int32)
    group = np.array(GROUPS, np.int32)
    ones = np.ones((len(mask), 1), np.int32)
    drawn = jnp.asarray(-rng.exponential(4.0, mask.shape), jnp.float32)
    return Rollout(
        prompts=Prompts(ones, ones[:, 0], ones, ones[:, 0], np.zeros_like(rows), rows, rows, group),
        tokens=rng.integers(0, VOCABULARY, mask.shape).astype(np.int32),
        mask=jnp.asarray(mask),
        logprob=drawn,
        model_logprob=drawn,
        finished=np.ones(len(mask), bool),
        version=np.zeros(mask.shape, np.int32),
        writer=np.zeros(mask.shape, np.int32),
        audit=make_audit(mask.sum(axis=1)),
    )


def make_audit(length: Int32[np.ndarray, " B"] | np.ndarray) -> Audit:
    """Return audits of responses: chunks of 1 to 3 tokens; one got no continuation, some none."""
    rng = np.random.default_rng(7)
    anchor, size = np.full((len(length), 3), -1, np.int32), np.zeros((len(length), 3), np.int32)
    for i, most in enumerate(length):
        for m, (at, tokens) in enumerate(((0, 2), (3, 1), (4, 2))):
            if at + tokens <= most:
                anchor[i, m], size[i, m] = at, tokens
    samples = np.where(size > 0, 4.0, 0.0).astype(np.float32)
    samples[:: len(length) - 1, 1] = 0
    agreement = (samples * rng.uniform(0, 1, samples.shape)).astype(np.float32)
    return Audit(anchor, size, agreement, samples)


def audit_arrays(audit: Audit) -> tuple[np.ndarray, ...]:
    """Return the arrays of an audit as the reference takes them."""
    return tuple(map(np.asarray, (audit.anchor, audit.length, audit.agreement, audit.samples)))


def score(
    states: States, rollout: Rollout, kind: Kind = "teacher", sampled: bool = False
) -> Scores:
    """Return what the package's scoring stages return, computed from the models' states."""
    assert rollout.audit is not None
    tokens, options = jnp.asarray(rollout.tokens), HEAD
    own = head_topk(states.old, states.head, tokens, k=K, **options)
    theirs = head_topk(states.teacher_hidden, states.teacher_head, tokens, k=K, **options)
    base = head_stats(states.base, states.head, tokens, **options)
    lists = (own.top_ids, own.top_logprob), (theirs.top_ids, theirs.top_logprob)
    gathered = head_gather(
        states.teacher_hidden, states.teacher_head, tokens, own.top_ids, **options
    )
    support = make_support(
        kind,
        *lists,
        gathered.support_logprob,
        sampled=(tokens, theirs.logprob) if sampled else None,
        size=VOCABULARY,
    )
    # Supports are padded to one shape, so that one compiled program serves them all.
    empty = ((0, 0), (0, 0), (0, SLOTS - support.ids.shape[-1]))
    support = Support(
        jnp.pad(support.ids, empty, constant_values=-1),
        jnp.pad(support.teacher, empty, constant_values=-jnp.inf),
    )
    return Scores(
        TokenStats(own.logprob, own.entropy),
        TokenStats(theirs.logprob, theirs.entropy),
        base=TokenStats(base.logprob, base.entropy),
        support=support,
        overlap=overlap(*lists),
        chunks=make_chunks(rollout.audit, own.logprob, rollout.prompts.group, ALPHA),
        base_hidden=states.base,
    )


def logits(hidden: Array, head: Array, scale: float = 1.0) -> np.ndarray:
    """Return the logits [B, T, V] in float64, the input of the references."""
    return scale * (np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T)


def see(states: States, rollout: Rollout, scores: Scores) -> Seen:
    """Return the case as the input of the references."""
    assert scores.support is not None and rollout.audit is not None
    seen = Seen(
        z=logits(states.hidden, states.head, SCALE),
        z_q=logits(states.teacher_hidden, states.teacher_head, SCALE),
        z_old=logits(states.old, states.head, SCALE),
        z_base=logits(states.base, states.head, SCALE),
        tokens=np.asarray(rollout.tokens),
        mask=np.asarray(rollout.mask),
        support=np.asarray(scores.support.ids),
        drawn=np.asarray(rollout.logprob, np.float64),
    )
    return audited(seen, rollout, ALPHA)


def audited(seen: Seen, rollout: Rollout, alpha: float) -> Seen:
    """Return the case with the reference's weights of the audited chunks."""
    assert rollout.audit is not None
    arrays, group = audit_arrays(rollout.audit), np.asarray(rollout.prompts.group)
    chunks = reference_stages.chunk_targets(seen.logprob(seen.z_old), arrays, group, alpha)
    inside, target, _, baseline = chunks
    return dataclasses.replace(seen, audited=inside, target=target, baseline=baseline)


@dataclasses.dataclass(frozen=True)
class Bigram(LanguageModel):
    """A model whose state depends on the last token only; it compiles in a quarter of the time."""

    def init(self, key: Array) -> Params:
        """Return random parameters."""
        shape = self.vocab_size, self.config.hidden_size
        keys = jax.random.split(key)
        return {
            name: jax.random.normal(k, shape)
            for name, k in zip(("last", "head"), keys, strict=True)
        }

    def bind(self, params: Params) -> Any:
        """Return an object with the head as an attribute."""
        return types.SimpleNamespace(head=params["head"])

    def hidden(
        self,
        params: Params,
        tokens: Int32[Array, "B S"],
        positions: Int32[Array, "B S"],
        segments: Int32[Array, "B S"],
        *,
        adapters: Any = None,
        remat: Any = "none",
        attention: Any = None,
        mesh: Any = None,
    ) -> tuple[Float32[Array, "B S D"], Float32[Array, "V D"]]:
        """Return the states of whole sequences, and the head."""
        return jnp.asarray(params["last"])[tokens], params["head"]


def bigram() -> LanguageModel:
    """Return the bigram model, without parameters."""
    return Bigram(small_model().config, SMALL_VOCABULARY)


def small_model() -> LanguageModel:
    """Return a decoder of one layer, without parameters."""
    config = DecoderConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=24,
    )
    return LanguageModel(config, SMALL_VOCABULARY)


def random_params(model: LanguageModel, seed: int) -> Params:
    """Return random parameters that are far from the initial ones, so that logits are spread."""
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> Array:
        noise = rng.standard_normal(leaf.shape)
        # Norm scales (one vector per layer) are around 1; matrices preserve the input's scale.
        small = len(leaf.shape) < 2 or leaf.shape[-2] == model.config.num_hidden_layers
        wide = noise * max(leaf.shape[-2] ** -0.5, 0.25) if len(leaf.shape) > 1 else noise
        value = 1 + 0.2 * noise if small else wide
        return jnp.asarray(value, leaf.dtype)

    return jax.tree.map(draw, model.shapes())


def small_rollout(rows: int, more: int = 0) -> Rollout:
    """Return random prompts and responses; one in eight rows is empty, `more` padding columns."""
    rng = np.random.default_rng(2)
    length = np.resize([6, 3, 0, 1, 4, 6, 2, 5], rows)
    prompt_length = rng.integers(1, 4, rows).astype(np.int32)

    def draw(columns: int) -> np.ndarray:
        drawn = rng.integers(0, SMALL_VOCABULARY, (rows, columns)).astype(np.int32)
        junk = np.random.default_rng(3).integers(0, SMALL_VOCABULARY, (rows, more))
        return np.concatenate([drawn, junk.astype(np.int32)], axis=1)

    prompt, theirs, tokens = draw(4), draw(5), draw(6)
    index = np.arange(rows, dtype=np.int32)
    prompts = Prompts(
        tokens=prompt,
        length=prompt_length,
        teacher_tokens=theirs,
        teacher_length=prompt_length + np.int32(1),
        teacher=np.zeros_like(index),
        row=index,
        sample_id=index,
        group=index // np.int32(4),
    )
    drawn = jnp.zeros(tokens.shape, jnp.float32)
    return Rollout(
        prompts=prompts,
        tokens=tokens,
        mask=jnp.asarray(np.arange(tokens.shape[1])[None] < length[:, None]),
        logprob=drawn,
        model_logprob=drawn,
        finished=np.ones(rows, bool),
        version=np.zeros(tokens.shape, np.int32),
        writer=np.zeros(tokens.shape, np.int32),
        audit=make_audit(length),
    )
