import numpy as np
import pytest
from tokenizers import AddedToken

from fireopd_jax.config import UserError
from fireopd_jax.remote.canary import check_scores, check_texts, check_tokens
from fireopd_jax.remote.logprobs import ScoreFeatures, ScoreRow
from fireopd_jax.remote.texts import Prefix, TextFeatures
from fireopd_jax.text.chat import prompt_ids
from fireopd_jax.text.tokenizer import byte_tokenizer
from tests.remote.fake import EVERYTHING, Said, client_of, serving

TOKENIZER = byte_tokenizer()
ROW = ScoreRow(
    prompt_ids(TOKENIZER, [[{"role": "user", "content": "2+2?"}]], {})[0],
    TOKENIZER("é is 4")["input_ids"],
)
FEATURES = ScoreFeatures("prompt_logprobs", False, 20, 0)


def test_a_server_that_agrees_with_itself_passes_and_its_cache_is_not_asked(tmp_path):
    with serving() as server, client_of(server, tmp_path / "answers") as client:
        for _ in range(2):
            check_scores(client, FEATURES, [ROW])
        assert len(server.seen) == 4


def test_a_server_that_disagrees_with_itself_is_refused_with_the_numbers():
    with serving() as server, client_of(server) as client:
        first = server.logprobs.copy()

        def script(number, path, body):
            server.logprobs = first - 0.3 * (number % 2) * (np.arange(len(first)) == 52)[None]

        server.script = script
        with pytest.raises(UserError, match=r"token 6 .* difference of 0\.3 .*tolerance=0\.1"):
            check_scores(client, FEATURES, [ROW])
    with serving() as server, client_of(server, tolerance=0.5) as client:
        server.script = script
        check_scores(client, FEATURES, [ROW])


@pytest.mark.parametrize(
    "broken, text",
    [
        (lambda logprobs: logprobs + 20, "above 0"),
        (lambda logprobs: np.full_like(logprobs, -0.1), "together: expected at most 1"),
        (lambda logprobs: np.full_like(logprobs, -np.inf), "not finite"),
    ],
)
def test_numbers_that_are_no_log_probabilities_are_refused(broken, text):
    with serving() as server, client_of(server) as client:
        server.logprobs = broken(server.logprobs)
        with pytest.raises(UserError, match=text):
            check_scores(client, FEATURES, [ROW])


def other_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("+2", special=False)])
    return tokenizer


@pytest.mark.parametrize("lacks", [set(), {"tokenize"}, {"tokenize", "prompt_logprobs"}])
def test_the_same_tokenizer_passes_by_what_the_server_has(lacks):
    said = Said()
    with serving(EVERYTHING - lacks) as server, client_of(server, said=said) as client:
        assert check_tokens(client, TOKENIZER, ROW) == (len(lacks) < 2)
    assert ("could not be checked" in " ".join(said)) == (len(lacks) == 2)


def test_another_tokenizer_is_refused_at_the_first_id_that_differs():
    with serving() as server, client_of(server) as client:
        server.tokenizer = other_tokenizer()
        at = ROW.prompt.index(ord("+"))
        with pytest.raises(UserError, match=rf"token {at} .* is 43 \('\+'\) here and 261 \('"):
            check_tokens(client, TOKENIZER, ROW)


def test_other_texts_of_our_ids_are_refused():
    with serving(EVERYTHING - {"tokenize"}) as server, client_of(server) as client:
        decode = server.tokenizer.decode
        server.tokenizer.decode = lambda ids: "five" if ids == [ord("4")] else decode(ids)
        with pytest.raises(UserError, match=r"id 52, is '4' here and 'five' there"):
            check_tokens(client, TOKENIZER, ROW)


def test_a_teacher_of_texts_must_answer_and_draw_at_random(tmp_path):
    features = TextFeatures("prefill", 1, True, "max_tokens")
    example = Prefix([{"role": "user", "content": "Count."}], "one two")
    for text_of, warning in [
        (None, None),
        (lambda body, i: " three", "greedily"),
        (lambda body, i: "", "both continuations of the check are empty"),
    ]:
        said = Said()
        with serving() as server, client_of(server, tmp_path / "answers", said) as client:
            server.text_of = text_of or server.text_of
            check_texts(client, features, example)
            assert len(server.seen) == 2, "not from the cache"
        assert "'one two' is continued by" in said[0]
        assert (warning in said[-1]) if warning else len(said) == 1
    with serving(script=lambda *_: (500, {}, {})) as server, client_of(server) as client:
        refused = pytest.raises(UserError, match="status 500")
        with refused:
            check_texts(client, features, example)
