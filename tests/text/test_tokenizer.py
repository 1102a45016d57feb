import json

import pytest
from transformers import AutoTokenizer

from fireopd_jax.config import UserError
from fireopd_jax.text.tokenizer import BUILTIN, SPECIALS, load_tokenizer, read_generation

TEXTS = [
    "",
    "47+38",
    " two  spaces\tand\n\nlines ",
    "I 'm not , sure . n't",
    "naïve \u2013 漢字 🙂 é\u0301 \u200b\ufeff\x00\x7f\xad",
    "".join(chr(code) for code in range(0x250)),
    "a <|end|> b <|user|><|pad|>c",
]


def test_ids_are_the_bytes_and_then_the_specials():
    tokenizer = load_tokenizer(BUILTIN)
    assert len(tokenizer) == 261
    text = "aé漢🙂\x00\n"
    assert tokenizer.encode(text, add_special_tokens=False) == list(text.encode())
    assert tokenizer.convert_tokens_to_ids(list(SPECIALS)) == [256, 257, 258, 259, 260]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (256, 257)


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_survives_the_round_trip(text):
    tokenizer = load_tokenizer(BUILTIN)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_every_byte_has_one_id():
    tokenizer = load_tokenizer(BUILTIN)
    tokens = tokenizer.convert_ids_to_tokens(list(range(256)))
    assert len(set(tokens)) == 256
    assert tokens[0x20] == "Ġ"


def test_saving_and_loading_changes_nothing(tmp_path):
    tokenizer = load_tokenizer(BUILTIN)
    tokenizer.save_pretrained(tmp_path)
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "é <|end|> x"}]
    # With this package, and with transformers alone.
    for loaded in (load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(str(tmp_path))):
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert loaded.special_tokens_map == tokenizer.special_tokens_map
        assert loaded.all_special_ids == tokenizer.all_special_ids
        assert loaded.chat_template == tokenizer.chat_template
        assert loaded.padding_side == tokenizer.padding_side
        assert loaded.model_max_length == tokenizer.model_max_length
        for text in TEXTS:
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert loaded.encode(text, add_special_tokens=False) == ids
            assert loaded.decode(ids) == text
        assert loaded.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(
            chat, tokenize=False
        )


def test_the_same_name_returns_the_same_object():
    assert load_tokenizer(BUILTIN) is load_tokenizer(BUILTIN)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="did you mean 'builtin:bytes'"):
        load_tokenizer("builtin:byte")
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": "none"}))
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_tokenizer_json_counts_and_not_the_model_type_beside_it(tmp_path):
    tokenizer = load_tokenizer(BUILTIN)
    tokenizer.save_pretrained(tmp_path)
    # AutoTokenizer would build Qwen 2's own class, which adds a token.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.get_vocab() == tokenizer.get_vocab()
    text = "I'm  12 \u00e9"
    assert loaded.encode(text) == tokenizer.encode(text)


def test_a_generation_config_is_read_where_there_is_one(tmp_path):
    assert read_generation(tmp_path) == {}
    file = tmp_path / "generation_config.json"
    file.write_text('{"eos_token_id": [1, 2]}')
    assert read_generation(tmp_path) == {"eos_token_id": [1, 2]}
    for wrong, words in (
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON: nested too deeply"),
        ("[]", "expected an object, found list"),
    ):
        file.write_text(wrong)
        with pytest.raises(UserError, match=words):
            read_generation(tmp_path)
