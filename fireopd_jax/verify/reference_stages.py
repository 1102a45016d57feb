"""Filters and weights that are not in `reference_batch`; NumPy float64, without the package.

Masked entries of the inputs are never used. Filters return bool [B] (rows) or [B, T] (tokens).
"""

import numpy as np


def lengths(mask, fraction, longest):
    """Drop the floor(rho n) longest, or shortest, of n non-empty rows; ties: the earlier row."""
    rows = [i for i in range(len(mask)) if any(mask[i])]
    rows.sort(key=lambda i: (-1 if longest else 1) * int(np.sum(mask[i])))
    dropped = rows[: int(np.floor(fraction * len(rows) + 1e-9))]
    return np.array([i in rows and i not in dropped for i in range(len(mask))])


def windowed(score, mask, fraction, earlier):
    """Drop rows among the floor(rho n) lowest of the scores of this batch and of `earlier`."""
    keep, own = np.zeros(len(mask), bool), []
    for i in range(len(mask)):
        if any(mask[i]):
            own.append((float(np.mean([score[i][t] for t in np.flatnonzero(mask[i])])), i))
    pool = sorted([(s, -1, n) for n, s in enumerate(earlier)] + [(s, 0, i) for s, i in own])
    for _, now, i in pool[int(np.floor(fraction * len(pool) + 1e-9)) :]:
        if now == 0:
            keep[i] = True
    return keep


def largest(score, mask, fraction):
    """Keep the ceil(rho L) tokens with the largest score in each row; ties: the earlier token."""
    keep = np.zeros(np.shape(mask), bool)
    for i in range(len(mask)):
        tokens = sorted(np.flatnonzero(mask[i]), key=lambda t: (-score[i][t], t))
        keep[i, tokens[: int(np.ceil(fraction * len(tokens) - 1e-6))]] = True
    return keep


def least_likely(student_logprob, mask, fraction):
    """Keep the max(1, floor(rho L)) tokens of the lowest log p in each row; ties: the earlier."""
    keep = np.zeros(np.shape(mask), bool)
    for i in range(len(mask)):
        tokens = sorted(np.flatnonzero(mask[i]), key=lambda t: (student_logprob[i][t], t))
        keep[i, tokens[: max(1, int(np.floor(fraction * len(tokens) + 1e-6)))]] = True
    return keep


def tip(entropy, kl, mask, fraction):
    """TIP: score h + d - h d of entropy (capped at its 98 % quantile) and KL, scaled to [0, 1]."""
    inside = [(i, t) for i, t in zip(*np.nonzero(mask), strict=True)]

    def unit(values):
        low, high = min(values.values()), max(values.values())
        return {at: (x - low) / (high - low or 1.0) for at, x in values.items()}

    entropies = {at: float(entropy[at]) for at in inside}
    top = float(np.quantile(list(entropies.values()), 0.98))
    h = unit({at: min(x, top) for at, x in entropies.items()})
    d = unit({at: float(kl[at]) for at in inside})
    score = np.zeros(np.shape(mask))
    for at in inside:
        score[at] = 1 - (1 - h[at]) * (1 - d[at])
    return largest(score, mask, fraction)


def hard_tokens(teacher_entropy, student_entropy, mask, fraction, alpha, beta):
    """Keep the tokens with the largest (1 + alpha c^T)(1 + beta c^S); maxima over the batch."""
    inside = list(zip(*np.nonzero(mask), strict=True))
    tops = [max(float(x[at]) for at in inside) for x in (teacher_entropy, student_entropy)]
    score = np.zeros(np.shape(mask))
    for at in inside:
        sure, unsure = 1 - teacher_entropy[at] / tops[0], student_entropy[at] / tops[1]
        score[at] = (1 + alpha * sure) * (1 + beta * unsure)
    return largest(score, mask, fraction)


def prefix(teacher_logprob, student_logprob, mask, window, least):
    """Keep each row's tokens before the windowed mean of log q/p first falls below `least`."""
    keep = np.zeros(np.shape(mask), bool)
    for i in range(len(mask)):
        gaps = []
        for t in np.flatnonzero(mask[i]):
            gaps.append(float(teacher_logprob[i][t]) - float(student_logprob[i][t]))
            if np.mean(gaps[-window:]) < least:
                break
            keep[i, t] = True
    return keep


def repetition(tokens, mask, n):
    """The fraction of each row's n-grams that occurred earlier in the row."""
    rates = []
    for row, valid in zip(tokens, mask, strict=True):
        response = [int(token) for token, real in zip(row, valid, strict=True) if real]
        grams = [tuple(response[t : t + n]) for t in range(len(response) - n + 1)]
        rates.append((len(grams) - len(set(grams))) / len(grams) if grams else 0.0)
    return np.array(rates)


def special(tokens, teacher_logprob, student_logprob, mask, named, stop, bound, least):
    """Drop tokens in `named`, or with a median |log q/p| above the bound; never those in `stop`."""
    gaps = {}
    for at in zip(*np.nonzero(mask), strict=True):
        gap = abs(float(teacher_logprob[at]) - float(student_logprob[at]))
        gaps.setdefault(int(tokens[at]), []).append(gap)
    out = set(named)
    for token, values in gaps.items():
        if len(values) >= least and sorted(values)[(len(values) - 1) // 2] > bound:
            out.add(token)
    out -= set(stop)
    keep = [[m and int(v) not in out for v, m in zip(*x, strict=True)]
            for x in zip(tokens, mask, strict=True)]  # fmt: skip
    return np.array(keep, bool)


def margins(teacher_logprob, student_logprob, mask, group, correct, delta):
    """Uni-OPD: shift of + d / 2 for a group's correct rows, - d / 2 for the others; and the gap.

    gap: mean over correct minus mean over wrong rows of the row's mean log q/p; d = delta - gap, at
    least 0.
    """
    rows = [i for i in range(len(mask)) if any(mask[i])]
    mean = {
        i: np.mean([teacher_logprob[i][t] - student_logprob[i][t] for t in np.flatnonzero(mask[i])])
        for i in rows
    }
    shift, gap = np.zeros(len(mask)), np.zeros(len(mask))
    for i in rows:
        right = [mean[j] for j in rows if group[j] == group[i] and correct[j]]
        wrong = [mean[j] for j in rows if group[j] == group[i] and not correct[j]]
        if right and wrong:
            gap[i] = np.mean(right) - np.mean(wrong)
            shift[i] = max(0.0, delta - gap[i]) / 2 * (1 if correct[i] else -1)
    return shift, gap


def soft_trajectories(teacher_logprob, mask, temperature):
    """N exp(s_i / tau) / sum_j exp(s_j / tau) on every token of row i, s_i its mean log q."""
    rows = [i for i in range(len(mask)) if any(mask[i])]
    mean = [float(np.mean([teacher_logprob[i][t] for t in np.flatnonzero(mask[i])])) for i in rows]
    share = np.exp(np.array(mean) / temperature)
    share *= len(rows) / share.sum()
    result = np.zeros(np.shape(mask))
    for i, each in zip(rows, share, strict=True):
        result[i, np.flatnonzero(mask[i])] = each
    return result


def anchors(entropy, mask, count, size):
    """OmniOPD's scheduler: chunks of `size` tokens at the highest entropies that do not overlap.

    Greedily by descending entropy, of equal ones the later first; a list of positions per row,
    ascending.
    """
    rows = []
    for h, valid in zip(entropy, mask, strict=True):
        length, chosen = int(np.sum(valid)), []
        for t in sorted(range(length), key=lambda t: (float(h[t]), t), reverse=True):
            if len(chosen) == count:
                break
            if t + size <= length and all(abs(t - a) >= size for a in chosen):
                chosen.append(t)
        rows.append(sorted(chosen))
    return rows


def chunk_targets(logprob, audit, group, alpha):
    """OmniOPD's posterior weights: audited [B, T], target [B, T], prior [B, T], baseline [B].

    prior = (product of the chunk's probabilities)^(1/C), target = (k + alpha prior) / (N + alpha);
    baseline: the mean target of the chunks of the group's other rows. `audit` has the arrays
    anchor, length, agreement and samples, [B, M] each.
    """
    audited = np.zeros(np.shape(logprob), bool)
    target, prior = np.zeros(audited.shape), np.zeros(audited.shape)
    of_rows = [[] for _ in audited]
    for i, row in enumerate(zip(*audit, strict=True)):
        for a, c, k, n in zip(*row, strict=True):
            if a < 0 or c == 0 or n == 0:
                continue
            own = 1.0
            for t in range(a, a + c):
                own *= np.exp(float(logprob[i][t])) ** (1 / c)
            weight = (float(k) + alpha * own) / (float(n) + alpha)
            of_rows[i].append(weight)
            audited[i, a : a + c], target[i, a : a + c], prior[i, a : a + c] = True, weight, own
    baseline = np.zeros(len(audited))
    for i in range(len(audited)):
        others = [w for j, ws in enumerate(of_rows) if j != i and group[j] == group[i] for w in ws]
        baseline[i] = np.mean(others) if others else 0.0
    return audited, target, prior, baseline
