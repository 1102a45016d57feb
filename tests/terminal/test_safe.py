"""A model's output cannot command the terminal."""

import sys
import unicodedata

import pytest

from fireopd_jax.terminal.safe import one_line, safe

DIRECTIONS = ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI")


@pytest.mark.parametrize(
    "hostile, shown",
    [
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("done\rfailed", r"done\rfailed"),
        ("a\x00b\x08c\x7f", r"a\x00b\x08c\x7f"),
        ("\x9b31m", r"\x9b31m"),
        ("abc\u202ecba\u2066", r"abc\u202ecba\u2066"),
        ("a\u2028b\x85c", r"a\u2028b\x85c"),
        ("\udc80", r"\udc80"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_control_characters_are_shown_as_escapes(hostile, shown):
    assert safe(hostile) == shown
    assert safe(hostile).encode().decode() == shown


def test_text_of_any_language_stays():
    text = "Straße, 数学, עברית, ½ ± 3\n\tx = 2"
    assert safe(text) == text
    assert one_line(text) == text.replace("\n", r"\n").replace("\t", r"\t")


def test_no_control_character_of_unicode_is_left():
    left = [
        hex(code)
        for code in range(sys.maxunicode + 1)
        if unicodedata.category(chr(code)) in ("Cc", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(chr(code)) in DIRECTIONS
        if safe(chr(code)) == chr(code) and chr(code) not in "\n\t"
    ]
    assert left == []
