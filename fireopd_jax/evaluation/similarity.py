"""Similarity of texts, from 0 to 1: how much a chunk is like what the teacher wrote instead.

    texts_a, texts_b -> one number for each pair

All are symmetric; a text compared with itself gives 1, except by `grader` where it has no answer.
They run on the host. Reference: arXiv 2606.01476 (OmniOPD), which uses `edit` and `rouge1`.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float64
from pydantic import Field, PositiveInt
from rapidfuzz import process
from rapidfuzz.distance import Levenshtein

from fireopd_jax.config import config
from fireopd_jax.evaluation.graders import same_answer

Texts = Sequence[str]
Embed = Callable[[Texts], Float[np.ndarray, "N D"]]
"""Returns one vector per text, zero for a text without tokens."""

WORD = re.compile(r"\w+")


@runtime_checkable
class Similarity(Protocol):
    """Compares texts pairwise."""

    embeds: ClassVar[bool]
    """Whether vectors of the texts are needed."""
    grades: ClassVar[bool]
    """Whether final answers are compared, as a kind of grader finds them."""

    def __call__(
        self,
        texts_a: Texts,
        texts_b: Texts,
        embed: Embed | None = None,
        graders: Sequence[str] | None = None,
    ) -> Float64[np.ndarray, " N"]:
        """Return the similarity of each pair, in [0, 1].

        `embed` is used only where `embeds`, `graders` (a kind for each pair) only where `grades`.
        """
        ...


@config
class Edit:
    """1 - d / max(|a|, |b|), d the Levenshtein distance of the characters: the paper's default.

    1 if both texts are empty, 0 if one is. It compares wording: a paraphrase scores low, and a
    sentence that differs in one wrong digit scores near 1.
    """

    kind: Literal["edit"] = "edit"
    cap: PositiveInt = 4000
    """Characters of each text that are compared; the rest is cut off."""

    embeds: ClassVar[bool] = False
    grades: ClassVar[bool] = False

    def __call__(
        self,
        texts_a: Texts,
        texts_b: Texts,
        embed: Embed | None = None,
        graders: Sequence[str] | None = None,
    ) -> Float64[np.ndarray, " N"]:
        """Return the similarity of each pair."""
        a, b = ([text[: self.cap] for text in texts] for texts in (texts_a, texts_b))
        return process.cpdist(a, b, scorer=Levenshtein.normalized_similarity, dtype=np.float64)


@config
class Rouge1:
    """ROUGE-1: 2 m / (|a| + |b|), m the number of common words, counted with multiplicity.

    Words are runs of letters, digits and underscores, in lower case. Texts without any word are
    compared for equality. A language that does not separate words has whole phrases as words.
    """

    kind: Literal["rouge1"] = "rouge1"

    embeds: ClassVar[bool] = False
    grades: ClassVar[bool] = False

    def __call__(
        self,
        texts_a: Texts,
        texts_b: Texts,
        embed: Embed | None = None,
        graders: Sequence[str] | None = None,
    ) -> Float64[np.ndarray, " N"]:
        """Return the similarity of each pair."""
        pairs = _pairs(texts_a, texts_b)
        words = {text: Counter(WORD.findall(text.lower())) for text in _different(pairs)}

        def f1(a: str, b: str) -> float:
            total = words[a].total() + words[b].total()
            if not total:
                return float(a.strip() == b.strip())
            return 2 * (words[a] & words[b]).total() / total

        return np.array([f1(a, b) for a, b in pairs], np.float64)


@config
class Embedding:
    """max(0, cos - floor) / (1 - floor), cos between the mean token embeddings of the two texts.

    The embeddings are input embeddings, without context: the order of words does not count. 1 if
    both texts are empty, 0 if one is.
    """

    kind: Literal["embedding"] = "embedding"
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Cosine at or below which the similarity is 0. Measure that of unrelated texts: it depends on
    model and data, and is .88 on average for 50 tokens of GSM8K by SmolLM2-135M."""

    embeds: ClassVar[bool] = True
    grades: ClassVar[bool] = False

    def __call__(
        self,
        texts_a: Texts,
        texts_b: Texts,
        embed: Embed | None = None,
        graders: Sequence[str] | None = None,
    ) -> Float64[np.ndarray, " N"]:
        """Return the similarity of each pair; raise ValueError without `embed`."""
        if embed is None:
            raise ValueError("similarity embedding needs vectors of the texts: `embed`")
        pairs = _pairs(texts_a, texts_b)
        different = _different(pairs)
        if not pairs:
            return np.zeros(0)
        vectors = np.asarray(embed(different), np.float64)
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit = dict(zip(different, vectors / np.where(length > 0, length, 1), strict=True))
        cosine = np.array([unit[a] @ unit[b] for a, b in pairs])
        empty = np.array([[not unit[text].any() for text in pair] for pair in pairs])
        value = np.clip((cosine - self.floor) / (1 - self.floor), 0.0, 1.0)
        return np.where(empty.any(axis=1), empty.all(axis=1).astype(np.float64), value)


@config
class Grader:
    """1 where both texts have the same final answer, else 0; no answer equals none.

    Only of use where chunks reach the answer.
    """

    kind: Literal["grader"] = "grader"

    embeds: ClassVar[bool] = False
    grades: ClassVar[bool] = True

    def __call__(
        self,
        texts_a: Texts,
        texts_b: Texts,
        embed: Embed | None = None,
        graders: Sequence[str] | None = None,
    ) -> Float64[np.ndarray, " N"]:
        """Return the similarity of each pair."""
        pairs = _pairs(texts_a, texts_b)
        kinds = ["math"] * len(pairs) if graders is None else graders
        same = [same_answer(a, b, kind) for (a, b), kind in zip(pairs, kinds, strict=True)]
        return np.array(same, np.float64)


Similarities = Annotated[Edit | Rouge1 | Embedding | Grader, Field(discriminator="kind")]


def mean_embeddings(matrix: Float[np.ndarray, "V D"], tokenizer: Any) -> Embed:
    """Return an `Embed`: the mean of the texts' token embeddings, without special tokens."""

    def embed(texts: Texts) -> Float[np.ndarray, "N D"]:
        ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        zero = np.zeros(matrix.shape[1], np.float32)
        means = [matrix[each].mean(axis=0, dtype=np.float32) if each else zero for each in ids]
        return np.stack(means)

    return embed


def _pairs(texts_a: Texts, texts_b: Texts) -> list[tuple[str, str]]:
    return list(zip(texts_a, texts_b, strict=True))


def _different(pairs: Sequence[tuple[str, str]]) -> list[str]:
    return list(dict.fromkeys(text for pair in pairs for text in pair))
