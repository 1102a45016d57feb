"""The papers' equations in NumPy float64 with plain loops; independent of the package.

Arrays in, arrays out. Masked entries of the inputs are never used.
"""

import numpy as np


def head_stats(hidden, head, ids, scale=1.0):
    """Log-probability of `ids`, entropy and log-sum-exp of softmax(scale * hidden head^T)."""
    hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
    rows = []
    for state, token in zip(hidden, ids, strict=True):
        z = scale * (head @ state)
        lse = z.max() + np.log(np.exp(z - z.max()).sum())
        lp = z - lse
        rows.append((lp[token], -(np.exp(lp) * lp).sum(), lse))
    return tuple(np.array(rows, np.float64).reshape(-1, 3).T)


def head_gradients(hidden, head, ids, cotangents, scale=1.0):
    """Gradients of the cotangent-weighted sum of `head_stats` to `hidden` and `head`."""
    hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
    d_hidden, d_head = np.zeros_like(hidden), np.zeros_like(head)
    for n, token in enumerate(ids):
        z = scale * (head @ hidden[n])
        lse = z.max() + np.log(np.exp(z - z.max()).sum())
        lp = z - lse
        p = np.exp(lp)
        entropy = -(p * lp).sum()
        to_logprob, to_entropy, to_lse = (np.float64(c[n]) for c in cotangents)
        dz = (to_lse - to_logprob) * p - to_entropy * p * (lp + entropy)
        dz[token] += to_logprob
        d_hidden[n] = scale * (head.T @ dz)
        d_head += scale * np.outer(dz, hidden[n])
    return d_hidden, d_head


def head_logits(hidden, head, scale=1.0, softcap=None, valid=None):
    """Logits scale * c tanh(hidden head^T / c) over the first `valid` token ids."""
    x = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)[:valid].T
    return scale * (x if softcap is None else softcap * np.tanh(x / softcap))


def head_topk(z, k):
    """Ids and log-probabilities of the k largest logits; ties: lowest id; padding: -1 and -inf."""
    ids, logprob = np.full((len(z), k), -1), np.full((len(z), k), -np.inf)
    for n, row in enumerate(z):
        lse = row.max() + np.log(np.exp(row - row.max()).sum())
        order = sorted(range(len(row)), key=lambda v: (-row[v], v))[:k]
        ids[n, : len(order)] = order
        logprob[n, : len(order)] = row[order] - lse
    return ids, logprob


def head_gather(z, ids, support_ids):
    """Log-probability, entropy, log-sum-exp, and the support's log-probabilities (-inf for -1)."""
    rows, support = [], np.full(np.shape(support_ids), -np.inf)
    for n, row in enumerate(z):
        lse = row.max() + np.log(np.exp(row - row.max()).sum())
        lp = row - lse
        rows.append((lp[ids[n]], -(np.exp(lp) * lp).sum(), lse))
        for j, v in enumerate(support_ids[n]):
            if 0 <= v < len(row):
                support[n, j] = lp[v]
    return (*np.array(rows, np.float64).reshape(-1, 3).T, support)


def head_gather_gradients(
    hidden, head, ids, support_ids, cotangents, scale=1.0, softcap=None, valid=None
):
    """Gradients of the cotangent-weighted sum of `head_gather` to `hidden` and `head`."""
    hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
    d_hidden, d_head = np.zeros_like(hidden), np.zeros_like(head)
    z = head_logits(hidden, head, scale, softcap, valid)
    for n, row in enumerate(z):
        lse = row.max() + np.log(np.exp(row - row.max()).sum())
        lp = row - lse
        p = np.exp(lp)
        dz = -np.float64(cotangents[1][n]) * p * (lp - (p * lp).sum())
        dz += np.float64(cotangents[2][n]) * p
        picks = [(ids[n], cotangents[0][n]), *zip(support_ids[n], cotangents[3][n], strict=True)]
        for v, to in picks:
            if 0 <= v < len(row):
                dz -= np.float64(to) * p
                dz[v] += np.float64(to)
        if softcap is not None:
            dz *= 1 - (row / scale / softcap) ** 2
        d_hidden[n] = scale * (head[: len(row)].T @ dz)
        d_head[: len(row)] += scale * np.outer(dz, hidden[n])
    return d_hidden, d_head


def trajectory_score(teacher_logprob, mask):
    """Eq. 4: mean teacher log-probability over the row's own tokens; NaN on an empty row."""
    scores = []
    for logprob, valid in zip(np.asarray(teacher_logprob, np.float64), mask, strict=True):
        tokens = [logprob[t] for t in range(len(valid)) if valid[t]]
        scores.append(sum(tokens) / len(tokens) if tokens else np.nan)
    return np.array(scores)


def keep_rows(teacher_logprob, mask, drop_fraction, groups=None):
    """Drop the floor(rho n) lowest of each group's n non-empty rows; ties: the earlier row."""
    scores = trajectory_score(teacher_logprob, mask)
    groups = [0] * len(scores) if groups is None else list(groups)
    keep = np.zeros(len(scores), bool)
    for group in set(groups):
        rows = [i for i in range(len(scores)) if groups[i] == group and any(mask[i])]
        rows.sort(key=lambda i: scores[i])
        for i in rows[int(np.floor(drop_fraction * len(rows) + 1e-9)) :]:
            keep[i] = True
    return keep


def keep_tokens(
    teacher_logprob,
    student_logprob,
    student_entropy,
    mask,
    progress,
    *,
    floor,
    entropy_fraction,
    switch,
):
    """REOPOLD: tokens with log q/p >= (ln floor) / (1 - floor); later those with high entropy.

    High: at least the (1 - entropy_fraction)-quantile over all tokens, linearly interpolated.
    """
    teacher_logprob, student_logprob = (
        np.asarray(x, np.float64) for x in (teacher_logprob, student_logprob)
    )
    entropy, keep = np.asarray(student_entropy, np.float64), np.zeros(np.shape(mask), bool)
    tokens = list(zip(*np.nonzero(mask), strict=True))
    ordered = sorted(entropy[i, t] for i, t in tokens)
    place = (1 - entropy_fraction) * (len(ordered) - 1)
    low = int(np.floor(place))
    above = ordered[min(low + 1, len(ordered) - 1)]
    border = ordered[low] + (place - low) * (above - ordered[low])
    for i, t in tokens:
        if progress < switch:
            ratio = teacher_logprob[i, t] - student_logprob[i, t]
            keep[i, t] = ratio >= np.log(floor) / (1 - floor)
        else:
            keep[i, t] = entropy[i, t] >= border
    return keep


def progressive(teacher_logprob, student_logprob, mask, gamma):
    """IW-OPD: 1 + gamma (1 - sum_{u < t} |A_u| / sum_u |A_u|), A = log q - log p."""
    result = np.zeros(np.shape(mask))
    for i in range(len(mask)):
        tokens = [t for t in range(len(mask[i])) if mask[i][t]]
        gaps = [abs(float(teacher_logprob[i][t]) - float(student_logprob[i][t])) for t in tokens]
        for n, t in enumerate(tokens):
            met = sum(gaps[:n]) / sum(gaps) if sum(gaps) > 0 else 0.0
            result[i, t] = 1 + gamma * (1 - met)
    return result


def overlap(z, z_q, k):
    """Overlap of two models' k most probable token ids at each position, as a dict of arrays.

    With S the common ids: the ratio |S| / k, the masses sum_S p and sum_S q, and the advantage, the
    mean over S of p^ (log q^ - log p^), p^ = p / sum_S p and q^ likewise; 0 if S is empty.
    """
    own, theirs = head_topk(z, k)[0], head_topk(z_q, k)[0]
    found = {name: [] for name in ("ratio", "student_mass", "teacher_mass", "advantage")}
    for n, (row, other) in enumerate(zip(z, z_q, strict=True)):
        common = sorted(set(own[n].tolist()) & set(theirs[n].tolist()) - {-1})
        p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (row, other))
        p, q = p[common], q[common]
        found["ratio"].append(len(common) / k)
        found["student_mass"].append(p.sum())
        found["teacher_mass"].append(q.sum())
        p, q = (x / x.sum() if common else x for x in (p, q))
        found["advantage"].append((p * np.log(q / p)).mean() if common else 0.0)
    return {name: np.array(values) for name, values in found.items()}


def support(kind, own, theirs, sampled=None):
    """The set of token ids on which student and teacher are compared; -1 marks an empty slot."""
    own, theirs = set(own) - {-1}, set(theirs) - {-1}
    sets = {"teacher": theirs, "student": own, "union": own | theirs, "intersection": own & theirs}
    return sets[kind] | ({sampled} if sampled is not None else set())


def entropy_maximum(entropy, mask, rows, quantile=1.0):
    """The quantile of the token entropies of `rows`, at least 1e-6."""
    values = [entropy[i, t] for i in rows for t in range(mask.shape[1]) if mask[i, t]]
    return max(1e-6, np.quantile(values, quantile)) if values else 1e-6


def raw_weight(teacher_entropy, student_entropy, teacher_max, student_max, alpha, beta):
    """Eq. 5-7 for one token."""
    confidence = min(max(1 - teacher_entropy / teacher_max, 0.0), 1.0)
    confusion = min(max(student_entropy / student_max, 0.0), 1.0)
    return (1 + alpha * confidence) * (1 + beta * confusion)


def weights(
    teacher_entropy,
    student_entropy,
    mask,
    keep,
    alpha=1.0,
    beta=1.0,
    scope="batch",
    teacher=None,
    vocab_size=0,
    quantile=1.0,
):
    """Eq. 5-8: mean 1 over each row's own tokens; maxima over `scope`, or log V."""
    teacher_entropy = np.asarray(teacher_entropy, np.float64)
    student_entropy = np.asarray(student_entropy, np.float64)
    mask = np.asarray(mask)
    result = np.zeros(mask.shape)
    for i in range(len(mask)):
        rows = {
            "batch": range(len(mask)),
            "kept": [j for j in range(len(mask)) if keep[j]],
            "teacher": [j for j in range(len(mask)) if teacher is None or teacher[j] == teacher[i]],
            "row": [i],
            "vocabulary": [],
        }[scope]
        teacher_max = entropy_maximum(teacher_entropy, mask, rows, quantile)
        student_max = entropy_maximum(student_entropy, mask, rows, quantile)
        if scope == "vocabulary":
            teacher_max = student_max = np.log(vocab_size)
        tokens = [t for t in range(mask.shape[1]) if mask[i, t]]
        for t in tokens:
            result[i, t] = raw_weight(
                teacher_entropy[i, t], student_entropy[i, t], teacher_max, student_max, alpha, beta
            )
        if tokens:
            result[i] /= sum(result[i, t] for t in tokens) / len(tokens)
    return result


def coefficients(mask, keep, aggregate="seq"):
    """Each token's share of the loss; `keep` is bool [B] (rows) or [B, T] (tokens)."""
    keep = np.asarray(keep)
    kept = np.asarray(mask) & (keep if keep.ndim == 2 else keep[:, None])
    result = np.zeros(np.shape(mask))
    rows = [i for i in range(len(mask)) if any(kept[i])]
    total = sum(int(np.sum(kept[i])) for i in rows)
    for i in rows:
        for t in range(len(kept[i])):
            if kept[i][t]:
                length = int(np.sum(kept[i]))
                result[i, t] = 1 / (length * len(rows)) if aggregate == "seq" else 1 / total
    return result


def surrogate(advantage, difference, clip):
    """max(-A r, -A clip(r, 1 - eps, 1 + eps)), r = e^difference, and its derivative to log r."""
    ratio = np.exp(min(max(difference, -20.0), 20.0))
    clipped = min(max(ratio, 1 - clip), 1 + clip)
    free = -advantage * ratio >= -advantage * clipped and abs(difference) < 20
    return max(-advantage * ratio, -advantage * clipped), -advantage * ratio if free else 0.0


def importance(old, drawn, cap):
    """The weight min(e^(log p_old - log mu), cap) of a token sampled from mu; 1 without a cap."""
    return 1.0 if cap is None else min(np.exp(min(max(old - drawn, -20.0), 20.0)), cap)


def sampled_reverse_kl(logprob, old, teacher, mask, clip=0.2, rollout=None, cap=None):
    """Clipped surrogate per token, and its derivative to `logprob`."""
    loss, slope = np.zeros(np.shape(mask)), np.zeros(np.shape(mask))
    for i, t in zip(*np.nonzero(mask), strict=True):
        advantage = float(teacher[i][t]) - float(old[i][t])
        difference = float(logprob[i][t]) - float(old[i][t])
        loss[i, t], slope[i, t] = surrogate(advantage, difference, clip)
        if cap is not None:
            assert rollout is not None
            factor = importance(float(old[i][t]), float(rollout[i][t]), cap)
            loss[i, t] *= factor
            slope[i, t] *= factor
    return loss, slope
