"""Similarities of texts: identity, symmetry, and values worked out by hand."""

import numpy as np
import pytest

from fireopd_jax.evaluation.similarity import (
    Edit,
    Embedding,
    Grader,
    Rouge1,
    Similarity,
    mean_embeddings,
)

TEXTS = ["the sum is 120", "The sum is 720.", "x", "é ∑ 日本語", "so #### 12", "a b a", "  7 "]
WORDS = {"a": 0, "b": 1, "c": 2}
MATRIX = np.array([[1, 0], [0, 1], [-1, 0]], np.float32)
ALL = [Edit(), Rouge1(), Embedding(), Grader()]


def tokenizer(texts, add_special_tokens):
    assert not add_special_tokens
    return {"input_ids": [[WORDS[w] for w in text.split() if w in WORDS] for text in texts]}


def random_vectors(texts):
    """One vector per text, a function of the text."""
    return np.stack([np.random.default_rng(list(text.encode())).normal(size=5) for text in texts])


def distance(a, b):
    """Levenshtein's distance by its recurrence."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        new = [i]
        for j, y in enumerate(b, 1):
            new.append(min(row[j] + 1, new[j - 1] + 1, row[j - 1] + (x != y)))
        row = new
    return row[-1]


@pytest.mark.parametrize("similarity", ALL, ids=lambda s: s.kind)
def test_a_text_is_like_itself_and_order_does_not_matter(similarity):
    assert isinstance(similarity, Similarity)
    same = similarity(TEXTS, TEXTS, random_vectors)
    np.testing.assert_allclose(same, 1.0)
    a, b = zip(*[(a, b) for a in TEXTS for b in TEXTS], strict=True)
    one, two = similarity(a, b, random_vectors), similarity(b, a, random_vectors)
    np.testing.assert_array_equal(one, two)
    assert one.dtype == np.float64 and (one >= 0).all() and (one <= 1).all()
    assert one.max() > one.min() and similarity([], [], random_vectors).shape == (0,)


@pytest.mark.parametrize("similarity", ALL, ids=lambda s: s.kind)
def test_texts_come_in_pairs(similarity):
    with pytest.raises(ValueError):
        similarity(["a"], ["a", "b"], random_vectors)


def test_the_edit_similarity_is_of_the_longer_length():
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcd"), n)) for n in rng.integers(0, 12, 60)]
    others = texts[::-1]
    exact = [1 - distance(a, b) / (max(len(a), len(b)) or 1)
             for a, b in zip(texts, others, strict=True)]  # fmt: skip
    np.testing.assert_allclose(Edit()(texts, others), exact)
    # Not the `ratio` of insertions and deletions, which is 4 / 6 here.
    assert Edit()(["abc"], ["abd"])[0] == pytest.approx(2 / 3)
    assert Edit()(["ab"], ["ba"])[0] == 0.0
    assert Edit()(["", "", "x"], ["", "x", ""]).tolist() == [1, 0, 0]


def test_what_exceeds_the_cap_is_not_compared():
    assert Edit()(["x" * 4000 + "y"], ["x" * 4000 + "z" * 99])[0] == 1.0
    assert Edit(cap=2)(["abX"], ["abY"])[0] == 1.0 and Edit(cap=3)(["abX"], ["abY"])[0] < 1


def test_rouge_counts_common_words_once_each():
    # Common: one "a" and "b" of 3 and 3 words.
    assert Rouge1()(["a b a"], ["A, b c!"])[0] == pytest.approx(2 * 2 / 6)
    assert Rouge1()(["the sum is 120"], ["the sum is 720"])[0] == pytest.approx(0.75)
    assert Rouge1()(["", "", "+-", "+-"], ["", "a", "+- ", "="]).tolist() == [1, 0, 1, 0]


def test_embeddings_are_means_mapped_from_the_floor():
    embed = mean_embeddings(MATRIX, tokenizer)
    np.testing.assert_allclose(embed(["a a b", "zzz"]), [[2 / 3, 1 / 3], [0, 0]])
    cosine = 2 / 5**0.5
    for floor in (0.0, 0.5):
        found = Embedding(floor=floor)(["a a b", "a", "a"], ["a", "b", "c"], embed)
        np.testing.assert_allclose(found, [(cosine - floor) / (1 - floor), 0, 0], rtol=1e-6)
    assert Embedding()(["", "", "a"], ["zzz", "a", ""], embed).tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match="embed"):
        Embedding()(["a"], ["a"])


def test_graders_compare_final_answers_and_no_answer_equals_none():
    a = ["I get #### 12", "so 12", r"\boxed{12.0}", "1+2=3", "", "3 or 4"]
    b = ["12", "thus #### 12", "#### 12", "1+2=3", "", "3"]
    assert Grader()(a, b).tolist() == [1, 1, 1, 0, 0, 0]
