"""Divergences between the student's and the teacher's distributions over the whole vocabulary.

    hidden, head of both -> chunks of both logits -> log p, log q -> sum of terms         forward
    cotangent -> the same chunks -> d z = a - p sum a, a = dL/d log p -> d hidden, d head  backward

As in `head`: `reference` computes full logits and JAX differentiates them; `chunked`, the default
on every platform, has no array of size [N, V]. No gradient reaches the teacher.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Float32

from fireopd_jax.config import nearest
from fireopd_jax.ops import chunked, fused
from fireopd_jax.ops.blocks import default_chunk
from fireopd_jax.ops.checks import check_pair, check_sharding, check_valid
from fireopd_jax.ops.dispatch import PLAIN
from fireopd_jax.ops.formulas import AdaptiveKL, Divergence
from fireopd_jax.ops.logits import HeadSettings, HeadSharding, dot, head_rows, with_rows
from fireopd_jax.ops.partials import LOWEST
from fireopd_jax.ops.reference import all_logits
from fireopd_jax.types import Array

IMPLEMENTATIONS = (PLAIN, "chunked")


@dataclasses.dataclass(frozen=True)
class PairSettings:
    """Static arguments of one compilation: the divergence and the head settings of both models."""

    divergence: Divergence
    student: HeadSettings
    teacher: HeadSettings


Operands = tuple[Array, Array, Array, Array, Array]
"""hidden and head of the student, hidden and head of the teacher, logit scale"""


def head_divergence(
    divergence: Divergence,
    hidden: Float[Array, "*N D"],
    head: Float[Array, "V D"] | Float[Array, "D V"],
    teacher_hidden: Float[Array, "*N E"],
    teacher_head: Float[Array, "W E"] | Float[Array, "E W"],
    *,
    logit_scale: float | Float32[Array, ""] = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    valid: int | None = None,
    head_layout: str = "vd",
    sharding: HeadSharding | None = None,
    implementation: str | None = None,
    chunk: int | None = None,
) -> Float32[Array, "*N"]:
    """Return the divergence sum_v term_v at each position, in nats, as float32.

    p = softmax(logit_scale cap(hidden head^T)) is the student's distribution, q the teacher's
    likewise with `teacher_softcap`; `logit_scale` is 1 / temperature for both. Differentiable in
    `hidden` and `head`. Matrix products accumulate in float32; their operands, the gradient of the
    logits among them, have the dtype of the inputs. Both models use the first `valid` token ids, by
    default the vocabulary size of the smaller head. A NaN in the hidden states of a position
    affects that position only, and no gradient if the cotangent there is 0. Options as in
    `HeadOptions`; both heads have the same `head_layout`.

    Raises TypeError or ValueError for arguments that do not fit, and for sharding with `reference`.
    The divergences and their references are in `formulas`.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        known = ", ".join(IMPLEMENTATIONS)
        hint = nearest(implementation, IMPLEMENTATIONS)
        raise ValueError(f"head_divergence has no implementation {implementation!r}{hint}: {known}")
    check_pair(hidden, head, teacher_hidden, teacher_head, head_layout)
    transposed = head_layout == "dv"
    rows = head.shape[int(transposed)], teacher_head.shape[int(transposed)]
    shape = hidden.shape[:-1]
    check_sharding(sharding)
    if sharding is not None and implementation == PLAIN:
        raise ValueError(
            f"implementation {PLAIN!r} computes full logits and does not support sharding"
        )
    count = math.prod(shape)
    tokens = -(-count // (sharding.token_shards if sharding else 1))
    # Seven arrays (logits, log-probabilities, mixture, terms, slopes) exist for each chunk: smaller
    # chunks keep the scratch near that of the head statistics.
    width = max(hidden.shape[-1], teacher_hidden.shape[-1])
    size = chunk or max(default_chunk(tokens, width) // 4, 256)
    common = HeadSettings(
        vocabulary=check_valid(valid, min(rows)),
        chunk=size,
        softcap=softcap,
        transposed=transposed,
        sharding=sharding,
    )
    pair = PairSettings(divergence, common, dataclasses.replace(common, softcap=teacher_softcap))
    scale = jnp.asarray(logit_scale, jnp.float32)
    if sharding is not None and sharding.vocabulary is not None:
        # A device compares the same token ids of both.
        even = rows[0] + -rows[0] % sharding.vocabulary_shards
        head, teacher_head = (with_rows(each, even, transposed) for each in (head, teacher_head))
    flat, of_teacher = _flat_padded(hidden, sharding), _flat_padded(teacher_hidden, sharding)
    operands = (flat, head, of_teacher, teacher_head, scale)
    values: Any = (_reference if implementation == PLAIN else _chunked)(*operands, pair)
    return values[:count].reshape(shape)


def _flat_padded(states: Array, sharding: HeadSharding | None) -> Array:
    flat = jnp.reshape(states, (-1, states.shape[-1]))
    missing = -flat.shape[0] % (sharding.token_multiple if sharding else 1)
    return jnp.pad(flat, ((0, missing), (0, 0))) if missing else flat


def _reference(
    hidden, head, teacher_hidden, teacher_head, scale, pair: PairSettings
) -> Float32[Array, " N"]:
    fixed = lax.stop_gradient((teacher_hidden, teacher_head))
    z, z_q = all_logits(hidden, head, scale, pair.student), all_logits(*fixed, scale, pair.teacher)
    log_p, log_q = jax.nn.log_softmax(z, axis=1), jax.nn.log_softmax(z_q, axis=1)
    share = None
    if isinstance(pair.divergence, AdaptiveKL):
        gap = jnp.abs(jnp.exp(log_p) - jnp.exp(log_q))
        inside = z_q >= pair.divergence.head_threshold(z_q)[:, None]
        share = _ratio((gap * inside).sum(axis=1), gap.sum(axis=1))[:, None]
    return pair.divergence(log_p, log_q, share).sum(axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _chunked(
    hidden: Array,
    head: Array,
    teacher_hidden: Array,
    teacher_head: Array,
    scale: Array,
    pair: PairSettings,
) -> Float32[Array, " N"]:
    return _values(hidden, head, teacher_hidden, teacher_head, scale, pair)[0]


def _values(hidden, head, teacher_hidden, teacher_head, scale, pair: PairSettings):
    operands = (hidden, head, teacher_hidden, teacher_head, scale)
    value, saved = _on_shards(_forward, operands, (), pair)
    return value, (operands, saved)


def _gradients(pair: PairSettings, residuals, cotangent: Array):
    operands, saved = residuals
    d_hidden, d_head = _on_shards(_backward, operands, (saved, cotangent), pair)
    hidden, head, *_ = operands
    return d_hidden.astype(hidden.dtype), d_head.astype(head.dtype), None, None, None


_chunked.defvjp(_values, _gradients)


def _on_shards(run, operands: Operands, rest: tuple, pair: PairSettings):
    """Run `run` on each device's tokens and columns."""
    sharding, settings = pair.student.sharding, pair.student
    width = fused.width_axis(operands[1], settings)

    def local(hidden, head, teacher_hidden, teacher_head, scale, *rest):
        no_ids = jnp.zeros((0,), jnp.int32)
        *_, limit, local_settings = fused.local_inputs(head, no_ids, no_ids, pair.student)
        teacher = dataclasses.replace(local_settings, softcap=pair.teacher.softcap)
        own = PairSettings(pair.divergence, local_settings, teacher)
        operands = (hidden, head, teacher_hidden, teacher_head, scale)
        found = run(operands, limit, own, sharding, *rest)
        if run is _backward:
            d_hidden = fused.sum_of_columns(found[0], settings)
            return d_hidden, fused.sum_of_devices(found[1], width, settings)
        return found

    if sharding is None:
        return local(*operands, *rest)
    by_token = fused.by_token(settings)
    of_head = fused.head_spec(settings)
    inputs = (by_token, of_head, by_token, of_head, P(), *(by_token for _ in rest))
    d_head = fused.head_spec(settings, width)
    outputs = (fused.own_tokens(settings), d_head) if run is _backward else by_token
    sharded = jax.shard_map(
        local, mesh=sharding.mesh, in_specs=inputs, out_specs=outputs, check_vma=False
    )
    return sharded(*operands, *rest)


def _forward(operands: Operands, limit, pair: PairSettings, sharding: HeadSharding | None):
    """Return the divergence [N], and the residuals: both log-sum-exps, sum a and w."""
    axis = sharding.vocabulary if sharding else None
    zero = jnp.zeros(operands[0].shape[0], jnp.float32)

    def statistics(sums, first, width):
        (z, _, _), z_q = _chunk_logits(operands, first, width, limit, pair)
        return chunked.fold(sums[0], z), chunked.fold(sums[1], z_q)

    start = (chunked.empty(zero.size), chunked.empty(zero.size))
    both = chunked.scan_chunks(statistics, start, pair.student, pair.student.chunk)
    normaliser = tuple(_merge_logsumexp(m, s, axis) for m, s, _ in both)
    share = zero
    if pair.divergence.adaptive:
        share = _adaptive_share(operands, normaliser, limit, pair, axis)

    def terms(sums, first, width):
        (z, _, _), z_q = _chunk_logits(operands, first, width, limit, pair)
        each = _terms(z, z_q, normaliser, share, pair)
        return tuple(total + part.sum(axis=1) for total, part in zip(sums, each, strict=True))

    value, slopes = chunked.scan_chunks(terms, (zero, zero), pair.student, pair.student.chunk)
    if axis:
        value, slopes = lax.psum((value, slopes), axis)
    return value, (normaliser, slopes, share)


def _backward(
    operands: Operands, limit, pair: PairSettings, sharding: HeadSharding | None, saved, cotangent
) -> tuple[Array, Array]:
    """Return d hidden of a device's columns, and d head of its tokens."""
    hidden, head, *_ = operands
    normaliser, slopes, share = saved
    used = (cotangent != 0)[:, None]
    used_hidden = jnp.where(used, hidden, 0)
    operand = jnp.promote_types(hidden.dtype, head.dtype)
    # The sum over devices is in float32, so that d head is rounded once.
    dtype = jnp.float32 if sharding and sharding.tokens else head.dtype
    settings = pair.student

    def step(carry, first, width):
        d_hidden, d_head = carry
        (z, slope, rows), z_q = _chunk_logits(operands, first, width, limit, pair)
        _, a = _terms(z, z_q, normaliser, share, pair)
        p = jnp.exp(_log_softmax(z, normaliser[0]))
        d_z = cotangent[:, None] * (a - p * slopes[:, None])
        d_x = jnp.where(used, d_z * slope, 0.0).astype(operand)
        d_hidden = d_hidden + dot(d_x, rows, (1, 0))
        d_rows = chunked.rows_gradient(used_hidden, d_x, settings)
        d_head = lax.dynamic_update_slice_in_dim(
            d_head, d_rows.astype(dtype), first, axis=int(settings.transposed)
        )
        return d_hidden, d_head

    start = (jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(head.shape, dtype))
    return chunked.scan_chunks(step, start, settings, settings.chunk)


def _chunk_logits(operands: Operands, first, width: int, limit, pair: PairSettings):
    """Return the student's logits, slope and head rows of a chunk, and the teacher's logits."""
    hidden, head, teacher_hidden, teacher_head, scale = operands
    rows = head_rows(head, first, width, pair.student)
    z, slope = chunked.chunk_logits(hidden, rows, first, scale, limit, pair.student)
    of_teacher = head_rows(teacher_head, first, width, pair.teacher)
    z_q, _ = chunked.chunk_logits(teacher_hidden, of_teacher, first, scale, limit, pair.teacher)
    return (z, slope, rows), z_q


def _merge_logsumexp(m: Array, s: Array, axis: str | None) -> tuple[Array, Array]:
    """Return the maximum and the logarithm of the sum, merged over the devices of `axis`."""
    if axis:
        top = lax.pmax(m, axis)
        m, s = top, lax.psum(s * jnp.exp(m - top), axis)
    return m, jnp.log(s)


def _log_softmax(z: Array, normaliser: tuple[Array, Array]) -> Array:
    m, log_s = normaliser
    return jnp.maximum((z - m[:, None]) - log_s[:, None], LOWEST)


def _terms(
    z: Array, z_q: Array, normaliser, share: Array, pair: PairSettings
) -> tuple[Array, Array]:
    """Return the divergence terms of a chunk and their derivatives a with respect to log p."""
    log_p, log_q = _log_softmax(z, normaliser[0]), _log_softmax(z_q, normaliser[1])

    def of(log_p: Array) -> Array:
        return pair.divergence(log_p, log_q, share[:, None])

    return jax.jvp(of, (log_p,), (jnp.ones_like(log_p),))


def _adaptive_share(
    operands: Operands, normaliser, limit, pair: PairSettings, axis: str | None
) -> Float32[Array, " N"]:
    """Return w = sum_H |q - p| / sum_V |q - p| of each position.

    The threshold of H needs whole rows of teacher logits, gathered over `axis`, so it is computed
    for some rows at a time.
    """
    divergence, settings = pair.divergence, pair.teacher
    assert isinstance(divergence, AdaptiveKL)
    _, _, teacher_hidden, teacher_head, scale = operands
    count = teacher_hidden.shape[0]
    # As many whole rows as together have the elements of a chunk.
    shards = lax.axis_size(axis) if axis else 1
    size = max(1, count * settings.chunk // (settings.vocabulary * shards))
    missing = -count % size
    blocks = jnp.pad(teacher_hidden, ((0, missing), (0, 0))).reshape(-1, size, operands[2].shape[1])

    def threshold_of(block: Array) -> Array:
        z = all_logits(block, teacher_head, scale, settings)
        if limit is not None:
            z = jnp.where((jnp.arange(z.shape[1]) < limit)[None], z, -jnp.inf)
        return divergence.head_threshold(lax.all_gather(z, axis, axis=1, tiled=True) if axis else z)

    threshold = lax.map(threshold_of, blocks).reshape(-1)[:count]

    def gaps(sums, first, width):
        (z, _, _), z_q = _chunk_logits(operands, first, width, limit, pair)
        gap = jnp.abs(
            jnp.exp(_log_softmax(z, normaliser[0])) - jnp.exp(_log_softmax(z_q, normaliser[1]))
        )
        inside = jnp.where(z_q >= threshold[:, None], gap, 0.0)
        return sums[0] + inside.sum(axis=1), sums[1] + gap.sum(axis=1)

    zero = jnp.zeros(count, jnp.float32)
    sums = chunked.scan_chunks(gaps, (zero, zero), pair.student, pair.student.chunk)
    return _ratio(*(lax.psum(sums, axis) if axis else sums))


def _ratio(part: Array, whole: Array) -> Array:
    return part / jnp.where(whole > 0, whole, 1.0)
