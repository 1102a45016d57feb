"""A run with chosen templates and a clock, from its start over a resume to its exported student."""

import json

import jax
import pytest
from jax.sharding import SingleDeviceSharding
from transformers import AutoTokenizer

from fireopd_jax.commands.generate import GenerateOptions, generate_to_file
from fireopd_jax.config import UserError
from fireopd_jax.session.exporting import export_run
from fireopd_jax.session.finished import evaluate_model, run_config
from fireopd_jax.session.opening import open_any
from fireopd_jax.text.chat import prompt_ids
from fireopd_jax.training import run as running
from tests.training.test_resume import MODEL, die_in, run

USER = [{"role": "user", "content": "1+2"}]


@pytest.mark.slow
def test_a_run_keeps_its_templates_and_its_date(tmp_path, monkeypatch):
    taught, folder, file = tmp_path / "taught", tmp_path / "run", tmp_path / "dated.jinja"
    run(taught, f"teacher.architecture={MODEL}", "run.steps=1")
    file.write_text("{{ strftime_now('%H:%M') }} {{ messages[0].content }}")
    settings = [
        f"teacher.path={taught}/models/student", f"teacher.chat_template={file}",
        "student.chat_template=chatml", "checks.allow=[template]", "data.max_prompt_tokens=64",
    ]  # fmt: skip
    monkeypatch.setattr(running, "now", lambda: "2024-07-26T23:59:00")
    die_in(monkeypatch, 3, folder, *settings)
    monkeypatch.setattr(running, "now", lambda: "2024-07-27T00:01:00")
    dated = file.read_text()
    file.write_text(dated + "!")
    with pytest.raises(UserError, match=r"^teacher default: its chat template has changed"):
        run(folder, *settings)
    file.write_text(dated)
    summary = run(folder, *settings)
    log = (folder / "logs" / "run.log").read_text()
    assert log.count("it shows 2024-07-26T23:59:00 in all of this run") == 2

    file.unlink()  # The run has what it needs.
    assert evaluate_model(folder, "teacher_default", []) == summary["teacher"]
    assert run_config(folder).teachers["default"].chat_template == dated
    spec, _, kwargs = open_any(str(folder), "teacher_default", None, place())
    (ids,) = prompt_ids(spec.tokenizer, [USER], kwargs)
    assert bytes(ids) == b"23:59 1+2"
    prompts, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "1+2"}\n')
    options = GenerateOptions(max_tokens=2)
    generate_to_file(str(folder), prompts, out, options, name="teacher_default")
    assert json.loads(out.read_text())["prompt"] == "1+2"

    export_run(folder, tmp_path / "hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    spec, _, kwargs = open_any(str(folder), "student", None, place())
    text = theirs.apply_chat_template(USER, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\n1+2<|im_end|>\n<|im_start|>assistant\n"
    ids = theirs.apply_chat_template(USER, add_generation_prompt=True, return_dict=False)
    assert [ids] == prompt_ids(spec.tokenizer, [USER], kwargs)


def place():
    return SingleDeviceSharding(jax.devices()[0])
