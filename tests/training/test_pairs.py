"""Students and teachers that are not alike, distilled end to end."""

import copy
import json

import numpy as np
import pyarrow.parquet
import pytest

from fireopd_jax.config import UserError
from fireopd_jax.recipe.models import StudentConfig
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.session.specs import make_spec
from fireopd_jax.text.tokenizer import BUILTIN, CHAT_TEMPLATE, load_tokenizer
from fireopd_jax.training.prepare import with_own_eos
from fireopd_jax.training.run import train

SIZE = (
    "hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1, "
    "head_dim: 8, intermediate_size: 32"
)
BASE = [
    "mesh.data=1",
    "data.path=builtin:addition-1",
    "data.max_prompt_tokens=8",
    "rollout.batch_size=8",
    "rollout.max_tokens=16",
    "optim.learning_rate=1e-3",
    "run.steps=2",
    "run.completions_every=2",
    "eval.problems=0",
]


def run(folder, *settings):
    return train(load_config([*BASE, *settings, f"run.dir={folder}"]))


def check(folder):
    """No step was skipped, and responses hold only valid token ids."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        assert np.isfinite(line["loss"]) and line["skipped"] == 0 and line["grad_norm"] > 0
    rows = pyarrow.parquet.read_table(folder / "completions" / "step_000002.parquet")
    drawn = [token for tokens in rows["tokens"].to_pylist() for token in tokens]
    assert len(drawn) > 50 and max(drawn) < 261
    for name in ("student_logprob", "teacher_logprob"):
        assert np.isfinite(np.concatenate(rows[name].to_pylist())).all()


@pytest.mark.slow
def test_heads_of_other_padding(tmp_path):
    student = f"student.architecture={{{SIZE}, vocab_size: 300}}"
    teacher = f"teacher.architecture={{{SIZE}, vocab_size: 320, tie_word_embeddings: false}}"
    run(tmp_path / "run", student, teacher)
    check(tmp_path / "run")


@pytest.mark.slow
def test_models_of_other_families(tmp_path):
    student = f"student.architecture={{{SIZE}}}"
    teachers = {
        "llama": "model_type: llama, qk_norm: false, rope_theta: 500000",
        "qwen2": "model_type: qwen2, qk_norm: false, attention_bias: true",
        "moe": "model_type: qwen3_moe, moe: {num_experts: 4, moe_intermediate_size: 8}",
    }
    named = [f"teachers.{n}.architecture={{{SIZE}, {kind}}}" for n, kind in teachers.items()]
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{i}", "teacher": name} for i in range(4) for name in teachers]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(tmp_path / "run", student, *named, f"data.path={file}", "data.teacher_column=teacher")
    check(tmp_path / "run")


@pytest.mark.slow
def test_a_teacher_that_ends_and_reads_otherwise(tmp_path):
    """A teacher keeps its own EOS; its responses as references end in the student's EOS."""
    tokenizer = copy.deepcopy(load_tokenizer(BUILTIN))
    tokenizer.eos_token = "<|user|>"
    tokenizer.chat_template = CHAT_TEMPLATE + "!"
    tokenizer.save_pretrained(tmp_path / "teacher")
    sft = "{steps: 60, batch_size: 32, optim: {learning_rate: 1e-2}}"
    settings = [
        f"student.architecture={{{SIZE}}}",
        "student.sft={steps: 2, batch_size: 8, source: teacher}",
        f"teacher.architecture={{{SIZE}}}",
        f"teacher.tokenizer={tmp_path / 'teacher'}",
        f"teacher.sft={sft}",
    ]
    with pytest.raises(UserError, match=r"checks\.allow=\[eos\]"):
        run(tmp_path / "refused", *settings)
    assert not (tmp_path / "refused").exists()
    settings += ["eval.problems=8", "eval.samples=2", "eval.batch_size=8"]
    summary = run(tmp_path / "run", *settings, "checks.allow=[eos, template]")
    check(tmp_path / "run")
    assert summary["teacher"]["finished"] > 0.9 and summary["teacher"]["mean_length"] < 16


@pytest.mark.slow
def test_the_log_shows_a_prompt_as_each_model_reads_it(tmp_path):
    teachers = f"teachers={{a: {{architecture: {{{SIZE}}}}}, b: {{architecture: {{{SIZE}}}}}}}"
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{'x' * 500}{i}", "teacher": "ab"[i % 2]} for i in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [teachers, f"data.path={file}", "data.teacher_column=teacher"]
    run(tmp_path / "run", *settings, "data.max_prompt_tokens=512", "run.steps=1")
    (log,) = (tmp_path / "run" / "logs").iterdir()
    shown = [line for line in log.read_text().splitlines() if ": prompt " in line]
    for line, name, last in zip(shown, ("student", "teacher a", "teacher b"), "001", strict=True):
        assert f"{name}: prompt '<|user|>xxx" in line and f"x{last}<|end|><|assistant|>'" in line
        assert "504 tokens: 259 120 120" in line and line.endswith("stop tokens <|end|>")
        assert len(line) < 700


def test_a_reference_ends_in_the_models_own_eos():
    spec = make_spec("student", StudentConfig())
    said = np.array([49, 50, 259], np.int32)
    assert with_own_eos(spec, said).tolist() == [49, 50, 257]
    assert with_own_eos(spec, np.array([49, 257], np.int32)).tolist() == [49, 257]
    assert with_own_eos(spec.limited(200), np.array([49, 257], np.int32)) is None
