"""Tokenizers by name: those of local Hugging Face folders, and a built-in byte-level one.

The built-in tokenizer has one id per byte, so it needs no file and no download, and decoding an
encoded text returns it unchanged. Nothing here uses the network or runs code from a folder.
"""

import functools
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fireopd_jax.config import UserError
from fireopd_jax.runtime.limits import read_json

BUILTIN = "builtin:bytes"
EOS = "eos_token_id"
VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.tiktoken",
)
"""Files that a vocabulary is read from."""
SPECIALS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('the role ' ~ message['role'] ~ ' is none of system, user, assistant') -}}"
    "{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


@functools.cache
def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a local folder, or `builtin:bytes`; raise if it cannot be loaded.

    The same name always returns the same object.
    """
    if name == BUILTIN:
        return byte_tokenizer()
    if name.startswith("builtin:"):
        raise UserError(
            f"tokenizer {name!r}: no such built-in tokenizer; did you mean {BUILTIN!r}?"
        )
    folder = Path(name)
    if not folder.is_dir():
        raise UserError(
            f"tokenizer {name!r}: no such folder; expected a local folder with "
            f"tokenizer.json, or {BUILTIN!r}"
        )
    # Without one transformers makes a tokenizer of special tokens alone, for any text.
    if not any(path.is_file() for file in VOCABULARIES for path in folder.glob(file)):
        there = ", ".join(sorted(path.name for path in folder.glob("*token*"))[:4])
        raise UserError(
            f"tokenizer {name!r}: the folder holds no tokenizer.json, nor another vocabulary "
            f"({', '.join(VOCABULARIES[1:])})" + (f"; it has {there}" if there else "")
        )
    # For known model types AutoTokenizer builds that type's class, and may ignore tokenizer.json.
    kind = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
    try:
        loaded = kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # The library raises a bare Exception for a broken file.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"tokenizer {name!r}: cannot be loaded: {reason[:300]}") from error
    if len(loaded) <= len(loaded.get_added_vocab()):
        raise UserError(
            f"tokenizer {name!r}: its vocabulary holds no tokens besides the {len(loaded)} added "
            "ones; is the file of the vocabulary complete?"
        )
    return loaded


def read_generation(folder: Path) -> dict[str, Any]:
    """Return a folder's generation_config.json, which may name more stop ids; {} without one.

    Where it names none, those of config.json hold, as in `transformers`.
    """
    generation = _read_object(folder / "generation_config.json")
    if generation.get(EOS) is None:
        ends = _read_object(folder / "config.json").get(EOS)
        return generation if ends is None else {**generation, EOS: ends}
    return generation


def _read_object(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; {} without the file."""
    if not file.is_file():
        return {}
    try:
        content = read_json(file)
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected an object, found {type(content).__name__}")
    return content


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return the byte-level tokenizer: ids 0 to 255 are the bytes, then the special tokens."""
    vocabulary = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    backend.add_special_tokens(
        [AddedToken(special, special=True, normalized=False) for special in SPECIALS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=SPECIALS[0],
        eos_token=SPECIALS[1],
        extra_special_tokens=list(SPECIALS[2:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def byte_symbols() -> list[str]:
    """Return one visible character for each byte, as byte-level BPE files use them.

    A printable Latin-1 byte maps to itself; the others, in order, to the characters from U+0100.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + hidden.index(byte)) for byte in range(256)]
