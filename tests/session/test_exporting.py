"""Exports of a run's models as Hugging Face folders: finished ones and checkpoints."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from fireopd_jax.commands.generate import GenerateOptions, generate_to_file
from fireopd_jax.config import UserError
from fireopd_jax.models.hf_names import hf_tensors
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.session.exporting import export_run
from fireopd_jax.session.finished import open_model
from fireopd_jax.text.tokenizer import BUILTIN, load_tokenizer
from fireopd_jax.training.run import train

MODEL = (
    "{hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1, "
    "head_dim: 8, intermediate_size: 32%s}"
)
SETTINGS = [
    "smoke",
    "mesh.data=1",
    "data.path=builtin:addition-1",
    "data.max_prompt_tokens=8",
    "rollout.batch_size=8",
    "rollout.max_tokens=16",
    "student.sft={steps: 40, batch_size: 32, optim: {learning_rate: 1e-2}}",
    f"student.architecture={MODEL % ''}",
    f"teacher.architecture={MODEL % ''}",
    "run.steps=3",
    "run.save_every=2",
    "eval.problems=0",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(load_config([*SETTINGS, "run.export=true", f"run.dir={folder}"]))
    return folder


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, other):
    assert one.keys() == other.keys()
    return all(np.array_equal(one[name], other[name]) for name in one)


def test_a_run_exports_its_student_at_the_end(run, tmp_path):
    spec, params = open_model(run, "student")
    written = weights(run / "models" / "student_hf")
    assert same(written, dict(hf_tensors(params, spec.model.config)))
    export_run(run, tmp_path / "again")
    assert same(written, weights(tmp_path / "again"))
    card = (tmp_path / "again" / "README.md").read_text()
    assert "`student` of the run `run` of fireopd-jax, after 3 steps" in card
    assert card.startswith("---\nlibrary_name: transformers\n")


def test_a_checkpoint_is_exported_by_its_step(run, tmp_path):
    export_run(run, tmp_path / "two", step=2)
    export_run(run, tmp_path / "three", step=3)
    finished = weights(run / "models" / "student_hf")
    assert same(weights(tmp_path / "three"), finished)
    assert not same(weights(tmp_path / "two"), finished)
    export_run(run, tmp_path / "start", model="student_start")
    assert not same(weights(tmp_path / "two"), weights(tmp_path / "start"))
    assert "after 2 steps" in (tmp_path / "two" / "README.md").read_text()


def test_a_run_that_goes_on_can_be_exported(run, tmp_path):
    going = tmp_path / "run"
    shutil.copytree(run, going)
    (going / "summary.json").unlink()
    shutil.rmtree(going / "models" / "student")
    (going / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()
    export_run(going, tmp_path / "out", step=2)
    with pytest.raises(UserError, match="no model 'student'"):
        export_run(going, tmp_path / "none")


def test_mistakes_are_named(run, tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint of step 1; there are 2, 3"):
        export_run(run, tmp_path / "out", step=1)
    with pytest.raises(UserError, match="no checkpoints of 'studnet'"):
        export_run(run, tmp_path / "out", step=2, model="studnet")
    with pytest.raises(UserError, match="no checkpoint of step 2; there is none"):
        export_run(tmp_path / "nowhere", tmp_path / "out", step=2)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        export_run(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(UserError, match="exists"):
        export_run(run, tmp_path / "full")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_what_cannot_be_exported_is_refused_before_the_run(tmp_path):
    settings = [*SETTINGS, f"student.architecture={MODEL % ', qk_norm: false'}"]
    with pytest.raises(UserError, match="cannot have qk_norm=False"):
        train(load_config([*settings, "run.export=true", f"run.dir={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()


def test_an_exported_student_is_a_student_again(run, tmp_path):
    path = run / "models" / "student_hf"
    others = [setting for setting in SETTINGS if not setting.startswith("student.")]
    folder = tmp_path / "run"
    train(load_config([*others, f"student.path={path}", "run.steps=1", f"run.dir={folder}"]))
    _, params = open_model(run, "student")
    # It is read from its path, and not copied into the run.
    assert not (folder / "models" / "student_start").exists()
    _, start = open_model(folder, "student_start")
    assert all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(params), strict=True)
    )


@pytest.mark.parity
def test_transformers_says_the_same(run, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i}+{i + 1}"}) + "\n" for i in range(4)))
    generate_to_file(
        str(run), prompts, tmp_path / "ours.jsonl", GenerateOptions(max_tokens=12, temperature=0.0)
    )
    model = AutoModelForCausalLM.from_pretrained(run / "models" / "student_hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(str(run / "models" / "student_hf"))
    assert tokenizer.get_vocab() == load_tokenizer(BUILTIN).get_vocab()
    for line in (tmp_path / "ours.jsonl").read_text().splitlines():
        ours = json.loads(line)
        chat = [{"role": "user", "content": ours["prompt"]}]
        ids = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            out = model.generate(**ids, do_sample=False, max_new_tokens=12)[0]
            logp = model(out[None]).logits[0].log_softmax(-1)
        start = ids["input_ids"].shape[1]
        assert out[start:].tolist() == ours["token_ids"]
        wanted = [logp[start + t - 1, token] for t, token in enumerate(ours["token_ids"])]
        np.testing.assert_allclose(ours["logprobs"], wanted, atol=2e-5)
