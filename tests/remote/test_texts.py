import dataclasses

import pytest

from fireopd_jax.config import UserError
from fireopd_jax.remote.errors import Refused
from fireopd_jax.remote.texts import (
    ECHO,
    Prefix,
    TextFeatures,
    continuations,
    text_features,
    without_echo,
)
from tests.remote.fake import EVERYTHING, Said, client_of, serving

ASKED = [{"role": "user", "content": "Count."}]
EXAMPLE = Prefix(ASKED, "one two", [1, 2, 3], "<|user|>Count.<|end|><|assistant|>one two")
ONE_EACH = TextFeatures("ids", 1, True, "max_tokens")


def prefixes(*partials):
    return [Prefix(ASKED, text, list(range(len(text) + 3))) for text in partials]


def found(server, example=EXAMPLE, said=None, **settings):
    with client_of(server, said=said, **settings) as client:
        return text_features(client, example)


@pytest.mark.parametrize(
    "lacks, example, expected",
    [
        ("", EXAMPLE, TextFeatures("ids", None, True, "max_tokens")),
        ("n", EXAMPLE, TextFeatures("ids", 1, True, "max_tokens")),
        ("seed", EXAMPLE, TextFeatures("ids", None, False, "max_tokens")),
        ("ids", EXAMPLE, TextFeatures("prefill", None, True, "max_tokens")),
        ("ids prefill", EXAMPLE, TextFeatures("text", None, True, "max_tokens")),
        ("ids prefill bare", EXAMPLE, TextFeatures("bare_text", None, True, "max_tokens")),
        ("ids prefill text", EXAMPLE, TextFeatures("instruction", None, True, "max_tokens")),
        ("prefill", Prefix(ASKED, "one"), TextFeatures("instruction", None, True, "max_tokens")),
        ("ids prefill text max_tokens n", EXAMPLE,
         TextFeatures("instruction", 1, True, "max_completion_tokens")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("lenient", [False, True])
def test_the_best_form_that_the_server_supports_is_found(lacks, example, expected, lenient):
    supports = EVERYTHING - set(lacks.split())
    if lenient:
        # What is ignored cannot be told from what is supported, except for `n` and prefill.
        if {"seed", "bare", "max_tokens"} & set(lacks.split()):
            return
        supports = supports | {"seed", "bare"}
    with serving(supports, lenient=lenient) as server:
        assert found(server, example) == expected


def test_what_was_found_is_in_the_log():
    said = Said()
    with serving(EVERYTHING - {"n"}) as server:
        found(server, said=said)
    assert said == [
        f"teacher 'judge' at {server.url}: continuations by ids, 1 sample(s) in a request"
    ]


def test_a_prefill_that_is_ignored_is_not_believed_unless_it_is_asked_for():
    with serving(EVERYTHING - {"prefill", "ids", "text"}, lenient=True) as server:
        said = Said()
        assert found(server, said=said).form == "instruction"
        assert "continuation=prefill" in said[0]
        assert found(server, continuation="prefill").form == "prefill"


def test_a_server_without_the_flag_may_still_continue_a_last_message():
    with serving(EVERYTHING - {"prefill"}) as server:
        assert found(server, continuation="prefill").form == "trailing"
        assert server.seen[-1][1]["messages"][-1] == {"role": "assistant", "content": "one two"}


@pytest.mark.parametrize("setting", ["prefill", "instruction", "completions"])
def test_a_form_that_is_asked_for_is_taken(setting):
    with serving() as server:
        expected = {"completions": "ids"}.get(setting, setting)
        assert found(server, continuation=setting, samples_per_request=3) == TextFeatures(
            expected, 3, True, "max_tokens"
        )


def test_a_form_that_the_server_lacks_is_refused_with_its_words():
    with serving(EVERYTHING - {"ids", "text"}) as server:
        with pytest.raises(Refused, match="prompt must not be text"):
            found(server, continuation="completions")
        with pytest.raises(UserError, match="needs the prompt's token ids or its text"):
            found(server, Prefix(ASKED, "one"), continuation="completions")


def test_a_wrong_key_is_not_taken_for_a_missing_form():
    with serving(key="k") as server:
        with pytest.raises(Refused, match="OPENAI_API_KEY"):
            found(server)
        assert len(server.seen) == 1


@pytest.mark.parametrize("form", ["ids", "prefill", "text", "bare_text", "trailing", "instruction"])
def test_each_form_sends_the_prefix_in_its_way(form):
    features = TextFeatures(form, None, True, "max_tokens")
    with serving() as server, client_of(server, instruction="Go on.") as client:
        (texts,) = continuations(client, features, [EXAMPLE], 2, max_tokens=7, temperature=0.7)
        ((path, body),) = server.seen
    assert len(texts) == 2
    assert (body["n"], body["max_tokens"], body["temperature"]) == (2, 7, 0.7)
    assert "top_p" not in body
    begun = [*ASKED, {"role": "assistant", "content": "one two"}]
    sent = {
        "ids": {"prompt": [1, 2, 3]},
        "text": {"prompt": EXAMPLE.text, "add_special_tokens": False},
        "bare_text": {"prompt": EXAMPLE.text},
        "prefill": {
            "messages": begun, "continue_final_message": True, "add_generation_prompt": False,
        },
        "trailing": {"messages": begun},
        "instruction": {"messages": [*begun, {"role": "user", "content": "Go on."}]},
    }  # fmt: skip
    assert {"prompt", "messages"} & body.keys() == {"prompt", "messages"} & sent[form].keys()
    assert {name: body[name] for name in sent[form]} == sent[form]
    assert path == ("/v1/completions" if "prompt" in body else "/v1/chat/completions")


@pytest.mark.parametrize("form", ["prefill", "trailing", "instruction"])
def test_tools_and_their_calls_are_sent_with_the_messages(form):
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    talk = [*ASKED, {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "tool_call_id": "1", "content": "2"}]  # fmt: skip
    with serving() as server, client_of(server) as client:
        features = TextFeatures(form, None, True, "max_tokens")
        prefix = Prefix(talk, "one", tools=tools)
        continuations(client, features, [prefix], 1, max_tokens=3)
        ((_, body),) = server.seen
    assert body["tools"] == tools
    (call,) = body["messages"][1]["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": '{"x": 1}'}
    assert body["messages"][2] == talk[2]


def test_an_empty_prefix_is_a_conversation_without_an_answer():
    for form in ("prefill", "instruction"):
        features = TextFeatures(form, None, True, "max_tokens")
        with serving() as server, client_of(server) as client:
            continuations(client, features, [Prefix(ASKED, "")], 1, max_tokens=3, top_p=0.9)
            ((_, body),) = server.seen
        assert body["messages"] == ASKED
        assert "continue_final_message" not in body and body["top_p"] == 0.9


@pytest.mark.parametrize("samples, requests", [(None, 1), (1, 5), (2, 3), (7, 1)])
def test_n_continuations_come_in_as_many_requests_as_the_server_needs(samples, requests):
    features = dataclasses.replace(ONE_EACH, samples=samples)
    with serving() as server, client_of(server) as client:
        texts = continuations(client, features, prefixes("a", "bc"), 5, max_tokens=3)
        assert len(server.seen) == 2 * requests
    assert [len(each) for each in texts] == [5, 5]
    assert len({text for each in texts for text in each}) == 10, "no text is given twice"


def test_texts_do_not_depend_on_threads_and_change_with_the_seed(tmp_path):
    with serving() as server:
        runs = []
        for concurrency, seed in ((1, 0), (8, 0), (8, 1)):
            with client_of(server, concurrency=concurrency) as client:
                known = {"max_tokens": 3, "seed": seed}
                runs.append(continuations(client, ONE_EACH, prefixes("a", "b"), 4, **known))
    assert runs[0] == runs[1]
    assert not {text for each in runs[0] for text in each} & {t for each in runs[2] for t in each}


def test_shorter_prefixes_are_sent_first_and_answers_keep_their_places():
    with serving() as server, client_of(server, concurrency=1) as client:
        server.text_of = lambda body, i: str(len(body["prompt"]))
        given = prefixes("abcd", "ab", "abc", "a")
        texts = continuations(client, ONE_EACH, given, 2, max_tokens=3)
        assert texts == [["7"] * 2, ["5"] * 2, ["6"] * 2, ["4"] * 2]
        lengths = [len(body["prompt"]) for _, body in server.seen]
    assert lengths == [4, 4, 5, 5, 6, 6, 7, 7]


def test_missing_samples_are_asked_for_again_and_are_not_paid_twice(tmp_path):
    """A server that returns less than asked for, as if `n` had a limit of its own."""

    def script(number, path, body):
        if body.get("n", 1) > 2:
            return 200, {}, server.answer(path, {**body, "n": 2})

    features = dataclasses.replace(ONE_EACH, samples=None)
    with serving(script=script) as server:
        for _ in range(2):
            with client_of(server, tmp_path / "answers") as client:
                (texts,) = continuations(client, features, prefixes("a"), 6, max_tokens=3)
                assert client.stats()["short_answers"] == 2
            assert len(set(texts)) == 6
        assert len(server.seen) == 3


@pytest.mark.parametrize("choices", [[], [{"index": 0, "text": "only one"}]])
def test_too_few_continuations_are_an_error_and_never_disagreement(choices):
    def script(number, path, body):
        return 200, {}, {"choices": choices}

    features = dataclasses.replace(ONE_EACH, samples=None)
    with serving(script=script) as server, client_of(server) as client:
        number = 4 * len(choices)
        with pytest.raises(UserError, match=f"{number} of 9 continuations.*not disagreement"):
            continuations(client, features, prefixes("a"), 9, max_tokens=3)
        assert client.stats()["short_answers"] == 4


def test_more_continuations_than_asked_for_are_cut():
    with serving(script=lambda n, p, b: None) as server, client_of(server) as client:
        server.script = lambda n, path, body: (200, {}, server.answer(path, {**body, "n": 3}))
        assert len(continuations(client, ONE_EACH, prefixes("a"), 1, max_tokens=3)[0]) == 1


def test_empty_continuations_are_valid_and_counted():
    empty = {"choices": [{"index": 0, "message": {"content": None, "reasoning_content": "hm"}}]}
    features = TextFeatures("instruction", 1, True, "max_tokens")
    with serving(script=lambda *_: (200, {}, empty)) as server, client_of(server) as client:
        assert continuations(client, features, prefixes("a"), 2, max_tokens=3) == [["", ""]]
        assert (client.stats()["empty_texts"], client.stats()["texts"]) == (2, 2)


@pytest.mark.parametrize(
    "answer",
    [{}, [], {"choices": [{}]}, {"choices": [{"text": 3}]}, {"choices": "text"}, {"choices": [1]}],
)
def test_malformed_answers_are_asked_for_again(answer):
    def script(number, path, body):
        return (200, {}, answer) if number == 0 else None

    with serving(script=script) as server, client_of(server) as client:
        assert len(continuations(client, ONE_EACH, prefixes("a"), 1, max_tokens=3)[0]) == 1
        assert client.stats()["requests_malformed"] == 1


def test_choices_are_ordered_by_their_index():
    choices = [{"index": i, "text": str(i)} for i in (2, 0, 1)]
    features = dataclasses.replace(ONE_EACH, samples=None)

    def script(*_):
        return 200, {}, {"choices": choices}

    with serving(script=script) as server, client_of(server) as client:
        texts = continuations(client, features, prefixes("a"), 3, max_tokens=3)
    assert texts == [["0", "1", "2"]]


LONG = "The sum of the first three odd numbers is one plus three plus"


@pytest.mark.parametrize(
    "partial, text, expected",
    [
        ("one two", " three", " three"),
        ("one two", "one two three", " three"),
        ("  one two\n", "one two three", " three"),
        (LONG, LONG[20:] + " five", " five"),
        (LONG, LONG[: ECHO + 3], ""),
        (LONG, LONG[-ECHO + 1 :] + "!", LONG[-ECHO + 1 :] + "!"),
        ("", "text", "text"),
        ("one", "", ""),
    ],
)
def test_an_echo_of_the_prefix_is_cut_off(partial, text, expected):
    assert without_echo(partial, text) == expected


def test_echoes_are_cut_off_in_the_instruction_form_only_and_counted():
    with serving() as server, client_of(server) as client:
        server.text_of = lambda body, i: "one two three"
        texts = {
            form: continuations(
                client, TextFeatures(form, 1, True, "max_tokens"), [EXAMPLE], 1, max_tokens=3
            )[0][0]
            for form in ("instruction", "ids")
        }
        assert texts == {"instruction": " three", "ids": "one two three"}
        assert client.stats()["echoed_texts"] == 1
