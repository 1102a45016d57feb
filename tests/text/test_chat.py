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
    for wrong in (["<|end|>"], [-1], list(range(8))):
        with pytest.raises(UserError, match="expected at most 8 token ids"):
            stop_ids(TOKENIZER, {"eos_token_id": wrong})
