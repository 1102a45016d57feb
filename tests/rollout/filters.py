"""Filters by sorting whole rows: the reference for the sampler's filters."""

import numpy as np


def kept(z, top_k=0, top_p=1.0, min_p=0.0):
    """Return the mask of allowed tokens: top-k, then top-p, then min-p; ties rank by token id."""
    z = np.asarray(z, np.float32)
    order = np.argsort(-z, kind="stable")[: top_k or None]
    mass = np.exp(np.asarray(z[order] - z[order[0]], np.float64))
    before = np.cumsum(mass) - mass
    stays = (before < np.float32(top_p) * mass.sum()) | (top_p >= 1)
    stays &= mass >= np.float32(min_p)
    stays[0] = True
    mask = np.zeros(len(z), bool)
    mask[order[stays & (z[order] > -np.inf)]] = True
    return mask


def distribution(logits, temperature=1.0, **filters):
    """Return the probabilities after temperature and filters."""
    z = np.asarray(logits, np.float64) / temperature
    p = np.where(kept(z, **filters), np.exp(z - z.max()), 0)
    return p / p.sum()
