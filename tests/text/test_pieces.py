"""Texts of single tokens join to the text of all."""

from transformers import PreTrainedTokenizerBase

from fireopd_jax.text.pieces import Pieces
from fireopd_jax.text.tokenizer import byte_tokenizer


def split(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Pieces(tokenizer)(ids), ids


def test_a_character_belongs_to_its_last_byte():
    pieces, _ = split("né 😀!")
    assert pieces == ["n", "", "é", " ", "", "", "", "😀", "!"]


def test_special_tokens_have_their_names():
    tokenizer = byte_tokenizer()
    assert Pieces(tokenizer)([ord("a"), tokenizer.eos_token_id]) == ["a", "<|end|>"]


def test_broken_bytes_are_shown_and_nothing_is_lost():
    tokenizer = byte_tokenizer()
    ids = [0xF0, 0x9F, ord("a"), 0xFF, 0xFE, 0xFD, 0xFC, 0xFB, ord("b")]
    pieces = Pieces(tokenizer)(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.decode(ids) and pieces[-1].endswith("b")


class Spaced(PreTrainedTokenizerBase):
    """Drops the space that a first token begins with, as SentencePiece does."""

    def decode(self, ids, **_):
        return "".join([" the", " cat", "s"][i] for i in ids).lstrip(" ")


def test_the_space_of_a_token_in_the_middle_is_kept():
    assert Pieces(Spaced())([0, 1, 2]) == ["the", " cat", "s"]
