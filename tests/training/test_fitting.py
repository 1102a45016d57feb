"""Choice of micro-batches and remat by the memory that they need."""

import pytest

from fireopd_jax.models.architecture import DecoderConfig
from fireopd_jax.recipe.optim import OptimConfig
from fireopd_jax.runtime.memory import GIB
from fireopd_jax.training.ahead import gib, too_large
from fireopd_jax.training.fitting import (
    Choice,
    Pass,
    first_that_fits,
    micro_batch_sizes,
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


def chosen(room_gib, *, of=DEFAULT, optim=OptimConfig()):  # noqa: B008
    choices = update_choices(of, optim)
    return first_that_fits(choices, lambda c: of.update(c, PARAMETERS), room_gib * GIB)


@pytest.mark.parametrize(
    ("choice", "measured"),
    [
        (Choice(None, "none"), 270.2),
        (Choice(8, "none"), 36.1),
        (Choice(1, "none"), 5.84),
        (Choice(None, "dots"), 47.5),
        (Choice(None, "full"), 15.6),
        (Choice(8, "full"), 3.05),
    ],
    ids=str,
)
def test_estimates_are_near_what_the_compiler_plans(choice, measured):
    # `memory_analysis` of SmolLM2-135M's update on a CPU, in GiB: docs/memory.md.
    estimated = DEFAULT.update(choice, PARAMETERS) / GIB
    assert 0.65 * measured < estimated < 1.35 * measured


def test_all_rows_in_one_pass_where_they_fit():
    assert chosen(400) == Choice(None, "none")


def test_micro_batches_that_keep_the_device_busy_come_before_recomputation():
    assert chosen(120) == Choice(16, "none")
    assert chosen(20) == Choice(4, "none")


def test_recomputation_comes_before_micro_batches_too_small_for_the_device():
    assert chosen(6) == Choice(4, "dots")
    assert chosen(2.6) == Choice(4, "full")
    assert chosen(1.5) == Choice(2, "full")


def test_nothing_fits_and_the_smallest_is_taken():
    assert chosen(0.1) == Choice(1, "full")


def test_what_the_user_sets_stays():
    assert chosen(6, optim=OptimConfig(micro_batch_size=32)) == Choice(32, "full")
    assert chosen(6, optim=OptimConfig(remat="none")) == Choice(1, "none")
    both = OptimConfig(micro_batch_size=16, remat="none")
    assert chosen(0.1, optim=both) == Choice(16, "none")


def test_micro_batches_divide_the_batch_and_the_devices_divide_them():
    assert list(micro_batch_sizes(24, 4)) == [None, 12, 8, 4]
    assert list(micro_batch_sizes(6, 1)) == [None, 3, 2, 1]
    eight = Pass(SMOL, 64, 1024, devices=8)
    sizes = {choice.micro_batch_size for choice in update_choices(eight, OptimConfig())}
    assert sizes == {None, 8, 16, 32}


def test_scores_are_computed_in_the_largest_passes_that_fit():
    choices = score_choices(DEFAULT, None)
    assert first_that_fits(choices, DEFAULT.score, 100 * GIB) == Choice(None)
    small = first_that_fits(choices, DEFAULT.score, GIB)
    assert small.micro_batch_size is not None
    assert 1 <= small.micro_batch_size < 64
    assert score_choices(DEFAULT, 8) == [Choice(8)]


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
    assert "teachers.math.sft.optim.micro_batch_size" in line
    assert "optim.remat=full" in str(too_large("update of student", GIB, GIB))
    assert "rollout.slots" in str(too_large("rollout of student 0", GIB, GIB))
