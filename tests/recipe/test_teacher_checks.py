"""Conflicts between a method's teacher, its refinement and the rollout."""

import pytest

from fireopd_jax.config import UserError
from fireopd_jax.recipe.schema import load, load_config

TRD, OWN = ["smoke", "method/trd"], ["smoke", "method/opsd"]


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ([*TRD, "method.teacher={kind: none}"], r"^method\.refine: rewrite asks a teacher, and "
         r"method\.teacher\.kind=none"),
        ([*TRD, "method.loss={kind: sampled_reverse_kl}", "method.score={kind: sampled_token}"],
         r"^method\.refine\.kind=rewrite: sampled_reverse_kl assumes that every response"),
        ([*OWN, "method.teacher.prompt=null"], r"^method\.teacher\.prompt: after its own prompt"),
        (["smoke", "method/omniopd", "method.refine={kind: none}"],
         r"^method\.score: chunk_agreement needs audited responses"),
        (["smoke", "method/opd", "method.refine={kind: audit}"],
         r"^method\.refine: nothing uses the audits with method\.score\.kind=sampled_token"),
        ([*TRD, "rollout.on_policy_fraction=0.5"],
         r"^rollout\.on_policy_fraction=0\.5: method\.refine\.kind=rewrite"),
        (["smoke", "method/opd", "method.score.temperature=0.5"],
         r"^method\.score\.temperature=0\.5: sampled_reverse_kl .*rollout\.temperature \(1\.0\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_one_line(settings, error):
    with pytest.raises(UserError, match=error) as caught:
        load_config(settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        [*TRD, "method.teacher={kind: self, params: start}"],  # the rewrite's prompt tells it more
        [*OWN, "rollout.temperature=0.7"],  # a divergence is compared at any temperature
        ["smoke", "method/opd", "method.score.temperature=1"],
        ["smoke", "method/opd", "method.score.temperature=0.5", "method.loss.importance_cap=2"],
        [*TRD, "rollout.window=4"],
    ],
)
def test_what_fits_together_is_loaded(settings):
    assert load_config(settings)


def test_an_own_teacher_needs_no_teachers():
    architecture = "{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2}"
    config = load_config(["method/opsd", f"student.architecture={architecture}"])
    assert config.teachers == {} and config.method.teacher.own
    with pytest.raises(UserError, match=r"^teachers: none is given"):
        load_config(["method/trd", f"student.architecture={architecture}"])


@pytest.mark.parametrize(
    ("settings", "warning"),
    [
        ([*OWN, "method.teacher.decay=0.5"], "decay has no effect with params: start"),
        ([*TRD, "method.teacher.max_prompt_tokens=64"], "max_prompt_tokens has no effect without"),
        ([*TRD, "method.refine.score_after=prompt", "method.refine.score_template_kwargs={a: 1}"],
         "score_template_kwargs has no effect with score_after: prompt"),
    ],
)  # fmt: skip
def test_a_key_that_changes_nothing_is_a_warning(settings, warning):
    assert any(warning in note for note in load(settings).notes)


def test_a_moving_average_uses_its_decay():
    notes = load([*OWN, "method.teacher.params=ema", "method.teacher.decay=0.5"]).notes
    assert not any("no effect" in note for note in notes)
