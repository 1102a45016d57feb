"""Figures of graded responses: pure functions of NumPy arrays.

    correct[N, K], cluster[N] -> avg@k, pass@k, maj@k, each with its 95 % interval
    two models' scores of the same N problems -> difference, 95 % interval, p value

N problems have K responses each. Problems with the same prompt are one question: their scores are
not independent, so intervals and p values are clustered by question (`cluster`, any integers).
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64, Integer, Num

NORMAL_95 = 1.96
"""Standard errors on each side of a mean that hold 95 % of a normal distribution."""


def sizes(samples: int) -> list[int]:
    """Return the k of pass@k: the powers of two up to the number of samples, and that number."""
    powers = [2**i for i in range(samples.bit_length()) if 2**i <= samples]
    return sorted({*powers, samples})


def pass_at_k(correct: Bool[np.ndarray, "N K"], k: int) -> Float64[np.ndarray, " N"]:
    """Return pass@k of each problem, without bias: 1 - C(K - c, k) / C(K, k), c of K correct.

    It is the probability that k of the K responses, drawn without replacement, hold a correct one.
    References: arXiv 2107.03374.
    """
    samples = correct.shape[1]
    if not 0 < k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples")
    wrong = samples - correct.sum(axis=1)
    drawn = np.arange(k)
    # A product of fractions: binomials overflow. A factor is 0 once no wrong response is left.
    factors = np.maximum(wrong[:, None] - drawn, 0) / (samples - drawn)
    return 1 - factors.prod(axis=1)


def majority(finals: Sequence[str], correct: Sequence[bool]) -> float:
    """Return the score of the most frequent final answer of one problem's responses.

    `finals` are in the grader's normal form; an empty one is no answer and has no vote. Among
    answers with equally many votes one is drawn at random: the result is the expected score, the
    mean over the tied answers. Without any answer it is 0.
    """
    votes = Counter(final for final in finals if final)
    if not votes:
        return 0.0
    most = max(votes.values())
    # Responses with one final answer have one grade, but for graders that look at more than that.
    tied = [right for final, right in zip(finals, correct, strict=True) if votes[final] == most]
    return float(np.mean(tied))


def interval_95(values: Num[np.ndarray, " N"], cluster: Integer[np.ndarray, " N"]) -> float:
    """Return the half-width of the 95 % interval of the mean, clustered; NaN for one cluster.

    The standard error is sqrt(C / (C - 1) sum_c (sum_{i in c} (x_i - mean))^2) / N for C clusters;
    with clusters of one value each it is the usual one.
    """
    if len(values) == 0:
        return float("nan")
    sums = by_cluster(values - values.mean(), cluster)
    clusters = len(sums)
    if clusters < 2:
        return float("nan")
    error = np.sqrt(clusters / (clusters - 1) * np.sum(sums**2)) / len(values)
    return float(NORMAL_95 * error)


def by_cluster(
    values: Num[np.ndarray, " N"], cluster: Integer[np.ndarray, " N"]
) -> Num[np.ndarray, " C"]:
    """Return the sum of the values in each cluster, in the order of the clusters' numbers."""
    _, index = np.unique(cluster, return_inverse=True)
    sums = np.zeros(index.max() + 1, values.dtype)
    np.add.at(sums, index, values)
    return sums


def sign_flip_p(differences: Integer[np.ndarray, " C"]) -> float:
    """Return the two-sided p value of independent differences, by flipping their signs.

    It is the share of the 2^C choices of signs whose sum is at least as far from 0 as the observed
    one: if the two models are equally good, each difference is as likely as its negative. The
    distribution is exact, not sampled: it is built up one difference after the other.
    """
    size = np.sort(np.abs(differences[differences != 0]).astype(np.int64))
    if len(size) == 0:
        return 1.0
    unit = np.gcd.reduce(size)
    size, observed = size // unit, abs(int(differences.sum())) // int(unit)
    share = np.ones(1)  # share[p]: probability that the positive ones add up to p
    for each in size:
        longer = np.zeros(len(share) + int(each))
        longer[: len(share)] += share / 2
        longer[int(each) :] += share / 2
        share = longer
    total = len(share) - 1
    far = np.abs(2 * np.arange(total + 1) - total) >= observed
    return float(min(1.0, share[far].sum()))
