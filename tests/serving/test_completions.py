"""What the server answers is what the model gives: texts, seeds, log-probabilities, stops."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fireopd_jax.commands.generate import GenerateOptions, generate_to_file
from fireopd_jax.runtime.compilation import CompileCounter
from tests.serving.served import (
    CONTEXT,
    END,
    MODEL,
    PARAMS,
    TOKENIZER,
    ask,
    server,
    write_folder,
)

TEXT = "abc def"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def served(folder):
    with server(folder) as found:
        yield found


@pytest.fixture(scope="module")
def client(served):
    return served[0]


def log_softmax(tokens):
    """Return the model's log-probabilities in float64 by the plain formula: [L - 1, V]."""
    tokens = np.asarray(tokens, np.int32)[None]
    ones = np.ones(1, np.int32)
    mask = np.ones((1, tokens.shape[1] - 1), bool)
    hidden, head = MODEL.response_hidden(PARAMS, tokens[:, :1], ones, tokens[:, 1:], mask)
    logits = np.asarray(hidden[0], np.float64) @ np.asarray(head, np.float64).T
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_greedy_texts_are_those_of_generate(client, folder, tmp_path):
    prompts = [TEXT, "x", "some words"]
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    settings = GenerateOptions(max_tokens=20, raw=True, temperature=0.0)
    generate_to_file(str(folder), file, tmp_path / "out.jsonl", settings, slots=4)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    answer = ask(client, prompt=prompts, max_tokens=20, temperature=0, return_token_ids=True)
    for index, (row, choice) in enumerate(zip(rows, answer["choices"], strict=True)):
        assert choice["index"] == index and choice["token_ids"] == row["token_ids"]
        assert choice["text"] == row["text"] and choice["finish_reason"] == row["finish"]
        assert choice["prompt_token_ids"] == list(prompts[index].encode())
    drawn = sum(len(row["token_ids"]) for row in rows)
    count = sum(map(len, prompts))
    assert answer["usage"] == {
        "prompt_tokens": count, "completion_tokens": drawn, "total_tokens": count + drawn,
    }  # fmt: skip


def test_token_ids_and_text_are_the_same_prompt(client):
    ids = list(TEXT.encode())
    answers = [
        ask(client, prompt=prompt, max_tokens=8, temperature=0)["choices"][0]["text"]
        for prompt in (TEXT, ids, [TEXT], [ids])
    ]
    assert len(set(answers)) == 1


def test_a_seed_fixes_the_text_and_no_seed_draws_anew(client):
    def texts(**fields):
        answer = ask(client, prompt=TEXT, n=3, max_tokens=12, return_token_ids=True, **fields)
        return [tuple(choice["token_ids"]) for choice in answer["choices"]]

    first = texts(seed=7)
    assert texts(seed=7) == first and len(set(first)) == 3
    assert texts(seed=8) != first
    assert texts() != texts()


def test_samples_of_a_prompt_share_its_prefill(served):
    client, service = served
    before = service.worker.engine.statistics.prefilled
    ask(client, prompt="a" * 100, n=4, max_tokens=2)
    assert service.worker.engine.statistics.prefilled - before == 99


def test_prompt_logprobs_are_those_of_the_plain_formula(client):
    ids = [*TEXT.encode(), END, 5]
    answer = ask(client, prompt=ids, max_tokens=0, prompt_logprobs=3)
    (choice,) = answer["choices"]
    assert choice["text"] == "" and answer["usage"]["completion_tokens"] == 0
    first, *rest = choice["prompt_logprobs"]
    assert first is None and len(rest) == len(ids) - 1
    logp = log_softmax(ids)
    outside = 0
    for row, token, entries in zip(logp, ids[1:], rest, strict=True):
        order = np.argsort(-row, kind="stable")[:3]
        assert next(iter(entries)) == str(token)
        assert {int(each) for each in entries} == {token, *order.tolist()}
        for each, entry in entries.items():
            np.testing.assert_allclose(entry["logprob"], row[int(each)], atol=1e-5)
            inside = int(each) in order
            outside += not inside
            assert entry["rank"] == (order.tolist().index(int(each)) + 1 if inside else None)
            assert entry["decoded_token"] == TOKENIZER.decode([int(each)])
    assert outside


def test_given_ids_are_scored_at_the_source_rows_of_the_proposal(client):
    ids = list(TEXT.encode())
    start = 2
    rng = np.random.default_rng(0)
    support = rng.integers(0, 260, (len(ids) - 1 - start, 5))
    support[1, 3:] = -1
    support[2] = -1
    answer = ask(
        client, prompt=ids, max_tokens=0,
        prompt_logprob_token_ids=support.tolist(), prompt_logprob_start=start,
    )  # fmt: skip
    found = answer["choices"][0]["prompt_token_id_logprobs"]
    logp = log_softmax(ids)
    assert np.shape(found) == support.shape
    for j, (given, row) in enumerate(zip(support, found, strict=True)):
        for token, value in zip(given, row, strict=True):
            if token < 0:
                assert value is None
            else:  # row j is the distribution after the prompt's token start + j
                np.testing.assert_allclose(value, logp[start + j, token], atol=1e-5)


def test_given_ids_equal_the_prompts_own_logprobs(client):
    ids = list(b"a longer prompt")
    answer = ask(
        client, prompt=ids, max_tokens=0, prompt_logprobs=0,
        prompt_logprob_token_ids=[[each] for each in ids[1:]],
    )  # fmt: skip
    (choice,) = answer["choices"]
    entries = zip(ids[1:], choice["prompt_logprobs"][1:], strict=True)
    own = [entry[str(token)]["logprob"] for token, entry in entries]
    assert own == [row[0] for row in choice["prompt_token_id_logprobs"]]


def test_logprobs_of_a_response_are_the_raw_models(client):
    fields = {"prompt": TEXT, "max_tokens": 10, "seed": 3, "temperature": 0.7, "top_p": 0.9}
    bare = ask(client, **fields, logprobs=0, return_token_ids=True)["choices"][0]
    best = ask(client, **fields, logprobs=2, return_tokens_as_token_ids=True)["choices"][0]
    ids = bare["token_ids"]
    logp = log_softmax([*TEXT.encode(), *ids])[len(TEXT) - 1 :]
    expected = logp[np.arange(len(ids)), ids]
    np.testing.assert_allclose(bare["logprobs"]["token_logprobs"], expected, atol=1e-4)
    assert bare["logprobs"]["top_logprobs"] is None
    np.testing.assert_allclose(best["logprobs"]["token_logprobs"], expected, atol=1e-5)
    assert best["logprobs"]["tokens"] == [f"token_id:{each}" for each in ids]
    for row, token, top in zip(logp, ids, best["logprobs"]["top_logprobs"], strict=True):
        named = {*np.argsort(-row)[:2].tolist(), token}
        assert {int(name.removeprefix("token_id:")) for name in top} == named


def test_echo_puts_the_prompt_in_front_with_its_logprobs(client):
    answer = ask(client, prompt=TEXT, max_tokens=3, temperature=0, echo=True, logprobs=1, n=2)
    for choice in answer["choices"]:
        logprobs = choice["logprobs"]
        assert choice["text"].startswith(TEXT)
        assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
        assert logprobs["text_offset"][: len(TEXT)] == list(range(len(TEXT)))
        expected = log_softmax(list(TEXT.encode()))
        rows = np.arange(len(TEXT) - 1)
        np.testing.assert_allclose(
            logprobs["token_logprobs"][1 : len(TEXT)],
            expected[rows, list(TEXT.encode()[1:])],
            atol=1e-5,
        )
    only = ask(client, prompt=TEXT, max_tokens=0, echo=True, logprobs=0)["choices"][0]
    assert only["text"] == TEXT and len(only["logprobs"]["tokens"]) == len(TEXT)


def test_stop_texts_and_stop_tokens_end_a_response(client):
    fields = {"prompt": TEXT, "max_tokens": 24, "seed": 1, "ignore_eos": True}
    fields["return_token_ids"] = True
    whole = ask(client, **fields)["choices"][0]
    assert whole["finish_reason"] == "length" and len(whole["token_ids"]) == 24
    stop = whole["text"][5:7]
    assert stop not in whole["text"][:5]
    cut = ask(client, **fields, stop=["never there", stop])["choices"][0]
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert cut["finish_reason"] == "stop" and cut["stop_reason"] == stop
    kept = ask(client, **fields, stop=stop, include_stop_str_in_output=True)["choices"][0]
    assert kept["text"] == cut["text"] + stop
    token = whole["token_ids"][4]
    ended = ask(client, **fields, stop_token_ids=[token])["choices"][0]
    at = whole["token_ids"].index(token)
    assert ended["token_ids"] == whole["token_ids"][: at + 1] and ended["stop_reason"] == token


def test_a_long_prompt_and_its_response_fill_the_context(client):
    answer = ask(client, prompt=[7] * (CONTEXT - 4), max_tokens=4, ignore_eos=True)
    assert answer["usage"]["total_tokens"] == CONTEXT
    scored = ask(client, prompt=[7, 8] * (CONTEXT // 2), max_tokens=0, prompt_logprobs=0)
    rows = scored["choices"][0]["prompt_logprobs"][1:]
    logp = log_softmax([7, 8] * (CONTEXT // 2))
    last = rows[-1]["8"]["logprob"]
    np.testing.assert_allclose(last, logp[-1, 8], atol=1e-5)


def test_requests_at_once_have_the_answers_that_they_have_alone(served):
    client, service = served
    bodies = [
        {"prompt": f"prompt {i}", "max_tokens": 5 + 3 * i, "seed": i % 3, "n": 1 + i % 2}
        | {"prompt_logprobs": 1}
        for i in range(8)
    ]

    def choices(client, body):
        return ask(client, **body, return_token_ids=True)["choices"]

    alone = [choices(client, body) for body in bodies]
    with ThreadPoolExecutor(8) as pool:
        before = service.worker.engine.statistics.steps
        together = list(pool.map(lambda body: choices(client, body), bodies * 2))
        steps = service.worker.engine.statistics.steps - before
    for one, other in zip(alone * 2, together, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a["token_ids"] == b["token_ids"] and a["text"] == b["text"]
            for left, right in zip(a["prompt_logprobs"][1:], b["prompt_logprobs"][1:], strict=True):
                assert left.keys() == right.keys()
                for key in left:
                    assert abs(left[key]["logprob"] - right[key]["logprob"]) < 1e-5
    tokens = 2 * sum(len(choice["token_ids"]) for own in alone for choice in own)
    assert steps < 0.6 * tokens  # more than one response a step


def test_nothing_compiles_after_the_first_request_of_a_bucket(client):
    def all_kinds(text):
        ids = list(text.encode())
        ask(client, prompt=text, max_tokens=4, logprobs=2, stop=["zz"], n=2)
        ask(client, prompt=text, max_tokens=0, prompt_logprobs=3)
        support = [[1, 2, 3]] * (len(ids) - 1)
        ask(client, prompt=text, max_tokens=0, prompt_logprob_token_ids=support)

    all_kinds(TEXT)
    counter = CompileCounter()
    all_kinds("another prompt, of another length")
    all_kinds("b" * 100)
    assert counter.count == 0
