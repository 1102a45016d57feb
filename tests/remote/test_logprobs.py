import numpy as np
import pytest

from fireopd_jax.config import UserError
from fireopd_jax.remote.errors import Refused
from fireopd_jax.remote.logprobs import ScoreFeatures, ScoreRow, score, score_features
from tests.remote.fake import EVERYTHING, VOCABULARY, Said, bigram, client_of, npy, serving

TABLE = bigram()


def row(seed, prompt=4, response=6, k=5):
    rng = np.random.default_rng(seed)
    ids = rng.permuted(np.tile(np.arange(VOCABULARY), (response, 1)), axis=1)[:, :k]
    ids = ids.astype(np.int32)
    ids[0, 1:] = -1
    whole = rng.integers(0, VOCABULARY, prompt + response).tolist()
    return ScoreRow(whole[:prompt], whole[prompt:], ids if k else None)


EXAMPLE = row(99, k=0)
EXACT = ScoreFeatures("prompt_logprobs", True, 20, 0)


def reference(row):
    """Return the log-probabilities of the tokens, and [T, V] of all, one by one."""
    whole = [*row.prompt, *row.response]
    places = [TABLE[whole[i - 1]] for i in range(len(row.prompt), len(whole))]
    own = [place[token] for place, token in zip(places, row.response, strict=True)]
    return np.array(own), np.array(places)


def found(server, said=None, **settings):
    with client_of(server, said=said, **settings) as client:
        return score_features(client, EXAMPLE)


@pytest.mark.parametrize(
    "lacks, expected",
    [
        ("", ScoreFeatures("prompt_logprobs", True, 20, 0)),
        ("zero", ScoreFeatures("prompt_logprobs", True, 20, 1)),
        ("given_ids", ScoreFeatures("prompt_logprobs", False, 20, 0)),
        ("prompt_logprobs given_ids zero", ScoreFeatures("echo", False, 20, 1)),
        ("prompt_logprobs echo", ScoreFeatures("given_ids", True, 0, 0)),
    ],
)
@pytest.mark.parametrize("lenient", [False, True])
def test_the_best_source_that_the_server_has_is_found(lacks, expected, lenient):
    with serving(EVERYTHING - set(lacks.split()), lenient=lenient) as server:
        said = Said()
        assert found(server, said) == expected
        assert ("of given ids" in said[0]) == expected.given_ids


@pytest.mark.parametrize("limit, wanted, expected", [(5, 20, 5), (64, 64, 64), (64, 7, 7)])
def test_the_most_tokens_in_one_place_are_what_the_server_and_the_settings_allow(
    limit, wanted, expected
):
    with serving(top=limit) as server:
        assert found(server, top_logprobs=wanted).top == expected


def test_a_server_that_gives_text_only_is_refused_with_what_to_do():
    for lenient in (False, True):
        supports = EVERYTHING - {"prompt_logprobs", "echo", "given_ids"}
        refused = pytest.raises(UserError, match=r"no log-probabilities .*omniopd")
        with serving(supports, lenient=lenient) as server, refused:
            found(server)


def test_an_unknown_model_is_not_taken_for_a_missing_source():
    unknown = {"error": {"message": "the model `m` does not exist"}}
    with (
        serving(script=lambda *_: (404, {}, unknown)) as server,
        pytest.raises(Refused, match=r"404: the model `m` does not exist; check url .*model \('m'"),
    ):
        found(server)


def test_a_wrong_key_and_a_broken_server_are_not_taken_for_a_missing_source():
    with serving(key="k") as server, pytest.raises(Refused, match="OPENAI_API_KEY"):
        found(server)
    with serving(script=lambda *_: "close") as server, pytest.raises(UserError, match="attempts"):
        found(server)


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("top", [0, 3])
def test_given_ids_are_scored_exactly_whatever_their_rank(top, as_file):
    rows = [row(seed, response=3 + seed) for seed in range(4)]
    with serving() as server, client_of(server) as client:
        if as_file:
            given = server.given
            server.given = lambda *args: npy(given(*args))
        out = score(client, EXACT, rows, top=top)
        stats = client.stats()
    for asked, scores in zip(rows, out, strict=True):
        own, places = reference(asked)
        np.testing.assert_allclose(scores.logprob, own, rtol=1e-6)
        expected = np.take_along_axis(places, np.maximum(asked.ids, 0), axis=1)
        real = asked.ids >= 0
        np.testing.assert_allclose(scores.at_ids[real], expected[real], rtol=1e-6)
        assert (scores.at_ids[~real] == -np.inf).all()
        assert not scores.missing.any()
        check_top(scores, places, top)
    assert (stats["scored_ids"], stats["missing_ids"]) == (sum((r.ids >= 0).sum() for r in rows), 0)


def check_top(scores, places, top):
    best = np.argsort(-places, axis=1)[:, :top]
    np.testing.assert_array_equal(scores.top_ids, best)
    values = np.take_along_axis(places, best, axis=1)
    np.testing.assert_allclose(scores.top_logprob, values, rtol=1e-6)


@pytest.mark.parametrize("form", ["prompt_logprobs", "echo"])
def test_of_the_most_probable_ids_only_the_rest_is_missing_and_never_zero(form):
    asked = row(1)
    own, places = reference(asked)
    best = np.argsort(-places, axis=1)[:, :5]
    ids = asked.ids.copy()
    ids[1, 0], ids[2, 1], ids[3, 2] = best[1, 4], best[2, 0], asked.response[3]
    asked = ScoreRow(asked.prompt, asked.response, ids)
    with serving() as server, client_of(server) as client:
        (scores,) = score(client, ScoreFeatures(form, False, 5, 0), [asked], top=2)
        stats = client.stats()
    np.testing.assert_allclose(scores.logprob, own, rtol=1e-6)
    listed = (ids[:, :, None] == best[:, None]).any(axis=2)
    listed |= ids == np.array(asked.response)[:, None]
    assert listed[1, 0] and listed[2, 1] and listed[3, 2]
    np.testing.assert_array_equal(scores.missing, (ids >= 0) & ~listed)
    expected = np.take_along_axis(places, np.maximum(ids, 0), axis=1)
    np.testing.assert_allclose(scores.at_ids[listed], expected[listed], rtol=1e-6)
    assert (scores.at_ids[~listed] == -np.inf).all()
    assert stats["missing_ids"] == scores.missing.sum() > 0
    check_top(scores, places, 2)


def test_the_old_api_without_ids_in_its_names_gives_the_tokens_themselves_only():
    asked = row(2)
    with serving() as server, client_of(server) as client:
        answer = server.echoed

        def named(places, prompt, k):
            listed = answer(places, prompt, k)
            listed["top_logprobs"] = [{"word": -1.0}] * len(prompt)
            return listed

        server.echoed = named
        (scores,) = score(client, ScoreFeatures("echo", False, 5, 0), [asked])
    np.testing.assert_allclose(scores.logprob, reference(asked)[0], rtol=1e-6)
    np.testing.assert_array_equal(scores.missing, asked.ids >= 0)


def test_rows_without_ids_or_tokens_and_fewer_than_asked_for():
    rows = [row(1, k=0), ScoreRow([1, 2], []), ScoreRow([1], [], np.zeros((0, 4), np.int32))]
    with serving() as server, client_of(server) as client:
        one, none, empty = score(client, EXACT, rows, top=2)
        assert len(server.seen) == 1
        assert one.at_ids is None and one.missing is None
        assert none.logprob.shape == (0,) and none.top_ids.shape == (0, 2)
        assert empty.at_ids.shape == (0, 4)
        with pytest.raises(UserError, match=r"20 most probable.*needs 21"):
            score(client, EXACT, rows, top=21)
        listed = server.listed
        server.listed = lambda places, prompt, k: listed(places, prompt, 1)
        (short,) = score(client, EXACT, [row(3, k=0)], top=4)
        assert (short.top_ids[:, 3] == -1).all() and (short.top_logprob[:, 3] == -np.inf).all()


def test_scores_are_kept_for_their_own_ids_only(tmp_path):
    one, other = row(1), row(1)
    other = ScoreRow(other.prompt, other.response, other.ids[:, ::-1].copy())
    listing = ScoreFeatures("prompt_logprobs", False, 20, 0)
    with serving() as server, client_of(server, tmp_path / "answers") as client:
        for features in (EXACT, listing):
            before = len(server.seen)
            for _ in range(2):
                first, second = score(client, features, [one, other])
            np.testing.assert_array_equal(first.at_ids[:, ::-1], second.at_ids)
            np.testing.assert_array_equal(first.missing[:, ::-1], second.missing)
            assert len(server.seen) == before + 2


@pytest.mark.parametrize("field, broken", [
    ("prompt_logprobs", [None]),
    ("prompt_logprobs", None),
    ("prompt_logprobs", [None, *[{"7": {}}] * 9]),
    ("prompt_logprobs", [None, *[{"99999999999": {"logprob": -1.0}}] * 9]),
    ("prompt_logprobs", [None, *[{"7": {"logprob": 10**400}}] * 9]),
    ("prompt_token_id_logprobs", [[1.0]]),
    ("prompt_token_id_logprobs", [[10**400] * 6] * 6),
    ("prompt_token_id_logprobs", ""),
    ("prompt_token_id_logprobs", "no file"),
    ("prompt_token_id_logprobs", [[None] * 6] * 6),
])  # fmt: skip
def test_broken_scores_are_asked_for_again(field, broken):
    def script(number, path, body):
        if number == 0:
            answer = server.answer(path, body)
            answer["choices"][0][field] = broken
            return 200, {}, answer

    features = ScoreFeatures("prompt_logprobs", field != "prompt_logprobs", 20, 0)
    asked = row(5)
    with serving(script=script) as server, client_of(server) as client:
        (scores,) = score(client, features, [asked])
        assert client.stats()["requests_malformed"] == 1
    np.testing.assert_allclose(scores.logprob, reference(asked)[0], rtol=1e-6)
