"""A template's clock, stopped: the date of a moment, and nothing else of the text changes."""

import copy
from datetime import datetime

import pytest

from fireopd_jax.config import UserError
from fireopd_jax.text.chat import prompt_ids
from fireopd_jax.text.clock import moment_of, now, reads_clock
from fireopd_jax.text.tokenizer import BUILTIN, load_tokenizer

CHAT = [[{"role": "user", "content": "x"}]]
MOMENT = "2024-07-26T23:59:58"


def written(template, tools=None, **kwargs):
    tokenizer = copy.deepcopy(load_tokenizer(BUILTIN))
    tokenizer.chat_template = template
    (ids,) = prompt_ids(tokenizer, CHAT, kwargs, tools=tools)
    return bytes(ids).decode()


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        ('{{ strftime_now("%H:%M:%S|%A|%j|%%d") }}', "23:59:58|Friday|208|%d"),
        ("{{ strftime_now(format='%Y-%m-%d') }}", "2024-07-26"),
        ("{%- set f = '%-d/%m' -%}{{ strftime_now(f) }}", "26/07"),
        ("{{ strftime_now('%d\\n%m') }}", "26\n07"),
        ("{{ strftime_now('%d\n%m') ~ 'a\nb' }}", "26\n07a\nb"),
        ("{{ strftime_now('today') }}", "today"),
        ("{% if strftime_now is defined %}{{ strftime_now('%y') }}{% endif %}", "24"),
        ("{% macro day() %}{{ strftime_now('%d') }}{% endmacro %}{{ day() }}", "26"),
        ("{% for m in messages %}{{ m.content ~ strftime_now('%m') }}{% endfor %}", "x07"),
    ],
)  # fmt: skip
def test_a_stopped_clock_shows_its_moment(template, text):
    assert written(template, strftime_now=MOMENT) == text


@pytest.mark.parametrize(
    "start",
    ["", "\n", "\n\n", "  ", "  {% if true %}\n  y\n  {% endif %}", "{%- if true %} z{% endif %}\n",
     "{# a #}\n", "\t{{ 'q' }}\n "],
)  # fmt: skip
def test_stopping_the_clock_changes_nothing_else(start):
    template = start + "{{ strftime_now('%Y') }}"
    before, after = written(template), written(template, strftime_now=datetime.now().isoformat())
    assert before == after


def test_a_format_may_be_an_argument_of_the_template():
    template = "{{ strftime_now(date_format) }}"
    assert written(template, strftime_now=MOMENT, date_format="%d.%m.") == "26.07."
    computed = "{{ strftime_now('%d' ~ messages[0].content) }}"
    with pytest.raises(UserError, match=r"prompt 1: .*format %dx is not written out"):
        written(computed, strftime_now=MOMENT)


def test_without_a_moment_the_clock_goes():
    assert written("{{ strftime_now('%Y') }}") == now()[:4]
    assert reads_clock("{{ strftime_now('%Y') }}") and not reads_clock("{{ date_string }}")


def test_a_moment_is_a_date():
    assert moment_of("2024-07-26") == datetime(2024, 7, 26)
    assert moment_of(datetime(2024, 7, 26).date()) == datetime(2024, 7, 26)
    with pytest.raises(UserError, match=r"strftime_now='26 Jul' is no date; expected"):
        moment_of("26 Jul")
    with pytest.raises(UserError, match=r"strftime_now='x' is no date"):
        written("{{ strftime_now('%Y') }}", strftime_now="x")
