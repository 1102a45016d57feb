"""Models from Hugging Face folders: types, lengths, refusals, and a run that begins with them."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from fireopd_jax.config import UserError
from fireopd_jax.models.architecture import DecoderConfig, MoEConfig
from fireopd_jax.models.hf_config import hf_config_json
from fireopd_jax.models.hf_load import read_config
from fireopd_jax.models.hf_names import hf_tensors
from fireopd_jax.recipe.models import StudentConfig, TeacherConfig
from fireopd_jax.recipe.optim import SftConfig
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.session.specs import make_spec
from fireopd_jax.text.tokenizer import byte_tokenizer
from tests.cases import random_params, tiny_model

WORDS = 272  # 261 of the tokenizer, and padding


def folder(path, dtype="float32", vocabulary=WORDS, seed=0, **architecture):
    """Save a model and its tokenizer in Hugging Face's format; return the parameters."""
    model = tiny_model(vocabulary, num_hidden_layers=2, **architecture)
    params = random_params(model, seed)
    path.mkdir(parents=True)
    save_file(dict(hf_tensors(params, model.config, dtype)), path / "model.safetensors")
    written = hf_config_json(model.config, vocabulary, dtype=dtype)
    (path / "config.json").write_text(json.dumps(written))
    byte_tokenizer().save_pretrained(path)
    return params


def test_who_learns_is_kept_in_float32_and_who_is_frozen_as_it_is(tmp_path, monkeypatch):
    folder(tmp_path / "m", "bfloat16")
    path = str(tmp_path / "m")

    def types(config):
        c = make_spec("student", config).model.config
        return c.dtype, c.param_dtype

    # XLA on a CPU would convert every operand and result of a bfloat16 product.
    assert types(StudentConfig(path=path)) == ("float32", "float32")
    assert types(StudentConfig(path=path, dtype="bfloat16")) == ("bfloat16", "float32")
    assert types(TeacherConfig(path=path)) == ("float32", "bfloat16")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
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


def test_an_architecture_beside_a_path_is_held_against_the_folder(tmp_path):
    folder(tmp_path / "m", rope_theta=5000.0)
    path, file = str(tmp_path / "m"), tmp_path / "m" / "config.json"
    same = dataclasses.replace(read_config(tmp_path / "m"), dtype="bfloat16")
    spec = make_spec("student", StudentConfig(path=path, architecture=same))
    assert spec.model.config.dtype == "float32"  # types are not of the architecture
    open_ = dataclasses.replace(same, vocab_size=None, max_position_embeddings=None)
    make_spec("student", StudentConfig(path=path, architecture=open_))
    changes = {
        "rope_theta": (1e6, "1000000.0", "5000.0"),
        "vocab_size": (999, "999", str(WORDS)),
        "sliding_window": (3, "3", "null"),
        "max_position_embeddings": (77, "77", "null"),
        "moe": (MoEConfig(num_experts=3), "{'num_experts': 3, ", "null"),
    }
    for name, (value, shown, found) in changes.items():
        other = dataclasses.replace(same, **{name: value})
        with pytest.raises(UserError) as caught:
            make_spec("teacher a", TeacherConfig(path=path, architecture=other))
        message = str(caught.value)
        assert (
            message.startswith(f"teacher a.architecture.{name} is {shown}") and "\n" not in message
        )
        assert f"{file} has {found}; " in message
    # What is given comes before what is left out.
    given = [f"student.path={path}", "student.architecture.hidden_size=48", f"teacher.path={path}"]
    with pytest.raises(UserError, match=r"student\.architecture\.hidden_size is 48, "):
        make_spec("student", load_config(given).student)
    given[1] = f"student.architecture.hidden_size={same.hidden_size}"
    with pytest.raises(UserError, match=r"is \S+ \(the default\), .* of the folder, or none"):
        make_spec("student", load_config(given).student)


def test_an_architecture_is_held_against_a_model_of_a_run(tmp_path):
    spec = make_spec("student", StudentConfig(architecture=DecoderConfig(head_dim=16)))
    (tmp_path / "model.json").write_text(json.dumps(spec.description()))
    same = dataclasses.replace(spec.model.config, vocab_size=spec.model.vocab_size)
    make_spec("student", StudentConfig(path=str(tmp_path), architecture=same))
    other = dataclasses.replace(same, head_dim=64)
    with pytest.raises(UserError, match=r"head_dim is 64, .*model\.json has 16; "):
        make_spec("student", StudentConfig(path=str(tmp_path), architecture=other))


TINY = ["mesh.data=1", "data.path=builtin:addition-1", "data.max_prompt_tokens=8",
        "rollout.batch_size=8", "rollout.max_tokens=8", "run.steps=1", "eval.problems=0",
        "run.compilation_cache=false"]  # fmt: skip


def test_texts_longer_than_the_model_is_made_for_are_refused(tmp_path):
    from fireopd_jax.session.setup import set_up

    folder(tmp_path / "m", max_position_embeddings=12)
    config = load_config([*TINY, f"student.path={tmp_path}/m", f"teacher.path={tmp_path}/m"])
    with pytest.raises(UserError, match=r"make 16 tokens, more than the model.s 12"):
        set_up(config)
    shorter = dataclasses.replace(config.rollout, max_tokens=4)
    set_up(dataclasses.replace(config, rollout=shorter))


@pytest.mark.slow
def test_a_run_begins_with_models_of_two_families(tmp_path):
    """A mixture-of-experts teacher and a windowed student, whose heads are padded differently."""
    from fireopd_jax.session.finished import open_model
    from fireopd_jax.training.run import train

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


@pytest.mark.slow
@pytest.mark.parity
def test_the_quickstart_runs_on_folders_that_transformers_wrote(tmp_path):
    """The shipped file with two paths set over it; only lengths and counts are smaller."""
    pytest.importorskip("torch")
    import transformers

    from fireopd_jax.training.run import train

    sizes = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 32, "head_dim": 8}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    for name, kind in (("student", "Qwen3"), ("teacher", "Llama")):
        config = getattr(transformers, f"{kind}Config")(**sizes)
        getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    paths = [f"{name}.path={tmp_path}/{name}" for name in ("student", "teacher")]
    shrunk = ["run.steps=2", "run.compare=[]", "rollout.batch_size=8", "optim.warmup_steps=0",
              "eval.problems=8", "eval.samples=1", "eval.batch_size=8", "eval.every=0",
              "mesh.data=1", "run.compilation_cache=false"]  # fmt: skip
    config = load_config(["configs/quickstart.yaml", *paths, *shrunk, f"run.dir={tmp_path}/run"])
    assert config.student.sft is None and config.student.architecture == DecoderConfig()
    summary = train(config)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    steps = [step for step in steps if "loss" in step]
    assert len(steps) == 2 and all(step["skipped"] == 0 for step in steps)
    assert summary["steps"] == 2 and summary["student_after"]["finished"] <= 1
