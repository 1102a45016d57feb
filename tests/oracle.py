"""What only the tests compare with, in NumPy float64 with plain loops.

The equations that users can check, too, are in `fireopd_jax.verify.reference_batch` and
`fireopd_jax.verify.reference`.
"""

import numpy as np

from fireopd_jax.verify import reference_batch as reference


def released(
    teacher_logprob,
    student_logprob,
    teacher_entropy,
    student_entropy,
    mask,
    micro_batch,
    drop_fraction=0.2,
    alpha=1.0,
    beta=1.0,
):
    """FiRe-OPD as the authors released it: every statistic belongs to a micro-batch.

    Interpolated quantile and >=; maxima and the mean weight over all tokens of the micro-batch,
    dropped rows included; token mean over the kept ones; plain mean over micro-batches.
    """
    all_weights, all_keep, losses = np.zeros(np.shape(mask)), np.zeros(len(mask), bool), []
    scores = reference.trajectory_score(teacher_logprob, mask)
    for first in range(0, len(mask), micro_batch):
        rows = list(range(first, min(first + micro_batch, len(mask))))
        ordered = sorted(scores[i] for i in rows)
        position = drop_fraction * (len(rows) - 1)
        low = int(np.floor(position))
        high = min(low + 1, len(rows) - 1)
        threshold = ordered[low] + (position - low) * (ordered[high] - ordered[low])
        teacher_max = reference.entropy_maximum(teacher_entropy, mask, rows)
        student_max = reference.entropy_maximum(student_entropy, mask, rows)
        tokens = [(i, t) for i in rows for t in range(mask.shape[1]) if mask[i, t]]
        for i, t in tokens:
            all_weights[i, t] = reference.raw_weight(
                teacher_entropy[i, t], student_entropy[i, t], teacher_max, student_max, alpha, beta
            )
        mean = sum(all_weights[i, t] for i, t in tokens) / len(tokens)
        total, count = 0.0, 0
        for i in rows:
            all_weights[i] /= mean
            all_keep[i] = scores[i] >= threshold
        for i, t in tokens:
            if all_keep[i]:
                total += all_weights[i, t] * (student_logprob[i, t] - teacher_logprob[i, t])
                count += 1
        losses.append(total / (count + 1e-8))
    return all_weights, all_keep, sum(losses) / len(losses)


def int8(kernel):
    """Whole numbers and steps of a kernel [I, O]: s_o = max_i |W_io| / 127, q = round(W / s)."""
    kernel = np.asarray(kernel, np.float64)
    values, steps = np.zeros(kernel.shape, np.int64), np.zeros(kernel.shape[1])
    for o in range(kernel.shape[1]):
        steps[o] = max(abs(w) for w in kernel[:, o]) / 127
        for i in range(kernel.shape[0]):
            values[i, o] = round(kernel[i, o] / steps[o]) if steps[o] else 0
    return values, steps


def attention(q, k, v, segments, c, window=None, positions=None, scale=None):
    """Causal attention within segments, and the gradient of its product with c; NaN stays inside.

    q, c [B, T, N, H], k, v [B, K, T, H]; segment 0 is padding. Returns (out, d_q, d_k, d_v).
    """
    q, k, v, c = (np.asarray(x, np.float64) for x in (q, k, v, c))
    out, d_q, d_k, d_v = (np.zeros_like(x) for x in (q, q, k, v))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    for b, t, n in np.ndindex(q.shape[:3]):
        if not segments[b, t]:
            continue
        place = np.arange(q.shape[1]) if positions is None else positions[b]
        seen = [
            j
            for j in range(t + 1)
            if segments[b, j] == segments[b, t] and (window is None or place[t] - place[j] < window)
        ]
        g = n // (q.shape[2] // k.shape[1])
        z = scale * k[b, g, seen] @ q[b, t, n]
        p = np.exp(z - z.max())
        p /= p.sum()
        out[b, t, n] = p @ v[b, g, seen]
        d_p = v[b, g, seen] @ c[b, t, n]
        d_z = scale * p * (d_p - p @ d_p)
        d_q[b, t, n] = d_z @ k[b, g, seen]
        d_k[b, g, seen] += d_z[:, None] * q[b, t, n]
        d_v[b, g, seen] += p[:, None] * c[b, t, n]
    return out, d_q, d_k, d_v
