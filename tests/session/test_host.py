"""Host stages: grades where a method needs them, and nothing for the others."""

import dataclasses

import jax
import numpy as np
import pytest

from fireopd_jax.recipe.schema import load_config
from fireopd_jax.session.host import FindLeaks, Grade, Policies
from fireopd_jax.session.refining import HOST_STAGES, host_stages
from fireopd_jax.session.rewriting import Rewriter
from fireopd_jax.session.setup import set_up
from tests.cases import make_rollout, make_session

SETTINGS = ["smoke", "data.path=builtin:addition-1", "rollout.batch_size=8", "eval.problems=0"]


NOBODY = Policies(student={}, teachers=(), updates=np.zeros((), np.int32))


def make_setup(method, *settings):
    return set_up(load_config([*SETTINGS, f"method/{method}", *settings]))


def stages_of(setup):
    return host_stages(make_session(setup), setup.config.method)


def make_case(setup):
    """Right, wrong and empty responses to the first rows."""
    tokenizer, stop = setup.student.tokenizer, setup.student.stop[0]
    texts = [setup.rows[i].answer if i % 2 == 0 else "x" for i in range(7)]
    width = 12
    tokens, mask = np.zeros((8, width), np.int32), np.zeros((8, width), bool)
    for i, text in enumerate(texts):  # the last row draws nothing
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], stop]
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
    return dataclasses.replace(make_rollout(mask), tokens=tokens)


def test_a_method_that_needs_grades_has_its_rollouts_graded():
    setup = make_setup("uni_opd")
    (stage,) = stages_of(setup)
    rollout = make_case(setup)
    graded = stage(rollout, NOBODY)
    np.testing.assert_array_equal(graded.correct, [1, 0, 1, 0, 1, 0, 1, 0])
    assert graded.correct.dtype == np.float32
    # The rows lie where the score program wants them, and nothing else has changed.
    assert {shard.data.shape for shard in graded.correct.addressable_shards} == {(1,)}
    same = jax.tree.map(np.array_equal, dataclasses.replace(graded, correct=None), rollout)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("drop", [False, True])
def test_responses_that_speak_of_the_solution_are_counted_or_dropped(drop):
    setup = make_setup("opsd", f"method.teacher.leak={{pattern: '^[0-9]', drop: {drop}}}")
    (stage,) = stages_of(setup)
    rollout = make_case(setup)  # numbers in every second row
    found = stage(rollout, NOBODY)
    leaked = [True, False] * 4
    leaked[6:] = [True, False]  # the last row is empty
    np.testing.assert_array_equal(found.leaked, leaked)
    wanted = np.asarray(rollout.mask) & ~np.asarray(leaked)[:, None] if drop else rollout.mask
    np.testing.assert_array_equal(found.mask, wanted)
    assert {shard.data.shape for shard in found.leaked.addressable_shards} == {(1,)}
    assert stages_of(make_setup("opsd", "method.teacher.leak=null")) == []


def test_the_stages_of_a_method_run_in_their_order():
    setup = make_setup("trd", "method.refine.drop_worse=true",
                       "method.refine.prompt=maths_reference")  # fmt: skip
    assert [type(stage) for stage in stages_of(setup)] == [Grade, Rewriter, FindLeaks]


def test_other_methods_have_no_host_stage():
    assert stages_of(make_setup("fire_opd")) == []


def test_every_host_stage_fills_in_a_field_of_the_rollout():
    fields = {f"rollout.{field.name}" for field in dataclasses.fields(make_rollout([[True]]))}
    assert Grade in HOST_STAGES
    for stage in HOST_STAGES:
        assert stage.gives and stage.gives <= fields
