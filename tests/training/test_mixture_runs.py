"""Mixtures of sources with teachers of their own, which train on their own rows."""

import json

import numpy as np
import pytest

from fireopd_jax.config import UserError
from fireopd_jax.data.pipeline import PromptLoader
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.session.setup import set_up
from fireopd_jax.training.prepare import by_turns, in_teacher_template, of_own_sources


def loader(encoded, rows):
    return PromptLoader(encoded, rows, prompts_per_step=6, group_size=1, seed=0, references=True)


def test_sources_take_turns():
    rows, source = np.array([1, 3, 4, 6, 8]), np.array([0, 0, 0, 0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(by_turns(rows, source), [1, 6, 3, 8, 4])
    np.testing.assert_array_equal(by_turns(rows, np.zeros(9, np.int32)), rows)


def test_teachers_of_a_mixture_learn_from_their_own_sources(tmp_path):
    sources = []
    for name, weight in (("default", 3), ("b", 1)):
        rows = [{"prompt": f"{name}{i}", "answer": "1", "reference": f"={name}"} for i in range(9)]
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources.append(f"{{path: {file}, weight: {weight}, teacher: {name}}}")
    mixture = f"data.mixture=[{', '.join(sources)}]"
    setup = set_up(load_config(["smoke", mixture, "teachers.b={}", "eval.problems=0"]))
    for index, spec in enumerate(setup.teachers):
        own = setup.own_rows(setup.train, index)
        encoded = in_teacher_template(spec, setup.encoded)
        with pytest.raises(UserError, match="none of its rows"):
            loader(encoded, own)
        prompts = next(loader(of_own_sources(encoded, own), own))
        assert set(prompts.row.tolist()) <= set(own.tolist())
