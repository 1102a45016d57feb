"""Chat templates of a run's models: each its own, recorded with the date that they write."""

import json

import pytest

from fireopd_jax.config import UserError
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.session.contexts import teacher_voices
from fireopd_jax.session.described import clock_shown
from fireopd_jax.session.identity import Written, check_templates, recorded_templates
from fireopd_jax.session.setup import set_up
from fireopd_jax.text.tokenizer import BUILTIN, load_tokenizer

MODEL = (
    "{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1, "
    "head_dim: 8, intermediate_size: 32}"
)
SETTINGS = [
    "mesh.data=1", "data.path=builtin:addition-1", "data.max_prompt_tokens=64",
    "rollout.batch_size=8", "rollout.max_tokens=8", "eval.problems=2", "eval.batch_size=8",
    f"student.architecture={MODEL}", "checks.allow=[template]",
]  # fmt: skip
MATHS = f"teachers.maths.architecture={MODEL}"
DATED = "{{ strftime_now('%d %b %Y') }}|{{ messages[0].content }}"
MOMENT = "2024-07-26T10:00:00"


def ready(*settings, moment=MOMENT):
    return set_up(load_config([*SETTINGS, *settings]), moment)


def first(setup, which):
    (row, *_) = setup.encoded.kept
    return load_tokenizer(BUILTIN).decode(getattr(setup.encoded, which)[row])


def test_student_and_teacher_have_templates_of_their_own(tmp_path):
    file = tmp_path / "dated.jinja"
    file.write_text(DATED)
    setup = ready(MATHS, "student.chat_template=plain", f"teachers.maths.chat_template={file}")
    problem = setup.rows[int(setup.encoded.kept[0])].prompt[0]["content"]
    assert first(setup, "prompts") == problem
    assert first(setup, "teacher_prompts") == f"26 Jul 2024|{problem}"
    assert list(clock_shown(setup)) == [
        f"chat templates that read the clock (teacher maths): it shows {MOMENT} in all of this run "
        "(chat_template_kwargs: strftime_now)"
    ]
    assert not setup.student.builtin_tokenizer, "a chosen template is saved with the student"
    stated = ready(
        MATHS, f"student.chat_template={file}", "student.chat_template_kwargs={strftime_now: "
        "2020-01-02}", "checks.allow=[template, thinking]",
    )  # fmt: skip
    assert first(stated, "prompts") == f"02 Jan 2020|{problem}", "a date of one's own goes first"


def test_a_served_teacher_is_asked_in_a_template_of_its_own():
    served = "teachers.maths.served={url: 'http://127.0.0.1:9/v1', model: m}"
    setup = ready("method/opd", served, "teachers.maths.chat_template=chatml")
    assert first(setup, "teacher_prompts").startswith("<|im_start|>user\n")
    (voice,) = teacher_voices(setup, setup.config.method)
    assert voice.model == "teacher maths" and "im_start" in str(voice.tokenizer.chat_template)
    assert "im_start" not in str(setup.student.tokenizer.chat_template)


def test_errors_of_templates_name_row_and_model(tmp_path):
    file = tmp_path / "rows.jsonl"
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    rows = [{"prompt": "1+1", "answer": "2"}] * 2 + [{"prompt": talk, "answer": "2"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"data.path={file}"
    with pytest.raises(UserError, match=r"rows\.jsonl:3: the chat template of teacher maths rej"):
        ready(MATHS, data, "teachers.maths.chat_template=plain")
    with pytest.raises(UserError, match=r"rows\.jsonl:3: the chat template of student rejects"):
        ready(MATHS, data, "student.chat_template=plain")
    with pytest.raises(UserError, match=r"^teachers.maths.chat_template: 'palin' .*'plain'"):
        ready(MATHS, data, "teachers.maths.chat_template=palin")


def test_the_templates_of_a_run_are_recorded_and_may_not_change(tmp_path):
    record, file = tmp_path / "models" / "templates.json", tmp_path / "t.jinja"
    file.write_text(DATED)
    settings = (MATHS, f"teachers.maths.chat_template={file}")
    check_templates(record, Written.of(ready(*settings), MOMENT))
    assert recorded_templates(record).moment == MOMENT
    assert recorded_templates(record).templates["teacher maths"] == DATED
    check_templates(record, Written.of(ready(*settings), "2025-01-01T00:00:00"))
    assert recorded_templates(record).moment == MOMENT, "the run began once"
    file.write_text(DATED + " ")
    with pytest.raises(UserError, match=r"^teacher maths: its chat template has changed since"):
        check_templates(record, Written.of(ready(*settings), MOMENT))
    assert recorded_templates(tmp_path / "none.json") == Written()
