import json
import os
import subprocess
import sys
import textwrap
import threading
import time

import httpx
import pytest

from fireopd_jax.config import UserError, validate
from fireopd_jax.remote.client import Client, Request
from fireopd_jax.remote.errors import BudgetSpent, Malformed, Refused, Stopped, Unreachable
from fireopd_jax.remote.settings import ServedConfig
from fireopd_jax.remote.transport import Transport
from tests.remote.fake import SECRET, Said, client_of, serving


def text_of(answer):
    try:
        return answer["choices"][0]["text"]
    except (KeyError, IndexError):
        raise Malformed("no text") from None


def requests(number, bound=(10, 5), start=0):
    return [
        Request("/completions", {"prompt": [i], "max_tokens": 5, "seed": i}, text_of, bound)
        for i in range(start, start + number)
    ]


def numbers(server):
    return [body["prompt"][0] for _, body in server.seen]


def test_answers_come_in_the_order_of_the_requests_whatever_the_order_of_their_arrival():
    def slow(number, path, body):
        time.sleep(0.02 * (7 - body["prompt"][0]) / 7)

    with serving(script=slow) as server, client_of(server, concurrency=8) as client:
        assert client.ask(requests(8)) == [f" text {i} 0" for i in range(8)]
        assert client.ask([]) == []


def test_no_more_than_the_limit_of_requests_are_on_their_way():
    with serving(script=lambda *_: time.sleep(0.02)) as server:
        with client_of(server, concurrency=3) as client:
            client.ask(requests(12))
        assert server.most == 3


def test_rate_limits_server_errors_lost_connections_and_garbage_are_repeated():
    limit = {"error": {"message": "slow down"}}
    trouble = [
        (429, {"Retry-After": "7"}, limit),
        (503, {}, {"detail": "loading"}),
        "close",
        (200, {}, b"{not json"),
        (200, {}, {"choices": []}),
    ]

    def script(number, path, body):
        return trouble[number] if number < len(trouble) else None

    said = Said()
    with serving(script=script) as server, client_of(server, said=said) as client:
        assert client.ask(requests(1)) == [" text 0 0"]
        stats = client.stats()
    assert said.waits[0] == 7.0, "Retry-After"
    assert [0.5 <= wait / 2**i <= 1 for i, wait in enumerate(said.waits)][1:] == [True] * 4
    assert stats["requests_sent"] == 6
    assert stats["requests_retried"] == 5
    assert stats["requests_answered"] == 1
    assert (stats["requests_rate_limited"], stats["requests_unanswered"]) == (1, 1)
    assert (stats["requests_malformed"], stats["requests_failed"]) == (1, 0)
    assert stats["requests_in_flight"] == 0


def test_a_date_of_retry_after_is_understood():
    def script(number, path, body):
        if number == 0:
            return 429, {"Retry-After": "Wed, 21 Oct 2099 07:28:00 GMT"}, {}

    said = Said()
    with serving(script=script) as server, client_of(server, said=said) as client:
        client.ask(requests(1))
    assert said.waits == [600.0], "not for ever"


def test_a_time_out_is_repeated_and_counted_as_unanswered():
    def script(number, path, body):
        if number == 0:
            time.sleep(0.5)

    with serving(script=script) as server, client_of(server, timeout_s=0.15) as client:
        assert client.ask(requests(1)) == [" text 0 0"]
        assert client.stats()["requests_unanswered"] == 1


def test_a_server_that_stays_down_is_one_line_that_says_how_to_go_on(tmp_path):
    with serving() as server, client_of(server, tmp_path / "answers", retries=2) as client:
        server.stop()
        with pytest.raises(Unreachable) as caught:
            client.ask(requests(1))
    line = str(caught.value)
    assert "teacher 'judge'" in line and server.url in line and "3 attempts" in line
    assert str(tmp_path / "answers") in line and "\n" not in line


@pytest.mark.parametrize(
    "status, advice",
    [
        (400, "extra_body"),
        (401, "OPENAI_API_KEY"),
        (403, "OPENAI_API_KEY"),
        (404, "'m'"),
    ],
)
def test_a_refusal_is_not_repeated_and_says_what_to_check(status, advice):
    content = {"error": {"message": "no\nway"}}
    with serving(script=lambda *_: (status, {}, content)) as server, client_of(server) as client:
        with pytest.raises(Refused) as caught:
            client.ask(requests(1))
        assert len(server.seen) == 1
    line = str(caught.value)
    assert f"status {status}: no way" in line and advice in line and "'judge'" in line


def test_a_spent_quota_is_not_waited_for():
    content = {"error": {"message": "pay", "code": "insufficient_quota"}}
    with serving(script=lambda *_: (429, {}, content)) as server, client_of(server) as client:
        with pytest.raises(Refused, match="pay"):
            client.ask(requests(1))
        assert len(server.seen) == 1


def test_equal_requests_are_sent_once_and_further_samples_are_told_apart():
    with serving() as server, client_of(server) as client:
        one = requests(1)[0]
        other = Request(one.path, one.body, one.read, one.bound, index="second")
        client.ask([one, one, other])
        assert len(server.seen) == 2


def test_a_repeated_run_asks_nothing_again_and_counts_what_was_paid(tmp_path):
    with serving() as server:
        with client_of(server, tmp_path / "a" / "answers") as client:
            first = client.ask(requests(5))
            assert client.stats()["tokens_out"] == 25
        with client_of(server, tmp_path / "a" / "answers", price_per_million_output=1e6) as client:
            assert client.ask(requests(5)) == first
            stats = client.stats()
        assert len(server.seen) == 5
    assert (stats["requests_from_cache"], stats["requests_sent"]) == (5, 0)
    assert (stats["tokens_out"], stats["total_tokens"]) == (0, 30)
    assert (stats["cost"], stats["total_cost"]) == (0, 25)


@pytest.mark.parametrize(
    "change",
    [{"model": "other"}, {"extra_body": {"top_k": 3}}, {"cache": "none"}],
)
def test_another_model_or_other_fields_are_other_requests(tmp_path, change):
    with serving(lenient=True) as server:
        for settings in ({}, change):
            whole = {"url": server.url, "model": "m", **settings}
            with Client(ServedConfig(**whole), tmp_path / "answers", Said()) as client:
                client.ask(requests(1))
        assert len(server.seen) == 2
        assert all("model" in body for _, body in server.seen)


def test_scores_are_not_kept_where_only_texts_are(tmp_path):
    with serving() as server, client_of(server, tmp_path / "answers", cache="texts") as client:
        (one,) = requests(1)
        scores = Request(one.path, one.body, one.read, one.bound, "s", "scores")
        for _ in range(2):
            client.ask([one, scores])
        assert len(server.seen) == 3


def test_the_budget_stops_before_the_request_that_could_exceed_it(tmp_path):
    # 6 tokens each, 15 at most: after five, 30 + 15 is over the budget.
    with serving() as server:
        for turn in range(2):
            settings = {"max_tokens_budget": 44, "concurrency": 4}
            with client_of(server, tmp_path / "answers", **settings) as client:
                with pytest.raises(BudgetSpent, match=r"30 of 44 tokens.*max_tokens_budget"):
                    client.ask(requests(9))
                assert client.stats()["total_tokens"] == 30
                answered = [requests(9)[i] for i in numbers(server)]
                assert len(client.ask(answered)) == 5, "answers of before are there"
            assert len(set(numbers(server))) == len(server.seen) == 5, f"no more in turn {turn}"
        with client_of(server, tmp_path / "answers", max_tokens_budget=70) as client:
            assert len(client.ask(requests(9))) == 9
        assert sorted(numbers(server)) == list(range(9))


def test_a_budget_in_money_counts_by_the_prices():
    prices = {"price_per_million_input": 1e6, "price_per_million_output": 2e6}
    # 1 + 2 * 5 = 11 each, at most 20.
    with serving() as server, client_of(server, max_cost=45.0, concurrency=1, **prices) as client:
        with pytest.raises(BudgetSpent, match=r"33 of 45.*may cost 20 \(max_cost\)"):
            client.ask(requests(9))
        assert numbers(server) == [0, 1, 2]


def test_an_answer_without_usage_counts_as_the_most_that_it_could_cost():
    with serving() as server, client_of(server) as client:
        server.whole = lambda choices, *_: {"choices": choices}
        client.ask(requests(1))
        assert (client.stats()["tokens_in"], client.stats()["tokens_out"]) == (10, 5)


def test_killed_midway_and_restarted_no_answered_request_is_sent_again(tmp_path):
    """Server and client: first the server dies and comes back, then the client starts anew."""
    gate = threading.Event()

    def script(number, path, body):
        if number == 10:
            threading.Thread(target=restart).start()
        if 10 <= number < 14:
            return "close"

    def restart():
        server.stop()
        time.sleep(0.1)
        server.start()
        gate.set()

    with serving(script=script) as server:
        settings = {"concurrency": 4, "retries": 60}
        with client_of(server, tmp_path / "answers", **settings) as client:
            texts = client.ask(requests(40))
            stats = client.stats()
        assert gate.wait(5)
        assert texts == [f" text {i} 0" for i in range(40)]
        answered = [body["prompt"][0] for _, body in server.answered]
        assert sorted(answered) == list(range(40)), "each answered once"
        assert stats["requests_unanswered"] >= 4
        assert stats["requests_sent"] == 40 + stats["requests_unanswered"]
        before = len(server.seen)
        with client_of(server, tmp_path / "answers", **settings) as client:
            assert client.ask(requests(40)) == texts
        assert len(server.seen) == before


@pytest.mark.kill
def test_a_killed_client_keeps_every_answer_that_arrived(tmp_path):
    program = """
        import sys
        from pathlib import Path
        from tests.remote.test_client import client_of, requests
        class Server: url = sys.argv[1]
        with client_of(Server, Path(sys.argv[2]), concurrency=2) as client:
            client.ask(requests(1000))
    """
    with serving(script=lambda *_: time.sleep(0.01)) as server:
        command = [sys.executable, "-c", textwrap.dedent(program), server.url]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen([*command, str(tmp_path / "answers")], env=environment)
        while len(server.answered) < 30:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
        time.sleep(0.05)
        server.script = lambda *_: None
        answered = len(server.answered)
        with client_of(server, tmp_path / "answers") as client:
            client.ask(requests(60))
            kept = client.stats()["requests_from_cache"]
        # Two at a time: those on their way were answered to nobody.
        assert answered - 2 <= kept <= answered


def test_what_failed_first_is_raised_and_ends_the_waits_of_the_others():
    def script(number, path, body):
        if body["prompt"] == [0]:
            return 503, {"Retry-After": "300"}, {}
        if body["prompt"] == [1]:
            time.sleep(0.1)
            return 400, {}, {"error": {"message": "never"}}

    with serving(script=script) as server:
        settings = ServedConfig(url=server.url, model="m", concurrency=2)
        started = time.monotonic()
        with Client(settings, None, Said()) as client, pytest.raises(Refused, match="never"):
            client.ask(requests(5))
        assert time.monotonic() - started < 10


def test_closing_the_client_ends_its_waits():
    with serving(script=lambda *_: (503, {"Retry-After": "300"}, {})) as server:
        client = Client(ServedConfig(url=server.url, model="m", concurrency=2), None, Said())
        closing = threading.Timer(0.3, client.close)
        closing.start()
        started = time.monotonic()
        with pytest.raises(Stopped, match="before all requests were answered"):
            client.ask(requests(5))
        closing.join()
        assert time.monotonic() - started < 10


def test_no_secret_is_in_what_is_written_raised_or_logged(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    caplog.set_level("DEBUG")
    said, lines = Said(), []
    with serving(key="another") as server:
        settings = {"api_key_env": "JUDGE_KEY", "retries": 0}
        with client_of(server, tmp_path / "answers", said, **settings) as client:
            for ask in (client.ask, lambda asked: client.probe(asked[0])):
                with pytest.raises(Refused, match=r"JUDGE_KEY") as caught:
                    ask(requests(1))
                assert "***" in str(caught.value), "the server repeats the key"
                lines += [str(caught.value), repr(caught.value), repr(caught.value.__cause__)]
            server.key = SECRET
            # A server that repeats the key in its answers, and one that dies.
            server.text_of = lambda *_: f"your key is {SECRET}"
            assert client.ask(requests(2)) == ["your key is ***"] * 2
            server.script = lambda *_: (500, {}, {"error": {"message": f"key {SECRET} broke me"}})
            with pytest.raises(Unreachable) as caught:
                client.ask(requests(1, start=9))
            lines += [str(caught.value), json.dumps(client.stats()), repr(client.settings)]
            lines.append(json.dumps([body for _, body in server.seen]))
    written = [file.read_bytes().decode() for file in tmp_path.rglob("*") if file.is_file()]
    assert written and all(SECRET not in text for text in [*written, *lines, *said, caplog.text])


def test_a_missing_key_is_named_except_for_a_server_on_this_machine(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
        Client(ServedConfig(url="https://api.example.com/v1", model="m"), None, Said())
    with serving() as server, client_of(server) as client:
        assert client.ask(requests(1))


@pytest.mark.parametrize("key", ["sk-first-line\nsk-second-line", "sk-with space", "sk-“quoted”"])
def test_a_key_that_no_header_can_hold_is_named_by_its_variable_alone(key, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", key)
    settings = ServedConfig(url="http://127.0.0.1:9/v1", model="m", api_key_env="JUDGE_KEY")
    with pytest.raises(UserError, match="JUDGE_KEY is no API key") as caught:
        Client(settings, None, print)
    assert not any(part in str(caught.value) for part in ("first", "second", "with ", "quoted"))


def test_a_key_that_is_a_word_changes_no_answer(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "none")
    with serving() as server, client_of(server, api_key_env="JUDGE_KEY") as client:
        server.text_of = lambda *_: "there is none"
        assert client.ask(requests(1)) == ["there is none"]


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    settings = ServedConfig(url="http://127.0.0.1:9/v1", model="m")
    with pytest.raises(UserError, match=r"served\.cache_file: .* cannot be written"):
        Client(settings, tmp_path, print)


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with serving() as server, client_of(server, retries=0) as client:
        assert client.ask(requests(1))


def test_a_missing_library_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"pip install \"fireopd-jax\[served\]\""):
        Client(ServedConfig(url="http://localhost:1/v1", model="m"), None, Said())


@pytest.mark.parametrize(
    "change, text",
    [
        ({"url": f"http://me:{SECRET}@host/v1"}, "url has credentials"),
        ({"url": f"http://host/v1?key={SECRET}"}, "url has credentials or a query"),
        ({"url": "localhost:8000"}, "expected http://HOST:PORT/v1"),
        ({"max_cost": 3.0}, "needs price_per_million_input"),
        ({"extra_body": {"n": 3}}, "extra_body: 'n' is set by fireopd"),
        ({"api_key_env": SECRET}, "expected the name of an environment variable"),
    ],
)
def test_wrong_settings_are_one_line_without_the_secret(change, text):
    with pytest.raises(UserError, match=text) as caught:
        validate(ServedConfig, {"url": "http://host/v1", "model": "m", **change}, {})
    assert SECRET not in str(caught.value)


def test_this_machine_is_known_by_name_and_address():
    def local(url):
        return ServedConfig(url=url, model="m").is_local

    assert all(map(local, ["http://localhost:1/v1", "http://127.0.0.2/v1", "http://[::1]:8/v1"]))
    assert not any(map(local, ["http://10.0.0.1/v1", "https://localhost.example.com/v1"]))
    assert ServedConfig(url="http://h:1/v1/", model="m").root == "http://h:1"


@pytest.mark.parametrize(
    ("wait", "error"), [(0.0, httpx.ReadError), (0.02, httpx.ReadTimeout)], ids=["size", "time"]
)
def test_an_answer_without_end_is_ended(monkeypatch, wait, error):
    monkeypatch.setattr("fireopd_jax.remote.transport.LARGEST_ANSWER", 2**20)
    settings = ServedConfig(url="http://localhost:1/v1", model="m", timeout_s=0.1)

    def endless():
        while True:
            yield b"1," if wait else b"1," * 2**16
            time.sleep(wait)

    with pytest.raises(error):
        Transport(settings, "judge")._read(httpx.Response(200, content=endless()))


@pytest.mark.parametrize("answer", [b"[" * 100_000, b"\xff", b"{}", b""])
def test_an_answer_that_is_none_is_asked_for_again(answer):
    def script(number, path, body):
        return (200, {}, answer) if number == 0 else None

    with serving(script=script) as server, client_of(server) as client:
        assert client.ask(requests(1)) == [" text 0 0"]
        assert client.stats()["requests_retried"] == 1


def test_a_usage_that_is_none_costs_what_it_can_at_most():
    usage = {"prompt_tokens": float("inf"), "completion_tokens": -5}

    def script(number, path, body):
        return 200, {}, {"choices": [{"text": "x"}], "usage": usage}

    with serving(script=script) as server, client_of(server) as client:
        client.ask(requests(1))
        stats = client.stats()
    assert stats["tokens_in"] == 10 and stats["tokens_out"] == 0
