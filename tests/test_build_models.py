"""Models from Hugging Face folders: types, lengths, refusals, and a run that begins with them."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from fireopd_jax.build import make_spec
from fireopd_jax.config import UserError
from fireopd_jax.models.architecture import MoEConfig
from fireopd_jax.models.hf_config import hf_config_json
from fireopd_jax.models.hf_names import hf_tensors
from fireopd_jax.recipe import StudentConfig, TeacherConfig, load_config
from fireopd_jax.sft import SftConfig
from fireopd_jax.text.tokenizer import byte_tokenizer
from tests.cases import random_params, tiny_model

WORDS = 272  # 261 of the tokenizer, and padding


def folder(path, dtype="float32", vocabulary=WORDS, seed=0, **architecture):
    """Write a model and its tokenizer as Hugging Face does; give the parameters."""
    model = tiny_model(vocabulary, num_hidden_layers=2, **architecture)
    params = random_params(model, seed)
    path.mkdir(parents=True)
    save_file(dict(hf_tensors(params, model.config, dtype)), path / "model.safetensors")
    written = hf_config_json(model.config, vocabulary, dtype=dtype)
    (path / "config.json").write_text(json.dumps(written))
    byte_tokenizer().save_pretrained(path)
    return params


def test_who_learns_is_kept_in_float32_and_who_is_frozen_as_it_computes(tmp_path):
    folder(tmp_path / "m", "bfloat16")
    path = str(tmp_path / "m")

    def types(config):
        c = make_spec("student", config).model.config
        return c.dtype, c.param_dtype

    assert types(StudentConfig(path=path)) == ("bfloat16", "float32")
    assert types(TeacherConfig(path=path)) == ("bfloat16", "bfloat16")
    assert types(TeacherConfig(path=path, dtype="float32")) == ("float32", "float32")
    assert types(TeacherConfig(path=path, sft=SftConfig(steps=1))) == ("bfloat16", "float32")
    chosen = StudentConfig(path=path, dtype="float32", param_dtype="bfloat16")
    assert types(chosen) == ("float32", "bfloat16")
    spec = make_spec("student", StudentConfig(path=path))
    assert (spec.model.vocab_size, spec.model.size) == (WORDS, len(byte_tokenizer()))


@pytest.mark.parametrize(
    ("break_", "message"),
    [
        (lambda m: (m / "config.json").unlink(), "holds neither model.json nor config.json"),
        (lambda m: [f.unlink() for f in m.glob("tokenizer*")], "holds no tokenizer.json"),
        (lambda m: (m / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}'),
         "GPT2LMHeadModel is not supported; supported are Qwen3ForCausalLM"),
    ],
)  # fmt: skip
def test_folders_that_lack_something(tmp_path, break_, message):
    folder(tmp_path / "m")
    break_(tmp_path / "m")
    with pytest.raises(UserError) as caught:
        make_spec("student", StudentConfig(path=str(tmp_path / "m")))
    assert message in str(caught.value) and "\n" not in str(caught.value)


TINY = ["mesh.data=1", "data.path=builtin:addition-1", "data.max_prompt_tokens=8",
        "rollout.batch_size=8", "rollout.max_tokens=8", "run.steps=1", "eval.problems=0",
        "run.compilation_cache=false"]  # fmt: skip


def test_texts_longer_than_the_model_is_made_for_are_refused(tmp_path):
    from fireopd_jax.build import set_up

    folder(tmp_path / "m", max_position_embeddings=12)
    config = load_config([*TINY, f"student.path={tmp_path}/m", f"teacher.path={tmp_path}/m"])
    with pytest.raises(UserError, match=r"make 16 tokens, the model is made for 12"):
        set_up(config)
    shorter = dataclasses.replace(config.rollout, max_tokens=4)
    set_up(dataclasses.replace(config, rollout=shorter))


def test_a_run_begins_with_models_of_two_families(tmp_path):
    """A mixture of experts teaches a windowed model; their heads are padded differently."""
    from fireopd_jax.inference import open_model
    from fireopd_jax.training import train

    start = folder(tmp_path / "student", sliding_window=4)
    experts = MoEConfig(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8)
    teacher = folder(
        tmp_path / "teacher", vocabulary=264, seed=1, model_type="qwen3_moe", moe=experts
    )
    paths = [f"{name}.path={tmp_path}/{name}" for name in ("student", "teacher")]
    train(load_config([*TINY, *paths, f"run.dir={tmp_path}/run"]))
    _, kept = open_model(tmp_path / "run", "student_start")
    assert jax.tree.all(jax.tree.map(np.array_equal, kept, start))
    _, kept = open_model(tmp_path / "run", "teacher_default")
    assert jax.tree.all(jax.tree.map(np.array_equal, kept, teacher))
    _, after = open_model(tmp_path / "run", "student")
    assert not jax.tree.all(jax.tree.map(np.array_equal, after, start))
