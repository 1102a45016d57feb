"""The learning rate of adapters: a default of their own, and a warning for one that is low."""

import pytest

from fireopd_jax.recipe.schema import as_tree, load, load_config, with_method

LORA = "student.lora={rank: 4}"
TEACHER = "teacher.architecture.hidden_size=32"


def about_the_rate(*arguments):
    return [note for note in load([TEACHER, *arguments]).notes if "optim.learning_rate" in note]


def test_all_parameters_and_adapters_have_defaults_of_their_own():
    assert load_config([TEACHER]).optim.learning_rate == 1e-6
    assert load_config([TEACHER, LORA]).optim.learning_rate == 1e-4
    assert about_the_rate() == []
    assert about_the_rate(LORA) == ["note: optim.learning_rate=0.0001, for adapters (student.lora)"]


def test_a_rate_that_is_given_stays():
    assert load_config([TEACHER, LORA, "optim.learning_rate=3e-5"]).optim.learning_rate == 3e-5
    assert load_config([TEACHER, LORA, "optim={learning_rate: 3e-5}"]).optim.learning_rate == 3e-5
    assert about_the_rate(LORA, "optim.learning_rate=3e-5") == []


def test_a_section_without_the_rate_leaves_the_default():
    assert load_config([TEACHER, LORA, "optim={warmup_steps: 2}"]).optim.learning_rate == 1e-4


@pytest.mark.parametrize("given", ["optim.learning_rate=1e-6", "optim={learning_rate: 1e-6}"])
def test_a_rate_of_all_parameters_is_a_warning(given):
    (line,) = about_the_rate(LORA, given)
    assert line.startswith("warning: command line: optim.learning_rate=1e-06 is low for adapters")
    assert about_the_rate(given) == []


def test_a_control_has_the_rate_of_the_run():
    run = load_config([TEACHER, LORA, "run.steps=3"])
    assert as_tree(with_method(run, "opd"))["optim"] == as_tree(run)["optim"]
