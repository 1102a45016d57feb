"""What teachers over HTTP cannot do is refused with the reason, before anything is loaded."""

import pytest

from fireopd_jax.config import UserError
from fireopd_jax.recipe.schema import load_config

URL = "{url: http://localhost:1/v1, model: m}"
SERVED = ["data.path=no/such/file", f"teachers.default.served={URL}"]
WITH = r"teachers\.default\.served: "
TOP_K = "method.score={kind: top_k, support: student, k: 4}"
LOCAL = ["method/local_support", TOP_K]


def refused(*settings):
    with pytest.raises(UserError) as caught:
        load_config([*SERVED, *settings])
    return str(caught.value)


@pytest.mark.parametrize(
    "settings, words",
    [
        (["method/fire_opd"], ["confidence_confusion", "teacher.entropy", "method/opd"]),
        (["method/eopd"], ["entropy_aware", "teacher.entropy"]),
        (["method/gkd"], ["vocabulary_divergence", "teacher.hidden"]),
        (["method/trd"], ["method.refine.kind=rewrite", "token ids"]),
        (["method/opd", "rollout.temperature=0.7"], ["temperature 0.7", "score.temperature=1"]),
        (["method/opd", "teachers.math.path=x", "data.teacher_column=t"], ["teacher math"]),
        ([*LOCAL, "rollout.window=2"], ["rollout.window=2", "expected 1"]),
    ],
)
def test_stages_that_a_served_teacher_cannot_feed(settings, words):
    line = refused(*settings)
    assert line.startswith("teachers.default.served: ") and "\n" not in line
    assert all(word in line for word in words), line


def test_a_control_that_a_served_teacher_cannot_feed_is_refused_too():
    assert refused("method/opd", "run.compare=[gkd]").startswith("run.compare: gkd: teachers.def")


@pytest.mark.parametrize(
    "settings",
    [
        ["method/opd"],
        ["method/omniopd"],
        LOCAL,
        [*LOCAL, "rollout.temperature=0.7", "method.score.temperature=1"],
        ["method/opsa"],
        ["method/opsd", "data.privileged_column=c"],
        ["method/opd", f"teachers.math.served={URL}", "data.teacher_column=t"],
    ],
)
def test_what_a_served_teacher_can_feed_or_is_not_asked_for(settings):
    config = load_config([*SERVED, *settings])
    assert config.teachers["default"].served is not None or len(config.teachers) > 1


def test_the_student_is_not_trained_on_samples_of_a_served_teacher():
    line = refused("method/opd", "student.sft={source: teacher}")
    assert line.startswith("student.sft.source=teacher: teachers.default is served")


def test_a_chunk_longer_than_any_response_is_refused():
    audit = ["method/omniopd", "rollout.max_tokens=32"]
    line = refused(*audit, "method.refine.chunk_tokens=33")
    assert line.startswith("method.refine.chunk_tokens=33: ") and "rollout.max_tokens=32" in line
    load_config([*SERVED, *audit, "method.refine.chunk_tokens=32"])


@pytest.mark.parametrize(
    "settings, named",
    [
        (["method/opd", "student.sft.contexts=[prompt, teacher]"], "teacher needs method.teacher."),
        (["method/opd", "student.sft.contexts=[rewrite]"], "rewrite needs method.refine.kind=rew"),
        (["method/opd", "student.sft.contexts=[]"], "none is given"),
        (["method/trd", "teacher.sft.contexts=[teacher]"], "teacher needs method.teacher.prompt"),
    ],
)
def test_contexts_of_supervised_training_that_the_method_lacks(settings, named):
    with pytest.raises(UserError, match=r"^(student|teachers\.default)\.sft\.contexts: ") as caught:
        load_config(["smoke", *settings])
    assert named in str(caught.value)


def test_contexts_are_of_the_runs_method_not_of_its_controls():
    load_config(["smoke", "method/trd", "student.sft.contexts=[rewrite]", "run.compare=[opd]"])
    with pytest.raises(UserError, match="a teacher can only be trained on 'rows'"):
        load_config(["smoke", "teacher.sft.source=teacher"])
