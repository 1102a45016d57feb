"""Choice of micro-batches and remat by the memory that they need."""

import dataclasses

import pytest

from fireopd_jax.models.architecture import DecoderConfig
from fireopd_jax.recipe.optim import OptimConfig
from fireopd_jax.runtime.memory import GIB
from fireopd_jax.training.ahead import gib, too_large
from fireopd_jax.training.fitting import (
    Choice,
    Pass,
    first_that_fits,
    score_choices,
    update_choices,
)

SMOL = DecoderConfig(
    model_type="llama",
    hidden_size=576,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    intermediate_size=1536,
    qk_norm=False,
    dtype="bfloat16",
)
PARAMETERS = 134_515_008
DEFAULT = Pass(SMOL, rows=64, tokens=1024)
PLAIN = OptimConfig()


def chosen(room_gib, *, of=DEFAULT, optim=PLAIN, trained=PARAMETERS):
    choices = update_choices(of, optim)
    return first_that_fits(choices, lambda c: of.update(c, trained), room_gib * GIB)


def packed(tokens, remat="none"):
    return Choice(None, remat, tokens)


@pytest.mark.parametrize(
    ("choice", "measured"),
    [
        (packed(1024, "dots"), 2.01),
        (packed(1024), 3.16),
        (packed(1024, "full"), 2.01),
        (packed(4096), 9.32),
        (packed(4096, "dots"), 3.88),
        (packed(4096, "full"), 2.01),
        (Choice(8, "none"), 18.5),
    ],
    ids=str,
)
def test_estimates_are_near_what_the_compiler_plans(choice, measured):
    # What `fireopd plan` finds for SmolLM2-135M's update on a CPU, in GiB: docs/memory.md.
    estimated = DEFAULT.update(choice, PARAMETERS) / GIB
    assert 0.8 * measured < estimated < 1.2 * measured


def test_a_pass_keeps_the_device_busy_and_no_larger():
    assert chosen(400) == packed(1024, "dots")
    assert chosen(400, of=dataclasses.replace(DEFAULT, platform="gpu")) == packed(8192)
    short = dataclasses.replace(DEFAULT, tokens=100)
    assert chosen(400, of=short) == packed(2 * 224, "dots")  # each with room for two rows


def test_recomputation_comes_before_passes_too_small_for_the_device():
    gpu = dataclasses.replace(DEFAULT, platform="gpu")
    assert chosen(8, of=gpu) == packed(8192, "dots")
    assert chosen(2.1, of=gpu) == packed(8192, "full")
    assert chosen(0.2, of=gpu, trained=10**6) == packed(2048, "full")


def test_nothing_fits_and_the_smallest_is_taken():
    assert chosen(0.001, trained=10**6) == packed(1024, "full")


def test_what_the_user_sets_stays():
    assert chosen(6, optim=OptimConfig(micro_batch_size=32)) == Choice(32, "full")
    assert chosen(6, optim=OptimConfig(remat="none")) == packed(1024)
    assert chosen(6, optim=OptimConfig(micro_batch_tokens=2048)) == packed(2048, "dots")
    both = OptimConfig(micro_batch_size=16, remat="none")
    assert chosen(0.1, optim=both) == Choice(16, "none")


def test_tokens_and_rows_are_one_measure():
    with pytest.raises(ValueError, match="expected one of the two"):
        OptimConfig(micro_batch_size=16, micro_batch_tokens=2048)


def test_a_pass_is_one_devices():
    eight = Pass(SMOL, 64, 100, devices=8)
    assert update_choices(eight, OptimConfig())[0].micro_batch_tokens == 2 * 224


def test_scores_are_computed_in_the_largest_passes_that_fit():
    gpu = dataclasses.replace(DEFAULT, platform="gpu")
    choices = score_choices(gpu, None)
    assert first_that_fits(choices, gpu.score, GIB) == packed(8192)
    assert first_that_fits(choices, gpu.score, GIB / 32) == packed(2048)
    assert score_choices(DEFAULT, 8) == [Choice(8)]
    assert score_choices(DEFAULT, None, 4096) == [packed(4096)]


def test_experts_count_as_those_that_a_token_is_routed_to():
    from fireopd_jax.models.architecture import MoEConfig

    moe = MoEConfig(num_experts=64, num_experts_per_tok=2, moe_intermediate_size=128)
    sparse = DecoderConfig(intermediate_size=64 * 128, moe=moe)
    dense = DecoderConfig(intermediate_size=2 * 128)
    none = Choice()
    assert Pass(sparse, 8, 64).update(none, 0) == Pass(dense, 8, 64).update(none, 0)


@pytest.mark.parametrize(
    ("size", "shown"), [(0, "0"), (0.0123, "0.012"), (3.14, "3.1"), (9.99, "10.0"), (24, "24")]
)
def test_sizes_have_two_digits(size, shown):
    assert gib(size * GIB) == shown


def test_the_error_of_a_program_that_does_not_fit_names_its_keys():
    line = str(too_large("sft of teacher math", 30 * GIB, 24 * GIB))
    assert line.startswith("sft of teacher math: it needs 30 GiB of memory, the device has 24")
    assert "teachers.math.sft.optim.micro_batch_tokens" in line
    assert "optim.remat=full" in str(too_large("update of student", GIB, GIB))
    assert "rollout.slots" in str(too_large("rollout of student 0", GIB, GIB))
