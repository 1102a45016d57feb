"""The source of the student's scores: when the decoding steps will do, and what rules them out."""

import json

import pytest

from fireopd_jax.config import UserError
from fireopd_jax.recipe.schema import as_tree, load_config
from fireopd_jax.recipe.student_scores import with_student_scores

TEACHER = "teacher.tokenizer=builtin:bytes"
DECODE = "method.score.student=decode"
SERVED = "teachers.judge.served={url: 'http://localhost:1', model: m}"

RULED_OUT = {
    "rollout.window": [TEACHER, "method/gkd", "rollout.window=2"],
    "rollout.overprovision": [TEACHER, "method/gkd", "rollout.overprovision=0.5"],
    "rollout.on_policy_fraction": [TEACHER, "method/gkd", "rollout.on_policy_fraction=0.5"],
    "run.updates_per_rollout": [TEACHER, "run.updates_per_rollout=2"],
    "method.score.temperature": [TEACHER, "method/gkd", "rollout.temperature=0.7",
                                 "method.score.temperature=1"],
    "method.score.kind=top_k": [TEACHER, "method/local_support"],
    "method.score.kind=whole_vocabulary": [TEACHER, "method/tip"],
    "method.refine.kind=rewrite": ["method/trd", TEACHER],
    "method.refine.kind=audit": ["method/omniopd", TEACHER],
    "teachers.judge.served": [SERVED, "method/opd"],
}  # fmt: skip


def chosen(arguments, dtype="float32"):
    config = load_config(arguments)
    method, reason = with_student_scores(config, config.method, dtype)
    return method.score.student, reason


@pytest.mark.parametrize(
    "arguments",
    [
        [TEACHER],
        [TEACHER, "method/opd", "rollout.temperature=0.7"],
        [TEACHER, "method/gkd"],
        [TEACHER, "method/minillm"],
        ["method/opsa"],
        [TEACHER, "method/opd", "rollout.top_p=0.9", "method.loss.importance_cap=2"],
    ],
    ids=str,
)
def test_the_decoding_steps_score_where_nothing_rules_them_out(arguments):
    assert chosen(arguments) == ("decode", None)
    assert chosen([*arguments, DECODE]) == ("decode", None)
    assert chosen([*arguments, "method.score.student=forward"]) == ("forward", None)


@pytest.mark.parametrize("key", RULED_OUT)
def test_what_rules_them_out_is_named(key):
    arguments = RULED_OUT[key]
    choice, reason = chosen(arguments)
    assert choice == "forward" and reason.startswith(key) and "\n" not in reason
    with pytest.raises(UserError) as caught:
        load_config([*arguments, DECODE])
    assert str(caught.value).startswith(f"method.score.student=decode: {key}")
    assert "\n" not in str(caught.value)


def test_what_rounds_more_is_used_only_where_asked_for():
    assert chosen([TEACHER], "bfloat16") == ("forward", "the student computes in bfloat16")
    assert chosen([TEACHER, DECODE], "bfloat16") == ("decode", None)
    stored = [TEACHER, "rollout.cache.dtype=int8"]
    assert chosen(stored) == ("forward", "rollout.cache.dtype=int8")
    assert chosen([*stored, DECODE]) == ("decode", None)


def test_the_key_comes_back_from_a_written_configuration(tmp_path):
    for value in ("decode", "forward", "null"):
        config = load_config([TEACHER, f"method.score.student={value}"])
        (tmp_path / "config.yaml").write_text(json.dumps(as_tree(config)))
        assert load_config([str(tmp_path / "config.yaml")]) == config
    with pytest.raises(UserError, match=r"method\.score\.student"):
        load_config([TEACHER, "method.score.student=decoder"])
