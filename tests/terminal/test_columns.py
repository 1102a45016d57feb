"""Texts that grow side by side: rows that were written once never change."""

import random

from rich.cells import cell_len

from fireopd_jax.terminal.columns import Columns, visible, wrapped


def growing(seed):
    """Return a random text with long words, wide characters, tabs and empty lines."""
    rng = random.Random(seed)
    words = ["a", "bcd", "efghij", "kl" * 14, "日本語", "\n", "\n\n", "\t", " ", "é"]
    return "".join(rng.choice(words) + rng.choice([" ", " ", ""]) for _ in range(60))


def test_rows_that_are_settled_are_those_of_the_whole_texts():
    for seed in range(20):
        texts = [growing(2 * seed), growing(2 * seed + 1)]
        columns, written = Columns(2, 41), []
        steps = max(map(len, texts))
        for end in range(0, steps + 1, 3):
            parts = [text[:end] for text in texts]
            new, below = columns.settled(parts, [end >= len(text) for text in texts])
            written += new
            assert len(written) + len(below) == len(columns.rows(parts))
        written += columns.settled(texts, [True, True])[0]
        assert written == columns.rows(texts)
        assert all(cell_len(row) <= 41 for row in written)


def test_a_text_is_wrapped_between_words_and_keeps_its_lines():
    assert wrapped("one two three", 8) == ["one two", "three"]
    assert wrapped("  a\n\nb", 8) == ["  a", "", "b"]
    assert wrapped("abcdefghij", 4) == ["abcd", "efgh", "ij"]
    assert wrapped("", 4) == [""]


def test_control_characters_are_not_shown():
    assert visible("a\x1b[2J\r\x07\x9b\nb\tc") == "a�[2J���\nb\tc"
