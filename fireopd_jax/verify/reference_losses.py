"""The losses of a batch in NumPy float64, with gradients; independent of the package.

    logits of student, teacher and base policy, tokens, mask -> loss [B, T], gradient to z [B, T, V]

The gradient is that of each position's loss to the logits at that position; advantages have no
gradient. The formulas of a single position are in `reference`; this module adds those that need
the sampled token or the whole row.
"""

import dataclasses

import numpy as np

from fireopd_jax.verify import reference
from fireopd_jax.verify.reference_batch import importance, surrogate


@dataclasses.dataclass(frozen=True)
class Seen:
    """The models' outputs at each response token."""

    z: np.ndarray
    """Logits of the student under training, [B, T, V]."""
    z_q: np.ndarray
    """Logits of the teacher."""
    z_old: np.ndarray
    """Logits of the student at scoring time."""
    z_base: np.ndarray
    """Logits of the base policy."""
    tokens: np.ndarray
    mask: np.ndarray
    support: np.ndarray
    """Token ids [B, T, S], -1 in empty slots."""
    drawn: np.ndarray
    """Log-probabilities under the sampling distribution, [B, T]."""
    kept: np.ndarray | None = None
    """The response tokens that are trained on; None: all."""
    audited: np.ndarray | None = None
    """Tokens of audited chunks, [B, T]; None where nothing is audited."""
    target: np.ndarray | None = None
    """Posterior weight of each token's chunk, [B, T]."""
    baseline: np.ndarray | None = None
    """Mean weight of the chunks of the prompt's other rows, [B]."""

    def logprob(self, logits):
        """Return log p(y) [B, T], 0 where masked."""
        out = np.zeros(self.mask.shape)
        for i, t in self.positions():
            out[i, t] = reference.log_softmax(logits[i, t])[self.tokens[i, t]]
        return out

    def entropy(self, logits):
        """Return -sum_v p log p [B, T], 0 where masked."""
        out = np.zeros(self.mask.shape)
        for i, t in self.positions():
            log_p = reference.log_softmax(logits[i, t])
            out[i, t] = -(np.exp(log_p) * log_p).sum()
        return out

    def positions(self):
        """Return the (row, position) of each response token."""
        return list(zip(*np.nonzero(self.mask), strict=True))

    def support_ids(self, i, t):
        """Return the token ids of a position's support."""
        return [int(v) for v in self.support[i, t] if v >= 0]

    def collect(self, formula):
        """Return the values and gradients of `formula(i, t)` at every response token."""
        value, gradient = np.zeros(self.mask.shape), np.zeros(self.z.shape)
        for i, t in self.positions():
            value[i, t], gradient[i, t] = formula(i, t)
        return value, gradient


def over_vocabulary(seen, divergence):
    """Values and gradients of `divergence(z, z_q)` at every token."""
    return seen.collect(lambda i, t: divergence(seen.z[i, t], seen.z_q[i, t]))


def over_support(seen, formula):
    """Values and gradients of `formula(z, z_q, support)` at every token."""
    return seen.collect(lambda i, t: formula(seen.z[i, t], seen.z_q[i, t], seen.support_ids(i, t)))


def advantages(
    seen, extrapolation=1.0, exact_kl=False, floor=None, ceiling=None, gamma=0.0, shift=None
):
    """A = lambda (log q - log b) - (log p - log b) + KL(p || q), clipped, then a discounted sum.

    p is the student at scoring time; only the KL baseline uses the student under training. `shift`
    is added to every advantage of a row, before the clip to [floor, ceiling].
    """
    log_p, log_q, log_b = (seen.logprob(z) for z in (seen.z_old, seen.z_q, seen.z_base))
    value = extrapolation * (log_q - log_b) - (log_p - log_b)
    if exact_kl:
        value = value + over_vocabulary(seen, reference.reverse_kl)[0]
    value = value + (0.0 if shift is None else np.asarray(shift)[:, None])
    value = np.maximum(value, -np.inf if floor is None else floor)
    value = np.minimum(value, np.inf if ceiling is None else ceiling)
    return reference.reward_to_go(value, seen.mask, gamma)


def policy_gradient(seen, advantage, clip, cap=None):
    """max(-A r, -A clip(r)) times min(p_old / mu, cap), r = p / p_old of the sampled token."""
    new, old = seen.logprob(seen.z), seen.logprob(seen.z_old)

    def formula(i, t):
        value, slope = surrogate(advantage[i, t], new[i, t] - old[i, t], clip)
        factor = importance(old[i, t], seen.drawn[i, t], cap)
        gradient = reference.score_of(seen.z[i, t], seen.tokens[i, t], slope)
        return factor * value, factor * gradient

    return seen.collect(formula)


def squares(seen, cap=None):
    """(log p - log q)^2 / 2 of the sampled token times min(p_old / mu, cap)."""
    old = seen.logprob(seen.z_old)

    def formula(i, t):
        value, gradient = reference.k2_loss(seen.z[i, t], seen.z_q[i, t], seen.tokens[i, t])
        factor = importance(old[i, t], seen.drawn[i, t], cap)
        return factor * value, factor * gradient

    return seen.collect(formula)


def powers(seen, alpha, normalise):
    """PowerOPD's advantages q^alpha - p_old^alpha of the sampled token; / alpha if `normalise`."""
    log_p, log_q = seen.logprob(seen.z_old), seen.logprob(seen.z_q)
    value = np.zeros(seen.mask.shape)
    for i, t in seen.positions():
        if alpha == 0:
            value[i, t] = log_q[i, t] - log_p[i, t]
        else:
            power = np.exp(log_q[i, t]) ** alpha - np.exp(log_p[i, t]) ** alpha
            value[i, t] = power / alpha if normalise else power
    return value


def self_adaptation(seen, advantage, slope, clip):
    """OPSA: A - delta r / 4 on the kept tokens, r the student's entropy scaled to [-1, 1] per row.

    r is 1 on every token of a row whose kept tokens have one entropy.
    """
    entropy = seen.entropy(seen.z_old)
    kept = seen.mask if seen.kept is None else seen.kept
    value = np.zeros(seen.mask.shape)
    for i in range(len(kept)):
        own = [float(entropy[i, t]) for t in np.flatnonzero(kept[i])]
        for t in np.flatnonzero(kept[i]):
            span = max(own) - min(own)
            r = 2 * (entropy[i, t] - min(own)) / span - 1 if span > 1e-12 else 1.0
            value[i, t] = advantage - slope / 4 * r
    loss, gradient = policy_gradient(seen, value, clip)
    return loss * kept, gradient * kept[..., None]


def at_most(values, limit):
    """Values and gradients with each token's value bounded by `limit`, without gradient above."""
    value, gradient = values
    over = value > limit
    return np.where(over, limit, value), np.where(over[..., None], 0.0, gradient)


def tail_sample(seen):
    """sum_S p rho + [y not in S] (r (rho(y) + 1) - 1), rho(y) without a gradient, r = p / p_old."""
    new, old, teacher = (seen.logprob(z) for z in (seen.z, seen.z_old, seen.z_q))

    def formula(i, t):
        support, y = seen.support_ids(i, t), seen.tokens[i, t]
        value, gradient = reference.head_autodiff(seen.z[i, t], seen.z_q[i, t], support)
        if y in support:
            return value, gradient
        ratio, rho = np.exp(new[i, t] - old[i, t]), new[i, t] - teacher[i, t]
        tail = reference.score_of(seen.z[i, t], y, ratio * (rho + 1))
        return value + ratio * (rho + 1) - 1, gradient + tail

    return seen.collect(formula)


def entropy_aware(seen, alpha, tau, normalise, clip):
    """EOPD: the policy gradient, plus alpha sum_S q (log q - log p) where H(q) > tau."""
    value, gradient = policy_gradient(seen, advantages(seen), clip)
    more, more_gradient = over_support(
        seen, lambda z, z_q, support: reference.forward_kl_topk(z, z_q, support, normalise)
    )
    entropy = seen.entropy(seen.z_q)
    for i, t in seen.positions():
        if entropy[i, t] > tau:
            value[i, t] += alpha * more[i, t]
            gradient[i, t] += alpha * more_gradient[i, t]
    return value, gradient


def minillm(seen, clip):
    """MiniLLM: KL(p || q) of this token, plus the policy gradient of the mean later log q/p."""
    reward = seen.logprob(seen.z_q) - seen.logprob(seen.z_old)
    later = np.zeros(seen.mask.shape)
    for i, t in seen.positions():
        after = [reward[i, u] for u in range(t + 1, len(later[i])) if seen.mask[i, u]]
        later[i, t] = np.mean(after) if after else 0.0
    exact = over_vocabulary(seen, reference.reverse_kl)
    long = policy_gradient(seen, later, clip)
    return exact[0] + long[0], exact[1] + long[1]


def chunk_policy_gradient(seen, beta, leave_one_out):
    """OmniOPD: -(target - baseline) log p(y) where audited, beta KL(base || p) elsewhere."""
    logprob = seen.logprob(seen.z)

    def formula(i, t):
        if not seen.audited[i, t]:
            value, gradient = reference.forward_kl(seen.z[i, t], seen.z_base[i, t])
            return beta * value, beta * gradient
        reward = seen.target[i, t] - (seen.baseline[i] if leave_one_out else 0.0)
        gradient = reference.score_of(seen.z[i, t], seen.tokens[i, t], -reward)
        return -reward * logprob[i, t], gradient

    return seen.collect(formula)
