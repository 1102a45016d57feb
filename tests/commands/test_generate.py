"""Answers to a file of prompts: those of `transformers`, in order, and none lost by a kill."""

import json

import numpy as np
import pytest

from fireopd_jax.commands import generate as generating
from fireopd_jax.commands.generate import GenerateOptions, generate_to_file
from fireopd_jax.config import UserError
from fireopd_jax.models.hf_export import export_model
from tests.cases import random_params, tiny_model
from tests.commands.calling import TOKENIZER, model_folder

MODEL = tiny_model(len(TOKENIZER), num_hidden_layers=2, max_position_embeddings=80)
ROWS = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory, MODEL)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghij klmnop"))
    texts = ["".join(rng.choice(letters, rng.integers(1, 30))) for _ in range(ROWS)]
    file = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return file


def answers(folder, prompts, out, slots=8, tensor=1, logprobs=True, **settings):
    settings = GenerateOptions(**{"max_tokens": 20, "raw": True} | settings)
    generate_to_file(
        str(folder), prompts, out, settings, slots=slots, tensor=tensor, logprobs=logprobs
    )
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parity
def test_greedy_answers_are_those_of_transformers(folder, prompts, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    rows = answers(folder, prompts, tmp_path / "out.jsonl", temperature=0.0)
    asked = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == asked
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = [list(text.encode()) for text in asked]
    width = max(map(len, ids))
    left = torch.tensor([[0] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    with torch.no_grad():
        out = model.generate(
            input_ids=left, attention_mask=mask, do_sample=False, max_new_tokens=20,
            pad_token_id=256, eos_token_id=257,
        )  # fmt: skip
    stopped = 0
    for row, prompt, theirs in zip(rows, ids, out[:, width:].tolist(), strict=True):
        end = theirs.index(257) + 1 if 257 in theirs else len(theirs)
        stopped += 257 in theirs
        assert row["token_ids"] == theirs[:end]
        assert row["finish"] == ("stop" if 257 in theirs else "length")
        with torch.no_grad():
            logp = model(torch.tensor([prompt + theirs[:end]])).logits[0].log_softmax(-1)
        wanted = [logp[len(prompt) - 1 + t, token] for t, token in enumerate(theirs[:end])]
        np.testing.assert_allclose(row["logprobs"], wanted, atol=1e-4)


@pytest.mark.slow
def test_a_killed_command_goes_on_where_it_was(folder, prompts, tmp_path, monkeypatch):
    whole = answers(folder, prompts, tmp_path / "whole.jsonl", samples=2)
    assert len(whole) == 2 * ROWS
    calls, record = [], generating.record

    def dies(*arguments):
        calls.append(1)
        if len(calls) > 40:
            raise KeyboardInterrupt
        return record(*arguments)

    monkeypatch.setattr(generating, "record", dies)
    out = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answers(folder, prompts, out, samples=2)
    assert not out.exists()
    part = tmp_path / ".out.jsonl.part"
    assert len(part.read_text().splitlines()) == 41
    with part.open("a") as file:
        file.write('{"index": 3, "ro')  # a line that the kill cut off
    with pytest.raises(UserError, match=r"begun with temperature=1\.0, not 0\.5"):
        answers(folder, prompts, out, samples=2, temperature=0.5)
    monkeypatch.setattr(generating, "record", record)
    drawn = []
    stream = generating.Engine.stream

    def counted(self, requests):
        drawn.extend(requests)
        return stream(self, drawn)

    monkeypatch.setattr(generating.Engine, "stream", counted)
    again = answers(folder, prompts, out, samples=2, slots=5, tensor=2)
    assert len(drawn) == 2 * ROWS - 40
    for one, other in zip(whole, again, strict=True):
        np.testing.assert_allclose(one.pop("logprobs"), other.pop("logprobs"), atol=1e-4)
        assert one == other
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "whole.jsonl"]


def test_raw_prompts_have_no_template_and_chats_are_refused_there(folder, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "ab"}\n')
    raw = answers(folder, file, tmp_path / "raw.jsonl", temperature=0.0)
    rendered = answers(folder, file, tmp_path / "chat.jsonl", temperature=0.0, raw=False)
    assert raw[0]["token_ids"] != rendered[0]["token_ids"]
    file.write_text(
        '{"prompt": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}'
    )
    with pytest.raises(UserError, match=r"p\.jsonl.*--raw expects a plain-text prompt"):
        answers(folder, file, tmp_path / "out.jsonl")
    file.write_text('{"prompt": ""}\n')
    with pytest.raises(UserError, match=r"the prompt is empty"):
        answers(folder, file, tmp_path / "out.jsonl")


def test_a_response_stays_within_the_models_positions(folder, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"prompt": "x" * 75}) + "\n")
    (row,) = answers(folder, file, tmp_path / "out.jsonl", logprobs=False)
    assert len(row["token_ids"]) <= 5 and "logprobs" not in row
    file.write_text(json.dumps({"prompt": "x" * 80}) + "\n")
    with pytest.raises(UserError, match=r"p\.jsonl:1: the prompt has 80 tokens, no room"):
        answers(folder, file, tmp_path / "other.jsonl")


@pytest.mark.slow
def test_the_type_of_the_computation_may_be_chosen(folder, prompts, tmp_path):
    exact = answers(folder, prompts, tmp_path / "a.jsonl", temperature=0.0, max_tokens=3)
    half = answers(
        folder, prompts, tmp_path / "b.jsonl", temperature=0.0, max_tokens=3, dtype="bfloat16"
    )
    first = [abs(a["logprobs"][0] - b["logprobs"][0]) for a, b in zip(exact, half, strict=True)
             if a["token_ids"][0] == b["token_ids"][0]]  # fmt: skip
    assert len(first) > ROWS // 2 and 1e-5 < np.mean(first) < 0.2


def test_short_and_long_prompts_have_the_responses_of_one_engine(tmp_path, monkeypatch):
    model = tiny_model(len(TOKENIZER), num_hidden_layers=1, max_position_embeddings=400)
    export_model(tmp_path / "hf", random_params(model), model.config, TOKENIZER, stop=(257,),
                 card="# a model\n")  # fmt: skip
    file = tmp_path / "p.jsonl"
    texts = ["ab", "c" * 300, "de", "f" * 290]
    file.write_text("".join(json.dumps({"q": t, "n": i}) + "\n" for i, t in enumerate(texts)))
    widths, made = [], generating.Engine

    def engine(*arguments, width, **others):
        widths.append(width)
        return made(*arguments, width=width, **others)

    monkeypatch.setattr(generating, "Engine", engine)

    def lines(name):
        out = tmp_path / name
        options = GenerateOptions(max_tokens=6, samples=2, raw=True)
        generate_to_file(str(tmp_path / "hf"), file, out, options, column="q", slots=4)
        return [json.loads(line) for line in out.read_text().splitlines()]

    found = lines("buckets.jsonl")
    assert widths == [16, 304]
    assert [(line["n"], line["sample"]) for line in found] == [
        (n, sample) for n in range(4) for sample in range(2)
    ]
    assert [line["q"] for line in found] == [line["prompt"] for line in found]
    monkeypatch.setattr(generating, "by_length", lambda all: [(304, list(range(len(all))))])
    single = lines("single.jsonl")
    assert widths == [16, 304, 304]
    assert [line["token_ids"] for line in found] == [line["token_ids"] for line in single]
