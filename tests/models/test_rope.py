"""RoPE scalings against their equations in plain Python."""

import math

import numpy as np
import pytest

from fireopd_jax.models.rope import LinearRope, Llama3Rope, YarnRope, rotary

HALF, THETA = 16, 1e4
PLAIN = [THETA ** (-i / HALF) for i in range(HALF)]


def rotation(scaling):
    """Return the frequency of each pair, and the length of its rotated unit vector."""
    cos, sin = rotary(np.array([[1]], np.int32), 2 * HALF, THETA, scaling)
    cos, sin = (np.asarray(x, np.float64).reshape(-1) for x in (cos, sin))
    return np.arctan2(sin, cos), np.hypot(cos, sin)


def llama3(frequency, factor=8.0, low=1.0, high=4.0, length=64):
    wave = 2 * math.pi / frequency
    if wave < length / high:
        return frequency
    if wave > length / low:
        return frequency / factor
    smooth = (length / wave - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


def yarn(i, frequency, factor=4.0, length=128, fast=32.0, slow=1.0):
    def dimension(turns):
        return 2 * HALF * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(THETA))

    low, high = max(math.floor(dimension(fast)), 0), min(math.ceil(dimension(slow)), 2 * HALF - 1)
    ramp = min(max((i - low) / (high - low), 0), 1)
    return frequency / factor * ramp + frequency * (1 - ramp)


def test_without_scaling_the_frequencies_are_a_geometric_series():
    frequency, length = rotation(None)
    np.testing.assert_allclose(frequency, PLAIN, rtol=1e-5)
    np.testing.assert_allclose(length, 1, rtol=1e-6)


def test_linear_scaling_divides_positions():
    frequency, _ = rotation(LinearRope(factor=3.0))
    np.testing.assert_allclose(frequency, np.divide(PLAIN, 3), rtol=1e-5)
    far = rotary(np.array([[9]], np.int32), 2 * HALF, THETA, LinearRope(factor=3.0))
    near = rotary(np.array([[3]], np.int32), 2 * HALF, THETA)
    np.testing.assert_allclose(far[0], near[0], atol=1e-6)


def test_llama3_scaling_stretches_long_waves_only():
    frequency, length = rotation(Llama3Rope(original_max_position_embeddings=64))
    wanted = [llama3(f) for f in PLAIN]
    np.testing.assert_allclose(frequency, wanted, rtol=1e-5)
    np.testing.assert_allclose(length, 1, rtol=1e-6)
    kinds = {round(w / f, 6) for w, f in zip(wanted, PLAIN, strict=True)}
    assert {1.0, 0.125} < kinds, "the case has waves of all three kinds"


def test_yarn_ramps_over_dimensions_and_sharpens():
    frequency, length = rotation(YarnRope(original_max_position_embeddings=128))
    wanted = [yarn(i, f) for i, f in enumerate(PLAIN)]
    np.testing.assert_allclose(frequency, wanted, rtol=1e-5)
    np.testing.assert_allclose(length, 0.1 * math.log(4) + 1, rtol=1e-6)
    _, length = rotation(YarnRope(original_max_position_embeddings=128, attention_factor=1.5))
    np.testing.assert_allclose(length, 1.5, rtol=1e-6)


@pytest.mark.parametrize("scaling", [LinearRope, YarnRope, Llama3Rope])
def test_a_factor_of_one_changes_nothing(scaling):
    frequency, length = rotation(scaling(factor=1.0))
    np.testing.assert_allclose(frequency, PLAIN, rtol=1e-5)
    np.testing.assert_allclose(length, 1, rtol=1e-6)
