"""Conversations, errors, limits, and the command itself."""

import signal
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest

from fireopd_jax import cli
from fireopd_jax.config import UserError
from fireopd_jax.rollout.streaming import Engine
from fireopd_jax.serving.server import bound, context_of
from fireopd_jax.text.chat import prompt_ids
from tests.cases import one_device
from tests.serving.served import (
    CONTEXT,
    MODEL,
    TOKENIZER,
    ask,
    refused,
    server,
    write_folder,
)

USER = {"role": "user", "content": "hello"}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def served(folder):
    with server(folder, queue=12) as found:
        yield found


@pytest.fixture(scope="module")
def client(served):
    return served[0]


def test_a_chat_is_its_template_completed(client):
    answer = ask(client, CHAT, messages=[USER], max_tokens=9, temperature=0, return_token_ids=True)
    (ids,) = prompt_ids(TOKENIZER, [[USER]], {})
    assert answer["prompt_token_ids"] == ids
    same = ask(client, prompt=ids, max_tokens=9, temperature=0)["choices"][0]
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": same["text"]}
    assert answer["usage"]["prompt_tokens"] == len(ids)
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    message = {"role": "user", "content": parts, "name": None}
    again = ask(client, CHAT, messages=[message], max_completion_tokens=9, temperature=0)
    assert again["choices"][0]["message"] == answer["choices"][0]["message"]


@pytest.mark.parametrize("begun", ["The answer", " spaces around \n", "", "<|end|> in a text"])
def test_a_begun_message_is_continued_exactly_after_it(client, begun):
    messages = [USER, {"role": "assistant", "content": begun}]
    answer = ask(
        client, CHAT, messages=messages, continue_final_message=True,
        add_generation_prompt=False, max_tokens=9, temperature=0, return_token_ids=True, n=2,
    )  # fmt: skip
    rendered = "<|user|>hello<|end|><|assistant|>" + begun
    ids = TOKENIZER(rendered, add_special_tokens=False)["input_ids"]
    assert answer["prompt_token_ids"] == ids
    same = ask(client, prompt=ids, max_tokens=9, temperature=0)["choices"][0]["text"]
    assert [choice["message"]["content"] for choice in answer["choices"]] == [same, same]


def test_continuing_the_text_of_a_response_gives_the_rest_of_it(client):
    fields = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
    found = 0
    for word in "abcdefghijkl":
        user = {"role": "user", "content": word}
        whole = ask(client, CHAT, messages=[user], max_tokens=10, **fields)["choices"][0]
        begun = whole["token_ids"][:2]
        text = TOKENIZER.decode(begun)
        if TOKENIZER(text, add_special_tokens=False)["input_ids"] != begun:
            continue  # half a character
        messages = [user, {"role": "assistant", "content": text}]
        rest = ask(
            client, CHAT, messages=messages, continue_final_message=True, max_tokens=8, **fields
        )
        assert rest["choices"][0]["token_ids"] == whole["token_ids"][2:]
        found += 1
    assert found


def test_chat_logprobs_list_the_best_tokens(client):
    fields = {"messages": [USER], "max_tokens": 5, "temperature": 0, "logprobs": True}
    (choice,) = ask(client, CHAT, **fields, top_logprobs=2)["choices"]
    for entry in choice["logprobs"]["content"]:
        top = entry["top_logprobs"]
        assert len(top) == 2 and top[0]["logprob"] >= top[1]["logprob"]
        assert top[0]["token"] == entry["token"]  # greedy
        assert bytes(entry["bytes"]).decode() == entry["token"]
    (bare,) = ask(client, CHAT, **fields)["choices"]
    assert all(entry["top_logprobs"] == [] for entry in bare["logprobs"]["content"])


def test_tokenize_answers_for_texts_and_conversations(client):
    found = ask(client, "/tokenize", prompt="ab", return_token_strs=True)
    assert found == {
        "count": 2, "max_model_len": CONTEXT, "tokens": [97, 98], "token_strs": ["a", "b"],
    }  # fmt: skip
    (ids,) = prompt_ids(TOKENIZER, [[USER]], {})
    assert ask(client, "/tokenize", messages=[USER])["tokens"] == ids
    bare = ask(client, "/tokenize", messages=[USER], add_generation_prompt=False)["tokens"]
    assert bare == ids[:-1]
    assert ask(client, "/detokenize", tokens=[97, 98])["prompt"] == "ab"


@pytest.mark.parametrize(
    "path, body, status, param, words",
    [
        ("", {"prompt": "a", "model": "tinny"}, 404, "model", ["'tinny'", "'tiny'"]),
        ("", {"prompt": "a", "temprature": 1}, 400, "temprature", ["did you mean 'temperature'"]),
        ("", {"prompt": "a", "temperature": -1}, 400, "temperature", ["greater", "-1"]),
        ("", {"prompt": "a", "stream": True}, 400, "stream", ["not supported"]),
        ("", {"prompt": "a", "presence_penalty": 0.5}, 400, "presence_penalty", ["0.5"]),
        ("", {"prompt": 3}, 400, "prompt", ["list of token ids"]),
        ("", {}, 400, "prompt", ["required"]),
        ("", {"prompt": ""}, 400, "prompt", ["empty"]),
        ("", {"prompt": []}, 400, "prompt", ["empty"]),
        ("", {"prompt": [1, 999]}, 400, "prompt", ["999", "0 to 260"]),
        ("", {"prompt": "a", "logprobs": 129}, 400, "logprobs", ["128"]),
        ("", {"prompt": "a", "stop": ["x", ""]}, 400, "stop", ["empty"]),
        ("", {"prompt": "ab", "max_tokens": 299}, 400, "max_tokens", ["299", "300", "2 tokens"]),
        ("", {"prompt": "a" * 301}, 400, "prompt", ["301", "300"]),
        ("", {"prompt": "a", "n": 13}, 400, None, ["13", "12"]),
        ("", {"prompt": "abc", "prompt_logprob_token_ids": [[1]] * 3}, 400,
         "prompt_logprob_token_ids", ["3 rows; expected 2", "predicts token 1 + j"]),
        ("", {"prompt": "abc", "prompt_logprob_token_ids": [[1], [1, 2]]}, 400,
         "prompt_logprob_token_ids", ["one length"]),
        ("", {"prompt": "abc", "prompt_logprob_token_ids": [[-2], [1]]}, 400,
         "prompt_logprob_token_ids", ["-2"]),
        ("", {"prompt": ["abc"] * 2, "prompt_logprob_token_ids": [[1]] * 2}, 400,
         "prompt_logprob_token_ids", ["one prompt"]),
        ("", {"prompt": "abc", "prompt_logprob_start": 1}, 400, "prompt_logprob_start", ["needs"]),
        (CHAT, {"messages": []}, 400, "messages", ["at least one"]),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400,
         "messages", ["type text"]),
        (CHAT, {"messages": [USER], "top_logprobs": 2}, 400, "top_logprobs", ["logprobs=true"]),
        (CHAT, {"messages": [USER], "continue_final_message": True}, 400,
         "continue_final_message", ["'user'"]),
        (CHAT, {"messages": [USER], "chat_template_kwargs": {"enable_thinking": True}}, 400, None,
         ["does not use 'enable_thinking'"]),
        (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, 400, None, ["role tool"]),
        ("/tokenize", {}, 400, "prompt", ["either"]),
    ],
)  # fmt: skip
def test_mistakes_name_the_field_and_what_was_expected(client, path, body, status, param, words):
    found, error = refused(client, path or "/v1/completions", **body)
    assert found == status and error["param"] == param
    assert sorted(error) == ["code", "message", "param", "type"]
    for word in words:
        assert word in error["message"]


def test_broken_json_and_unknown_paths_are_answered_as_json(client):
    answer = client.post("/v1/completions", content=b'{"prompt": ')
    assert answer.status_code == 400 and "not valid JSON" in answer.json()["error"]["message"]
    assert client.post("/v1/completions", content=b"[]").json()["error"]["message"]
    assert client.get("/v1/nothing").json()["error"]["message"].startswith("GET /v1/nothing")
    assert client.get("/v1/completions").status_code == 405


def test_a_full_queue_is_429_with_a_time_to_wait(served):
    client, service = served
    done = []
    long = {"prompt": "a", "max_tokens": 200, "n": 12, "ignore_eos": True}
    thread = threading.Thread(target=lambda: done.append(ask(client, **long)))
    thread.start()
    while service.worker.size < 12:
        time.sleep(0.01)
    answer = client.post("/v1/completions", json={"prompt": "a"})
    thread.join()
    assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
    assert len(done[0]["choices"]) == 12 and service.worker.size == 0


def test_the_work_of_a_client_that_has_gone_is_dropped(served, monkeypatch):
    client, service = served
    advance = Engine._advance

    def slow(*arguments):
        time.sleep(0.1)
        return advance(*arguments)

    monkeypatch.setattr(Engine, "_advance", slow)
    monkeypatch.setattr("fireopd_jax.serving.service.POLL_S", 0.02)
    drawn = service.worker.engine.statistics.drawn
    body = {"prompt": ["a"] * 12, "max_tokens": 290, "ignore_eos": True, "seed": 1}
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/completions", json=body, timeout=0.3)
    while service.worker.size:
        time.sleep(0.02)
    monkeypatch.undo()
    again = ask(client, prompt="a", max_tokens=290, ignore_eos=True, seed=1, n=2)["choices"]
    assert service.worker.engine.statistics.drawn - drawn < 12 * 290
    assert len(again) == 2


def test_a_failure_of_the_device_is_500_and_the_server_goes_on(served, monkeypatch, capfd):
    client, _ = served
    advance = Engine._advance

    def fails(*arguments):
        monkeypatch.setattr(Engine, "_advance", advance)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Engine, "_advance", fails)
    status, error = refused(client, prompt="a")
    assert status == 500 and "out of memory" in error["message"]
    assert error["type"] == "server_error" and "out of memory" in capfd.readouterr().err
    assert ask(client, prompt="a", max_tokens=2)["choices"]


def test_the_client_of_openai_works(served):
    client, _ = served
    api = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
    assert [each.id for each in api.models.list()] == ["tiny"]
    done = api.completions.create(
        model="tiny", prompt="a", max_tokens=4, logprobs=1, extra_body={"prompt_logprobs": 0}
    )
    assert done.usage.total_tokens == 1 + len(done.choices[0].logprobs.tokens)
    assert done.choices[0].model_extra["prompt_logprobs"] == [None]
    chat = api.chat.completions.create(
        model="tiny", messages=[USER], n=3, max_tokens=4, logprobs=True, top_logprobs=2
    )
    assert len(chat.choices) == 3 and chat.choices[0].message.content is not None
    with pytest.raises(openai.NotFoundError, match="'tiny'"):
        api.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="stream"):
        api.completions.create(model="tiny", prompt="a", stream=True)
    api.close()


def test_a_key_is_asked_for_when_there_is_one(folder):
    with server(folder, key="secret word") as (client, _):
        assert client.get("/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer other"}):
            answer = client.get("/v1/models", headers=headers)
            assert answer.status_code == 401 and "secret word" not in answer.text
        right = client.get("/v1/models", headers={"Authorization": "Bearer secret word"})
        assert right.json()["data"][0]["max_model_len"] == CONTEXT


def test_an_address_in_use_and_a_long_context_are_one_line(served):
    client, service = served
    with (
        pytest.raises(UserError, match=rf"127\.0\.0\.1:{client.base_url.port}: cannot be listened"),
        bound("127.0.0.1", client.base_url.port),
    ):
        pass
    with pytest.raises(UserError, match="--max-tokens 513: the model has 512 positions"):
        context_of(service.spec, 513)
    assert context_of(service.spec, None) == MODEL.config.max_position_embeddings


def test_without_the_packages_the_command_names_the_extra(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fireopd_jax.serving.server", None)
    monkeypatch.setattr(sys, "argv", ["fireopd", "serve", str(folder)])
    with pytest.raises(SystemExit):
        cli.main()
    assert 'pip install "fireopd-jax[served]"' in capsys.readouterr().err


def test_the_command_serves_until_a_signal(folder):
    code = "from fireopd_jax.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", str(folder), "--port", "0", "--max-tokens", "64",
         "--name", "small", "--slots", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=one_device(),
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("small is served at http://127.0.0.1:"), process.stderr.read()
        url = line.split()[4]
        api = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        done = api.completions.create(model="small", prompt="a", max_tokens=3)
        assert done.usage.prompt_tokens == 1
        api.close()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and out == ""
    assert err == f"fireopd: {folder} is loaded, now it is compiled\n"
