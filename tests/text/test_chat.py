import copy

import pytest

from fireopd_jax.config import UserError
from fireopd_jax.text.chat import Message, decode, prompt_ids, response_ids, stop_ids
from fireopd_jax.text.tokenizer import BUILTIN, load_tokenizer

TOKENIZER = load_tokenizer(BUILTIN)
PAD, END, SYSTEM, USER, ASSISTANT = range(256, 261)


def without(**attributes):
    tokenizer = copy.deepcopy(TOKENIZER)
    for name, value in attributes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def test_a_prompt_ends_with_the_assistants_header():
    short = [Message(role="user", content="1+2")]
    long = [
        Message(role="system", content="s"),
        Message(role="user", content="e"),
        Message(role="assistant", content="a"),
        Message(role="user", content="u"),
    ]
    assert prompt_ids(TOKENIZER, [short, long], {}) == [
        [USER, *b"1+2", END, ASSISTANT],
        [SYSTEM, *b"s", END, USER, *b"e", END, ASSISTANT, *b"a", END, USER, *b"u", END, ASSISTANT],
    ]
    assert prompt_ids(TOKENIZER, [], {}) == []


def test_a_begun_response_follows_the_header_verbatim():
    chats = [[Message(role="user", content="x")], [Message(role="user", content="y")]]
    begun = prompt_ids(TOKENIZER, chats, {}, begun=[" a \n", ""])
    assert begun == [[USER, *b"x", END, ASSISTANT, *b" a \n"], [USER, *b"y", END, ASSISTANT]]
    (bare,) = prompt_ids(TOKENIZER, chats[:1], {}, add_generation_prompt=False)
    assert bare == [USER, *b"x", END]


def test_template_arguments_reach_the_template():
    template = "{{ messages[0]['content'] }}{% if enable_thinking %}T{% endif %}"
    tokenizer = without(chat_template=template)
    chat = [[Message(role="user", content="x")]]
    assert prompt_ids(tokenizer, chat, {"enable_thinking": True}) == [[*b"xT"]]
    assert prompt_ids(tokenizer, chat, {"enable_thinking": False}) == [[*b"x"]]


def test_template_mistakes_are_named():
    chat = [[Message(role="user", content="x")]]
    with pytest.raises(UserError, match="no chat template"):
        prompt_ids(without(chat_template=None), chat, {})
    with pytest.raises(UserError, match="does not use 'enable_thinking'"):
        prompt_ids(TOKENIZER, chat, {"enable_thinking": False})
    with pytest.raises(UserError, match="'add_generation_prompt' is set by fireopd"):
        prompt_ids(TOKENIZER, chat, {"add_generation_prompt": False})
    with pytest.raises(UserError, match="the role tool is none of"):
        prompt_ids(TOKENIZER, [[Message(role="tool", content="x")]], {})


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no\n system') if bad }}", "no system"),
        ("{{ bad + 1 }}", 'TypeError: can only concatenate str (not "int") to str'),
        ("{{ 1 / (0 if bad else 1) }}", "ZeroDivisionError: division by zero"),
        ("{{ {}[bad].x.y if bad }}", "'dict object' has no attribute 'bad'"),
        ("{{ 'abc'.index('z') if bad }}", "ValueError: substring not found"),
        (
            "{{ messages | map(attribute='content') | sum if bad }}",
            "TypeError: unsupported operand",
        ),
    ],
)
def test_whatever_a_template_raises_names_row_and_model(template, reason):
    last = "{%- set bad = messages[-1].content if messages[-1].content == 'bad' else 0 -%}"
    tokenizer = without(chat_template=f"{last}{{{{ 'x' }}}}{template}")
    chats = [[Message(role="user", content=text)] for text in ("a", "b", "bad", "bad")]
    origins = [f"p.jsonl:{i}" for i in (1, 2, 5, 9)]
    with pytest.raises(UserError) as caught:
        prompt_ids(tokenizer, chats, {}, origins=origins, model="teacher math")
    start = "p.jsonl:5: the chat template of teacher math rejects this prompt: "
    assert str(caught.value).startswith(start + reason)
    assert "\n" not in str(caught.value)


def test_a_template_that_is_no_jinja_names_the_model_and_the_line():
    tokenizer = without(chat_template="a\n{% if %}")
    with pytest.raises(UserError, match=r"^the chat template of student is not .*: line 2"):
        prompt_ids(tokenizer, [[Message(role="user", content="x")]], {}, model="student")
    tokenizer = without(chat_template="{{ strftime_now('%d') }}\n{% if %}")
    with pytest.raises(UserError, match="not valid Jinja: line 2"):
        prompt_ids(tokenizer, [[Message(role="user", content="x")]], {"strftime_now": "2024-01-01"})


def test_a_prompt_of_no_token_is_named():
    tokenizer = without(chat_template="{% for m in messages if m.role == 'x' %}{{ m }}{% endfor %}")
    with pytest.raises(UserError, match=r"^p:1: the chat template of student writes nothing"):
        prompt_ids(tokenizer, [[Message(role="user", content="x")]], {}, origins=["p:1"],
                   model="student")  # fmt: skip


CALL = {"type": "function", "function": {"name": "f", "arguments": {"town": "T"}}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
CALLING = [
    Message(role="user", content="u"),
    Message(role="assistant", content="", tool_calls=[CALL], reasoning_content="r"),
    Message(role="tool", content="12", tool_call_id="1", name="f"),
]
FULL = (
    "{%- for t in tools or [] -%}<{{ t.function.name }}>{%- endfor -%}"
    "{%- for m in messages -%}[{{ m.role }}|{{ m.name }}|{{ m.tool_call_id }}|"
    "{{ m.reasoning_content }}|{{ m.content }}"
    "{%- for c in m.tool_calls or [] -%}!{{ c.function.arguments | tojson }}{%- endfor -%}]"
    "{%- endfor -%}"
)


def text_of(ids):
    return bytes(ids).decode()


def test_a_message_reaches_the_template_whole_and_tools_row_by_row():
    tokenizer = without(chat_template=FULL)
    chats = [CALLING, CALLING[:1], CALLING[:1], CALLING[:1]]
    other = [{"type": "function", "function": {"name": "g"}}]
    found = prompt_ids(tokenizer, chats, {}, tools=[TOOLS, other, None, TOOLS])
    assert [text_of(ids) for ids in found] == [
        '<f>[user||||u][assistant|||r|!{"town": "T"}][tool|f|1||12]',
        "<g>[user||||u]",
        "[user||||u]",
        "<f>[user||||u]",
    ]


def test_a_template_that_ignores_tools_is_refused_by_name():
    plain = "{%- for m in messages -%}[{{ m.role }}|{{ m.content }}]{%- endfor -%}"
    tokenizer = without(chat_template=plain)
    asked, called = [CALLING[:1], CALLING[:1]], [CALLING[:1], CALLING]
    origins = ["t.jsonl:1", "t.jsonl:2"]
    for chats, tools, what in ((asked, [None, TOOLS], "tools"), (called, None, "tool_calls")):
        with pytest.raises(UserError) as caught:
            prompt_ids(tokenizer, chats, {}, tools=tools, origins=origins, model="student")
        assert str(caught.value) == (
            f"t.jsonl:2: the chat template of student ignores the {what} of this prompt; expected "
            "a template that writes them (student.chat_template), or rows without them"
        )
    # Nothing is lost where there is nothing, or where a template writes messages whole.
    assert prompt_ids(tokenizer, asked, {}, tools=[[], None]) == prompt_ids(tokenizer, asked, {})
    prompt_ids(without(chat_template="{{ messages | tojson }}"), called, {})


def test_a_template_that_ignores_messages_is_refused():
    tokenizer = without(chat_template="hello")
    chats = [[{"role": "user", "content": text}] for text in "ab"]
    with pytest.raises(UserError, match=r"student writes the same text for all 2 prompts, 'hello'"):
        prompt_ids(tokenizer, chats, {}, model="student")
    assert len(prompt_ids(tokenizer, chats[:1], {})) == 1
    assert len(prompt_ids(tokenizer, [chats[0], chats[0]], {})) == 2


ENDLESS = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'x' * 9999 }}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ '\\ud800' }}", "prompt 1: the chat template of student writes an unpaired surrogate"),
        (ENDLESS, r"writes without end; expected another \(student.chat_template\)"),
        ("{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}", "writes without end"),
        ({"default": 5}, "is 5, expected a text; set student.chat_template"),
    ],
    ids=["surrogate", "endless", "long", "number"],
)
def test_a_template_that_is_none_is_refused_by_name(monkeypatch, template, words):
    monkeypatch.setattr("fireopd_jax.text.chat.FIRST_BYTES", 2.0**27)
    with pytest.raises(UserError, match=words):
        prompt_ids(without(chat_template=template), [CALLING[:1]], {}, model="student")


def test_a_response_ends_with_the_end_token_alone():
    assert response_ids(TOKENIZER, ["85", ""]) == [[*b"85", END], [END]]
    assert response_ids(TOKENIZER, []) == []
    assert stop_ids(TOKENIZER) == (END,)
    with pytest.raises(UserError, match="no end-of-sequence token"):
        response_ids(without(eos_token=None), ["85"])


def test_decoding_leaves_specials_out_and_spaces_in():
    (ids,) = response_ids(TOKENIZER, [" a , b é"])
    assert decode(TOKENIZER, [ASSISTANT, *ids, PAD]) == " a , b é"


def test_a_generation_config_adds_stop_ids():
    assert stop_ids(TOKENIZER, {"eos_token_id": USER}) == (END, USER)
    assert stop_ids(TOKENIZER, {"eos_token_id": [USER, END, 7]}) == (END, USER, 7)
    assert stop_ids(TOKENIZER, {"eos_token_id": None, "top_p": 0.9}) == (END,)
    wrongs = (["<|end|>"], [-1], list(range(8)), 257.0, "257", [[257]], {"a": 1}, True)
    for wrong in wrongs:
        with pytest.raises(UserError, match="expected at most 8 token ids"):
            stop_ids(TOKENIZER, {"eos_token_id": wrong})
