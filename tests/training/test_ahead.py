"""Programs that no device has room for are sizes, not errors."""

import types

import jax
import pytest

from fireopd_jax.training.ahead import Ahead, Need

REFUSED = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(99.60G) exceeds available HBM (95.74G)."
)


class Program:
    """A jitted program that XLA does not compile."""

    def __init__(self, message):
        self.message = message

    def lower(self, *inputs):
        return types.SimpleNamespace(compile=self.fail)

    def fail(self):
        raise jax.errors.JaxRuntimeError(self.message)


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        (REFUSED, 99.6),
        ("RESOURCE_EXHAUSTED: XLA: Used 20.10G of 15.75G hbm. Exceeded by 4.35G.", 20.1),
    ],
)
def test_a_program_that_does_not_fit_is_as_large_as_xla_says(message, gib):
    ahead = Ahead()
    ahead.add("update of student", Program(message))
    assert ahead.need("update of student") == Need(0, int(gib * 2**30))
    ahead.close()


@pytest.mark.parametrize("message", ["INTERNAL: 20.10G", "RESOURCE_EXHAUSTED: quota"])
def test_any_other_error_stays_one(message):
    ahead = Ahead()
    ahead.add("update of student", Program(message))
    with pytest.raises(jax.errors.JaxRuntimeError):
        ahead.needs()
    ahead.close()
