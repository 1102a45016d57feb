"""Folders as users have them: keys to ignore, missing vocabularies, stop ids, adapters."""

import json

import numpy as np
import pytest
import yaml

from fireopd_jax.commands.generate import GenerateOptions, generate_to_file
from fireopd_jax.config import UserError
from fireopd_jax.recipe.models import ModelConfig, StudentConfig, TeacherConfig
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.session.finished import open_model, run_config
from fireopd_jax.session.specs import load_spec, make_spec
from tests.session.test_setup_models import WORDS, folder


def edit(file, **values):
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | values))


def refusal(make, *arguments, **more):
    with pytest.raises(UserError) as caught:
        make(*arguments, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def model(tmp_path):
    """A folder whose config.json has a key that could change the computation."""
    folder(tmp_path / "m")
    edit(tmp_path / "m" / "config.json", use_mrope=True)
    return tmp_path / "m"


@pytest.mark.parametrize(
    ("name", "config", "setting"),
    [
        ("student", StudentConfig, "student.ignore_config_keys=[use_mrope]"),
        ("teacher math", TeacherConfig, "teachers.math.ignore_config_keys=[use_mrope]"),
        ("teacher a.b", TeacherConfig, 'teachers."a.b".ignore_config_keys=[use_mrope]'),
        ("base", ModelConfig, "base.ignore_config_keys=[use_mrope]"),
        ("model", ModelConfig, "--ignore-config-keys use_mrope"),
    ],
)
def test_the_error_names_the_way_to_load_the_model_and_the_way_works(model, name, config, setting):
    message = refusal(make_spec, name, config(path=str(model)))
    assert f"{model / 'config.json'}: use_mrope: unknown in a qwen3 model" in message
    assert "(it is True)" in message and message.endswith(f"give {setting}")
    spec = make_spec(name, config(path=str(model), ignore_config_keys=("use_mrope",)))
    assert spec.model.config.hidden_size == 16


def test_the_setting_of_the_error_is_a_key_of_the_configuration(model):
    given = [f"teachers.math.path={model}", "teachers.math.ignore_config_keys=[use_mrope]"]
    given += [f"student.path={model}", "student.ignore_config_keys=[use_mrope]"]
    config = load_config(given)
    assert config.teachers["math"].ignore_config_keys == ("use_mrope",)
    assert config.student.ignore_config_keys == ("use_mrope",)


def test_a_run_reopens_its_frozen_models_without_the_ignored_keys(model, tmp_path):
    run = tmp_path / "run"
    (run / "models").mkdir(parents=True)
    record = {"folder": str(model), "revision": None, "sha256": {}}
    sources = {"teacher math": record, "base": record}
    (run / "models" / "sources.json").write_text(json.dumps(sources))
    frozen = {"path": "gone", "ignore_config_keys": ["use_mrope"]}
    written = {"teachers": {"math": frozen | {"quantize": "int8"}}, "base": frozen}
    (run / "config.yaml").write_text(yaml.safe_dump(written))
    spec, params = open_model(run, "teacher_math")
    assert spec.model.quantize == "int8" and params["embed_tokens"].shape == (WORDS, 16)
    assert open_model(run, "base")[0].model.quantize is None
    again = run_config(run).teachers["math"]
    assert (again.path, again.ignore_config_keys) == (str(model), ("use_mrope",))


def test_models_that_a_run_saved_have_no_keys_to_ignore(model, tmp_path):
    saved = make_spec("student", StudentConfig(path=str(model), ignore_config_keys=("use_mrope",)))
    run = tmp_path / "run"
    (run / "models" / "student_start").mkdir(parents=True)
    description = json.dumps(saved.description() | {"tokenizer": "builtin:bytes"})
    (run / "models" / "student_start" / "model.json").write_text(description)
    student = {"path": "gone", "ignore_config_keys": ["use_mrope"]}
    (run / "config.yaml").write_text(yaml.safe_dump({"student": student, "teacher": {}}))
    config = run_config(run).student
    assert config.ignore_config_keys == ()
    assert make_spec("student", config).model.config == saved.model.config
    again = StudentConfig(path=config.path, ignore_config_keys=("use_mrope",))
    message = refusal(make_spec, "student", again)
    assert "student.ignore_config_keys: " in message and "is a model of a run" in message


def test_generate_has_an_option_for_the_keys(model, tmp_path):
    prompts, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "ab"}\n')
    options = GenerateOptions(max_tokens=2, raw=True)
    message = refusal(generate_to_file, str(model), prompts, out, options)
    assert message.endswith("give --ignore-config-keys use_mrope")
    generate_to_file(str(model), prompts, out, options, ignore_config_keys=["use_mrope"])
    assert len(out.read_text().splitlines()) == 1
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}")
    other = tmp_path / "other.jsonl"
    message = refusal(
        generate_to_file, str(tmp_path / "run"), prompts, other, ignore_config_keys=["x"]
    )
    assert "is a run, its config.yaml has them" in message


def test_a_folder_without_a_vocabulary_is_refused(tmp_path):
    folder(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").unlink()
    assert (tmp_path / "m" / "tokenizer_config.json").is_file()
    message = refusal(make_spec, "student", StudentConfig(path=str(tmp_path / "m")))
    assert "holds no tokenizer.json, nor another vocabulary (vocab.json, " in message
    assert message.endswith("it has tokenizer_config.json")


def test_a_vocabulary_of_added_tokens_alone_is_refused(tmp_path):
    folder(tmp_path / "m")
    file = tmp_path / "m" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] = {}
    file.write_text(json.dumps(content))
    message = refusal(make_spec, "student", StudentConfig(path=str(tmp_path / "m")))
    assert "its vocabulary holds no tokens besides the 5 added ones" in message


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_stop_ids_outside_the_vocabulary_are_refused(tmp_path, name):
    folder(tmp_path / "m")
    edit(tmp_path / "m" / name, eos_token_id=[257, WORDS])
    message = refusal(make_spec, "student", StudentConfig(path=str(tmp_path / "m")))
    assert f"eos_token_id has the id {WORDS}, outside the vocabulary of {WORDS} ids" in message
    assert name in message
    edit(tmp_path / "m" / name, eos_token_id=[257, WORDS - 1])
    spec = make_spec("student", StudentConfig(path=str(tmp_path / "m")))
    assert spec.stop == (257, WORDS - 1)


def test_stop_ids_of_config_json_hold_where_the_other_file_has_none(tmp_path):
    folder(tmp_path / "m")
    edit(tmp_path / "m" / "config.json", eos_token_id=[7, 257])
    config = StudentConfig(path=str(tmp_path / "m"))
    assert make_spec("student", config).stop == (257, 7)
    edit(tmp_path / "m" / "generation_config.json", temperature=0.6)
    spec = make_spec("student", config)
    assert spec.stop == (257, 7)
    assert spec.description()["generation"] == {"temperature": 0.6, "eos_token_id": [7, 257]}
    edit(tmp_path / "m" / "generation_config.json", eos_token_id=9)
    assert make_spec("student", config).stop == (257, 9)


def test_adapters_beside_weights_are_refused(tmp_path):
    folder(tmp_path / "m")
    edit(tmp_path / "m" / "adapter_config.json", base_model_name_or_path="a/b")
    message = refusal(load_spec, "model", tmp_path / "m", ModelConfig(path="m"))
    assert "adapter_config.json: adapters (of a/b) are not read" in message
    (tmp_path / "m" / "config.json").unlink()
    assert "adapters (of a/b)" in refusal(load_spec, "model", tmp_path / "m", ModelConfig(path="m"))


def test_a_smollm3_folder_is_a_student(tmp_path):
    folder(tmp_path / "m", model_type="smollm3", qk_norm=False, no_rope_layers=(1, 0))
    spec = make_spec("student", StudentConfig(path=str(tmp_path / "m")))
    assert [kind.theta is None for kind in spec.model.config.kinds] == [False, True]
    assert np.dtype(spec.model.config.dtype) == np.float32
