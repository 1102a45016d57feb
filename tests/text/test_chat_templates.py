"""The template of a model by choice: built in, by name, from a file; and what a BOS does to it."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fireopd_jax.config import UserError
from fireopd_jax.text.chat import prompt_ids
from fireopd_jax.text.chat_templates import BUILT_IN, key_of, opening, with_template
from fireopd_jax.text.tokenizer import BUILTIN, byte_symbols, load_tokenizer

BYTES = load_tokenizer(BUILTIN)
USER = [{"role": "user", "content": " 1+1= "}]
TALK = [
    {"role": "system", "content": "Add."},
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+2"},
]


def tokenizer_with(single=None, pre=None, template=None):
    """A tokenizer of characters, with `<s>` and `</s>` where `single` has them around $A."""
    symbols = dict.fromkeys([*byte_symbols(), "▁", *"\n "])
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    marks = ("<s>", "</s>")
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in marks])
    if single:
        ids = [(mark, backend.token_to_id(mark)) for mark in marks]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template
    )  # fmt: skip


SENTENCEPIECE = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
KINDS = {
    "no BOS": tokenizer_with(),
    "BOS": tokenizer_with("<s> $A"),
    "BOS and EOS": tokenizer_with("<s> $A </s>"),
    "a space at the start": tokenizer_with("<s> $A", SENTENCEPIECE),
}


@pytest.mark.parametrize("kind", KINDS)
def test_plain_is_the_text_as_the_tokenizer_reads_it(kind):
    tokenizer = KINDS[kind]
    plain = with_template(tokenizer, "plain", "student")
    for text in (" 1+1= ", "a\nb", "{{ x }}", "  "):
        (ids,) = prompt_ids(plain, [[{"role": "user", "content": text}]], {})
        whole = tokenizer(text)["input_ids"]
        assert ids == (whole[:-1] if kind == "BOS and EOS" else whole)
    assert tokenizer.chat_template is None, "the shared tokenizer stays as it was"


def test_what_is_before_a_text_is_found():
    begun = [opening(tokenizer) for tokenizer in KINDS.values()]
    bos = KINDS["BOS"].bos_token_id
    assert begun == [[], [bos], [bos], [KINDS["a space at the start"].bos_token_id]]


def test_plain_refuses_a_conversation_by_row_and_model():
    plain = with_template(BYTES, "plain", "teacher maths")
    with pytest.raises(UserError) as caught:
        prompt_ids(
            plain, [USER, TALK], {}, origins=["p.jsonl:1", "p.jsonl:2"], model="teacher maths"
        )
    assert str(caught.value) == (
        "p.jsonl:2: the chat template of teacher maths rejects this prompt: plain writes a single "
        "message of the user as it is, without roles; this prompt has system, user, assistant, "
        "user; expected a template for conversations, such as chatml"
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("chatml", "<s><|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n1+1<|im_end|>\n"
         "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\n2+2<|im_end|>\n"
         "<|im_start|>assistant\n"),
        ("tulu", "<s><|system|>\nAdd.\n<|user|>\n1+1\n<|assistant|>\n2</s>\n<|user|>\n2+2\n"
         "<|assistant|>\n"),
        ("question", "<s>Add.\n\nQuestion: 1+1\nAnswer: 2\n\nQuestion: 2+2\nAnswer:"),
    ],
)  # fmt: skip
def test_built_in_templates_write_conversations_after_the_bos(name, text):
    tokenizer = with_template(KINDS["BOS"], name, "student")
    (ids,) = prompt_ids(tokenizer, [TALK], {})
    assert tokenizer.decode(ids) == text
    bare = with_template(KINDS["no BOS"], name, "student")
    assert bare.decode(prompt_ids(bare, [TALK], {})[0]) == text.removeprefix("<s>")


def test_a_chosen_template_is_saved_with_the_tokenizer(tmp_path):
    for name in BUILT_IN:
        own = with_template(KINDS["BOS"], name, "student")
        own.save_pretrained(tmp_path / name)
        theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / name)
        ids = theirs.apply_chat_template(USER, add_generation_prompt=True, return_dict=False)
        assert ids == prompt_ids(own, [USER], {})[0]


def test_named_templates_are_chosen_by_name(tmp_path):
    several = {"rag": "R{{ messages[0].content }}", "tool_use": "T{{ tools[0].name }}"}
    tokenizer = tokenizer_with(template=several)
    (ids,) = prompt_ids(with_template(tokenizer, "rag", "student"), [USER], {})
    assert tokenizer.decode(ids) == "R 1+1= "
    with pytest.raises(
        UserError, match=r"student: .*no default; set student.chat_template to one of rag, tool_use"
    ):
        prompt_ids(tokenizer, [USER], {}, model="student")
    with pytest.raises(
        UserError,
        match=r"'tool_us' is no file.*did you mean 'tool_use'.*one of rag, tool_use, plain, chatml",
    ):
        with_template(tokenizer, "tool_us", "student")
    tokenizer.chat_template = {"default": "D{{ messages[0].content }}", **several}
    texts = [
        tokenizer.decode(ids)
        for ids in prompt_ids(tokenizer, [USER, USER], {}, tools=[None, [{"name": "f"}]])
    ]
    assert texts == ["D 1+1= ", "Tf"], "tools choose tool_use, as transformers does"


def test_a_template_comes_from_a_file_a_folder_or_the_text(tmp_path):
    text = "F{{ messages[0].content }}"
    (tmp_path / "own.jinja").write_text(text)
    (tmp_path / "one.json").write_text(json.dumps({"chat_template": text}))
    named = [{"name": "default", "template": text}, {"name": "rag", "template": "R"}]
    (tmp_path / "named.json").write_text(json.dumps({"chat_template": named}))
    for folder, file, content in (
        ("new", "chat_template.jinja", text),
        ("old", "tokenizer_config.json", json.dumps({"chat_template": text})),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text(content)
    for chosen in ("own.jinja", "one.json", "named.json", "new", "old"):
        assert with_template(BYTES, str(tmp_path / chosen), "base").chat_template == text
    assert with_template(BYTES, text, "base").chat_template == text


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.jinja", "no template", "no chat template in it; expected one in Jinja"),
        ("a.json", "{}", "no chat template in it"),
        ("a.json", "[1]", "cannot be read as a chat template"),
        ("a.json", "{", "cannot be read as a chat template"),
        ("a.json", "[" * 100_000, "cannot be read as a chat template: nested too deeply"),
        ("a.json", '{"chat_template": [1]}', "no default"),
        ("a.json", '{"chat_template": [{"name": "default"}]}', "no chat template in it"),
        ("a.jinja", b"\xff{{ x }}", "cannot be read as a chat template: 'utf-8'"),
        ("a.json", '{"chat_template": [{"name": "rag", "template": "{{ x }}"}]}',
         r"several templates and no default \(rag\)"),
        ("folder/x", "", "the folder has no chat_template.jinja and no chat_template.json and no"),
    ],
)  # fmt: skip
def test_a_file_without_a_template_names_the_key(tmp_path, name, content, error):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    chosen = tmp_path / name.split("/")[0]
    with pytest.raises(UserError, match=rf"^teachers.maths.chat_template: .*{error}") as caught:
        with_template(BYTES, str(chosen), "teacher maths")
    assert "\n" not in str(caught.value)


def test_the_key_of_a_template_is_that_of_its_model():
    keys = [key_of(name) for name in ("student", "teacher a.b", "base", "model", "")]
    assert keys[:3] == [
        "student.chat_template",
        'teachers."a.b".chat_template',
        "base.chat_template",
    ]
    assert keys[3:] == ["--chat-template"] * 2
    with pytest.raises(
        UserError, match=r"^student.chat_template: 'chatlm' .*did you mean 'chatml'"
    ):
        with_template(BYTES, "chatlm", "student")
