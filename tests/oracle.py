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
