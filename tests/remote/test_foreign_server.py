"""Against `transformers serve`: a server that is not ours, with a small random model."""

import threading

import pytest

from fireopd_jax.config import UserError
from fireopd_jax.remote.canary import check_texts
from fireopd_jax.remote.logprobs import ScoreRow, score_features
from fireopd_jax.remote.texts import Prefix, TextFeatures, continuations, text_features
from tests.remote.fake import Said
from tests.remote.processes import transformers_serve

pytestmark = [pytest.mark.slow, pytest.mark.parity]
ASKED = [{"role": "user", "content": "2+2?"}]
HEAD = "<|user|>2+2?<|end|><|assistant|>"


def prefix(partial):
    return Prefix(ASKED, partial, [1, 2, 3], HEAD + partial)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    with transformers_serve(tmp_path_factory.mktemp("foreign")) as server:
        yield server


def test_what_the_server_supports_is_found_and_it_answers(foreign):
    said = Said()
    with foreign.client(None, said) as client:
        found = text_features(client, prefix("It is"))
        assert found == TextFeatures("bare_text", 1, True, "max_tokens")
        check_texts(client, found, prefix("It is"))
        assert "is continued by" in said[1] and len(said) == 2
        worded = text_features(client, Prefix(ASKED, "It is"))
        assert worded == TextFeatures("instruction", 1, True, "max_tokens")
        check_texts(client, worded, Prefix(ASKED, "It is"))
        assert client.stats()["requests_unanswered"] == 0


def test_it_has_no_log_probabilities_and_that_is_said(foreign):
    refused = pytest.raises(UserError, match="no log-probabilities of a prompt's tokens")
    with foreign.client(None, Said()) as client, refused:
        score_features(client, ScoreRow([1, 2], [3, 4]))


@pytest.mark.kill
def test_killed_midway_and_restarted_every_text_comes_and_none_is_asked_for_again(
    foreign, tmp_path
):
    given = [prefix("It is " + "x" * i) for i in range(10)]
    features = TextFeatures("bare_text", 1, True, "max_tokens")
    arrived, sent, lock = [], [], threading.Lock()
    with foreign.client(tmp_path / "answers", Said(), concurrency=4) as client:
        plain = client._transport.send

        def send(path, body):
            with lock:
                sent.append(body["seed"])
                if len(sent) == 12:
                    foreign.kill()
                    foreign.start()
            answer = plain(path, body)
            with lock:
                arrived.append(body["seed"])
            return answer

        client._transport.send = send
        texts = continuations(client, features, given, 3, max_tokens=8, seed=5)
        stats = client.stats()
    assert [len(each) for each in texts] == [3] * 10
    assert len({text for each in texts for text in each}) > 20, "samples differ"
    assert len(arrived) == len(set(arrived)) == 30, "each answer arrived once"
    assert len(sent) - 30 == stats["requests_unanswered"] == stats["requests_retried"] > 0
    foreign.kill()
    with foreign.client(tmp_path / "answers", Said()) as client:
        assert continuations(client, features, given, 3, max_tokens=8, seed=5) == texts
        assert client.stats()["requests_sent"] == 0
    foreign.start()
    foreign.wait()
