"""Metrics as sums and counts, merged over rows, micro-batches and devices, divided once.

    values, mask -> Mean(total, count) -> merge -> results: {name: float}

There is never a mean of means, so splitting the batch changes no result beyond rounding. Sums are
float32; counts are exact up to 2^24.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Shaped

from fireopd_jax.types import Array, pytree


@pytree
class Mean:
    """A mean as its sum and its count, before the division."""

    total: Float32[Array, "*stack"]
    count: Float32[Array, "*stack"]

    @staticmethod
    def of(values: Shaped[Array, "*shape"], where: Bool[Array, "*shape"] | None = None) -> "Mean":
        """Sum the values where `where` is true; values elsewhere, even NaN, are ignored."""
        total = jnp.sum(values, where=where, dtype=jnp.float32)
        if where is None:
            return Mean(total, jnp.asarray(values.size, jnp.float32))
        return Mean(total, jnp.sum(where, dtype=jnp.float32))

    def merge(self, other: "Mean") -> "Mean":
        """Add the sum and the count of other values."""
        return Mean(self.total + other.total, self.count + other.count)

    def fold(self) -> "Mean":
        """Merge along the leading axis, which a scan has stacked."""
        return Mean(self.total.sum(0), self.count.sum(0))

    def result(self) -> Float32[Array, ""] | np.float32:
        """Return total / count; NaN if count is 0."""
        return self.total / self.count


@pytree
class Max:
    """The largest value, and the number of values."""

    value: Float32[Array, "*stack"]
    count: Float32[Array, "*stack"]

    @staticmethod
    def of(values: Shaped[Array, "*shape"], where: Bool[Array, "*shape"] | None = None) -> "Max":
        """Return the largest of the values where `where` is true."""
        value = jnp.max(jnp.asarray(values, jnp.float32), where=where, initial=-jnp.inf)
        if where is None:
            return Max(value, jnp.asarray(values.size, jnp.float32))
        return Max(value, jnp.sum(where, dtype=jnp.float32))

    def merge(self, other: "Max") -> "Max":
        """Merge with the largest of other values."""
        return Max(jnp.maximum(self.value, other.value), self.count + other.count)

    def fold(self) -> "Max":
        """Merge along the leading axis, which a scan has stacked."""
        return Max(self.value.max(0), self.count.sum(0))

    def result(self) -> Float32[Array, ""] | np.float32:
        """Return the largest value; NaN if count is 0."""
        # count / count is 1, or NaN at 0: works for device and host arrays alike.
        return self.value * (self.count / self.count)


Metric = Mean | Max
Metrics = dict[str, Any]
"""Name -> Mean or Max; a dict, so that compiled functions take and return it."""


def merge(one, other):
    """Merge two pytrees of metrics of the same structure."""
    return jax.tree.map(
        lambda a, b: a.merge(b), one, other, is_leaf=lambda node: isinstance(node, Mean | Max)
    )


def nothing(metrics: Metrics) -> Metrics:
    """Return metrics of no values, of the same structure."""

    def empty(metric: Metric) -> Metric:
        zero = jnp.float32(0)
        return Max(zero - jnp.inf, zero) if isinstance(metric, Max) else Mean(zero, zero)

    return jax.tree.map(empty, metrics, is_leaf=lambda node: isinstance(node, Mean | Max))


def results(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Return the metrics as floats: one transfer to the host, then the divisions."""
    fetched: dict[str, Metric] = jax.device_get(dict(metrics))
    with np.errstate(all="ignore"):
        return {name: float(metric.result()) for name, metric in fetched.items()}
