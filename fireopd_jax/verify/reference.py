"""The objectives of one position in NumPy float64, with gradients; independent of the package.

z and z_q are the logits of student p and teacher q over the whole vocabulary; every function
returns (value, gradient to z). `log_chain` turns dL/d log p(v) into dL/dz(v). A support is a list
of ids.

References: arXiv 2603.25562, 2604.13016, 2306.13649 (GKD), 2402.03898 (DistiLLM), 2404.02657 (AKL),
2306.08543 (MiniLLM), 2603.07079 (EOPD), 2601.18734 (OPSD).
"""

import numpy as np


def log_softmax(z):
    """The log-probabilities z - log sum_v exp z(v)."""
    z = np.asarray(z, np.float64)
    return z - z.max() - np.log(np.exp(z - z.max()).sum())


def log_chain(p, slope):
    """dL/dz(v) = a(v) - p(v) sum_u a(u), a = dL/d log p."""
    return slope - p * slope.sum()


def _models(z, z_q):
    log_p, log_q = log_softmax(z), log_softmax(z_q)
    return np.exp(log_p), np.exp(log_q), log_p, log_q


def reverse_kl(z, z_q):
    """KL(p || q) = sum_v p (log p - log q); gradient p (rho - KL)."""
    p, _, log_p, log_q = _models(z, z_q)
    rho = log_p - log_q
    value = (p * rho).sum()
    return value, p * (rho - value)


def forward_kl(z, z_q):
    """KL(q || p) = sum_v q (log q - log p); gradient p - q."""
    p, q, log_p, log_q = _models(z, z_q)
    return (q * (log_q - log_p)).sum(), p - q


def jensen_shannon(z, z_q, beta):
    """Beta KL(q || M) + (1 - beta) KL(p || M), M = beta q + (1 - beta) p; a KL at beta = 0, 1."""
    if beta in (0, 1):
        return (reverse_kl if beta else forward_kl)(z, z_q)
    p, q, log_p, log_q = _models(z, z_q)
    log_m = np.log(beta * q + (1 - beta) * p)
    value = (beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m)).sum()
    return value, log_chain(p, (1 - beta) * p * (log_p - log_m))


def skewed_forward_kl(z, z_q, alpha):
    """KL(q || alpha q + (1 - alpha) p)."""
    p, q, _, log_q = _models(z, z_q)
    m = alpha * q + (1 - alpha) * p
    return (q * (log_q - np.log(m))).sum(), log_chain(p, -q * (1 - alpha) * p / m)


def skewed_reverse_kl(z, z_q, alpha):
    """KL(p || (1 - alpha) q + alpha p)."""
    p, q, log_p, _ = _models(z, z_q)
    m = (1 - alpha) * q + alpha * p
    slope = p * (log_p - np.log(m) + 1 - alpha * p / m)
    return (p * (log_p - np.log(m))).sum(), log_chain(p, slope)


def adaptive_kl(z, z_q, mu):
    """W FKL + (1 - w) RKL, w = sum_H |q - p| / sum_V |q - p|, without a gradient.

    H: the most probable tokens of q whose total mass is at most mu; at least the first.
    """
    p, q, _, _ = _models(z, z_q)
    held, inside = 0.0, []
    for v in sorted(range(len(q)), key=lambda v: -q[v]):
        held += q[v]
        if not inside or held <= mu + 1e-9:
            inside.append(v)
    gap = np.abs(q - p)
    w = gap[inside].sum() / gap.sum() if gap.sum() > 0 else 0.0
    (f, df), (r, dr) = forward_kl(z, z_q), reverse_kl(z, z_q)
    return w * f + (1 - w) * r, w * df + (1 - w) * dr


def clipped(z, z_q, kind, limit, share=0.0):
    """sum_v min(f_v, limit), f_v the plain terms a log(a/b); terms above it have no gradient.

    `kind` is that of the divergence, `share` its beta or alpha.
    """
    p, q, log_p, log_q = _models(z, z_q)
    if kind == "jensen_shannon" and share in (0, 1):
        kind = "reverse_kl" if share else "forward_kl"
    value, slope = 0.0, np.zeros(len(p))
    for v in range(len(p)):
        # Each term and its derivative to log p(v).
        if kind == "forward_kl":
            term, d_term = q[v] * (log_q[v] - log_p[v]), -q[v]
        elif kind == "reverse_kl":
            term = p[v] * (log_p[v] - log_q[v])
            d_term = term + p[v]
        elif kind == "skewed_forward_kl":
            m = share * q[v] + (1 - share) * p[v]
            term, d_term = q[v] * (log_q[v] - np.log(m)), -q[v] * (1 - share) * p[v] / m
        elif kind == "skewed_reverse_kl":
            m = (1 - share) * q[v] + share * p[v]
            term = p[v] * (log_p[v] - np.log(m))
            d_term = term + p[v] * (1 - share * p[v] / m)
        elif kind == "jensen_shannon":
            log_m = np.log(share * q[v] + (1 - share) * p[v])
            term = share * q[v] * (log_q[v] - log_m) + (1 - share) * p[v] * (log_p[v] - log_m)
            d_term = (1 - share) * p[v] * (log_p[v] - log_m)
        else:
            raise ValueError(f"no clipped terms of {kind}")
        value += min(term, limit)
        slope[v] = d_term if term <= limit else 0.0
    return value, log_chain(p, slope)


def _scatter(size, ids, values):
    out = np.zeros(size)
    for v, value in zip(ids, values, strict=True):
        out[v] += value
    return out


def renormalised(z, z_q, support, divergence=reverse_kl):
    """The divergence of p and q renormalised on the support; default: local support matching."""
    z, z_q, support = np.asarray(z, np.float64), np.asarray(z_q, np.float64), list(support)
    value, gradient = divergence(z[support], z_q[support])
    return value, _scatter(len(z), support, gradient)


def head_autodiff(z, z_q, support):
    """Counter-example: sum_S p rho with its plain gradient, which pushes mass out of S."""
    p, _, log_p, log_q = _models(z, z_q)
    rho = log_p - log_q
    inside = _scatter(len(p), support, np.ones(len(support)))
    return (inside * p * rho).sum(), log_chain(p, inside * p * (rho + 1))


def score_form(z, z_q, support):
    """sum_S [p log p - p log q - p + q]; gradient sum_S p rho grad log p."""
    p, q, log_p, log_q = _models(z, z_q)
    inside = _scatter(len(p), support, np.ones(len(support)))
    rho = log_p - log_q
    return (inside * (p * rho - p + q)).sum(), log_chain(p, inside * p * rho)


def score_form_of_forward_kl(z, z_q, support):
    """sum_S [q log q - q log p - q + p]; gradient sum_S (p - q) grad log p."""
    p, q, log_p, log_q = _models(z, z_q)
    inside = _scatter(len(p), support, np.ones(len(support)))
    return (inside * (q * (log_q - log_p) - q + p)).sum(), log_chain(p, inside * (p - q))


def score_form_of_jensen_shannon(z, z_q, support, beta):
    """sum_S [beta q log q/m + (1 - beta) p log p/m], m = beta q + (1 - beta) p, 0 < beta < 1.

    The linear parts of the two terms, beta (m - q) and (1 - beta) (m - p), cancel at each token id.
    """
    p, q, log_p, log_q = _models(z, z_q)
    inside = _scatter(len(p), support, np.ones(len(support)))
    log_m = np.log(beta * q + (1 - beta) * p)
    terms = beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m)
    return (inside * terms).sum(), log_chain(p, inside * (1 - beta) * p * (log_p - log_m))


def weighted_score(z, z_q, support, weight):
    """-sum_S w (log q - log p) grad log p, w without a gradient: p / Z_p, q / Z_q, or 1 / |S|.

    The value is that of sum_S w (log p - log q), negated advantages.
    """
    p, q, log_p, log_q = _models(z, z_q)
    inside = _scatter(len(p), support, np.ones(len(support)))
    w = {
        "student": inside * p / (inside * p).sum(),
        "teacher": inside * q / (inside * q).sum(),
        "none": inside / inside.sum(),
    }[weight]
    slope = w * (log_p - log_q)
    return slope.sum(), log_chain(p, slope)


def tail_bucket(z, z_q, support, divergence=reverse_kl):
    """The divergence over the support's tokens and one bucket for all other tokens."""
    p, q, _, _ = _models(z, z_q)
    support = list(support)
    rest = [v for v in range(len(p)) if v not in support]
    pairs = np.array([*p[support], p[rest].sum()]), np.array([*q[support], q[rest].sum()])
    # With log p of the buckets as logits, the gradient is that of the reduced softmax.
    value, reduced = divergence(*np.log(pairs))
    # d log P_b / dz(v) = [v in b] p(v) / P_b - p(v); the reduced gradients sum to 0.
    gradient = np.zeros(len(p))
    gradient[support] = reduced[:-1]
    gradient[rest] = reduced[-1] * p[rest] / p[rest].sum()
    return value, gradient


def forward_kl_topk(z, z_q, support, normalise=False):
    """sum_S q (log q - log p), p over the whole vocabulary; gradient Z_q p - q on S.

    `normalise` uses q / Z_q instead of q, as EOPD's other implementation does.
    """
    p, q, log_p, log_q = _models(z, z_q)
    inside = _scatter(len(p), support, np.ones(len(support)))
    if normalise:
        held = (inside * q).sum()
        q, log_q = q / held, log_q - np.log(held)
    return (inside * q * (log_q - log_p)).sum(), log_chain(p, -inside * q)


def cross_entropy_topk(z, z_q, support):
    """-sum_S q^ log p, q^ = q / Z_q."""
    p, q, log_p, _ = _models(z, z_q)
    inside = _scatter(len(p), support, np.ones(len(support)))
    q = inside * q / (inside * q).sum()
    return -(q * log_p).sum(), log_chain(p, -q)


def head_and_tail_sample(z, z_q, support, y, corrected=True):
    """sum_S p rho + [y not in S] rho(y): the value is unbiased for KL(p || q) under y ~ p.

    The published gradient of the tail is rho(y) grad log p(y), which lacks grad (1 - Z_p); with
    `corrected` it is (rho(y) + 1) grad log p(y).
    """
    p, _, log_p, log_q = _models(z, z_q)
    rho = log_p - log_q
    value, gradient = head_autodiff(z, z_q, support)
    if y in support:
        return value, gradient
    slope = np.zeros(len(p))
    slope[y] = rho[y] + (1 if corrected else 0)
    return value + rho[y], gradient + log_chain(p, slope)


def score_of(z, y, factor):
    """Factor * grad log p(y)."""
    p = np.exp(log_softmax(z))
    slope = np.zeros(len(p))
    slope[y] = factor
    return log_chain(p, slope)


def k1_reward(z, z_q, y, baseline=0.0):
    """-A log p(y), A = -(log p - log q)(y) + baseline; the value is -A."""
    _, _, log_p, log_q = _models(z, z_q)
    advantage = log_q[y] - log_p[y] + baseline
    return -advantage, score_of(z, y, -advantage)


def k2_loss(z, z_q, y):
    """(log p - log q)^2 / 2 at the sampled token."""
    _, _, log_p, log_q = _models(z, z_q)
    rho = log_p[y] - log_q[y]
    return rho**2 / 2, score_of(z, y, rho)


def k3_loss(z, z_q, y):
    """exp(-rho) - 1 + rho: as a loss its expected gradient is that of the *forward* KL."""
    _, _, log_p, log_q = _models(z, z_q)
    rho = log_p[y] - log_q[y]
    return np.exp(-rho) - 1 + rho, score_of(z, y, 1 - np.exp(-rho))


def reward_to_go(reward, mask, gamma):
    """R_t = sum_{u >= t} gamma^(u - t) r_u over the row's own tokens."""
    reward = np.asarray(reward, np.float64)
    out = np.zeros_like(reward)
    for i in range(len(out)):
        for t in range(out.shape[1]):
            if mask[i][t]:
                for u in range(t, out.shape[1]):
                    if mask[i][u]:
                        out[i, t] += gamma ** (u - t) * float(reward[i][u])
    return out


def expectation(function, z, z_q):
    """The exact mean over y ~ p of (value, gradient)."""
    p = np.exp(log_softmax(z))
    value, gradient = 0.0, np.zeros(len(p))
    for y in range(len(p)):
        v, g = function(z, z_q, y)
        value, gradient = value + p[y] * v, gradient + p[y] * g
    return value, gradient
