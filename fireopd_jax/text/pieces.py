"""The text of each token of a response.

token ids -> texts that join to the whole, special tokens by their names
"""

import functools
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

PENDING = 4
"""Tokens without a text of their own that may follow one another: bytes of one character."""
UNFINISHED = "\ufffd"


class Pieces:
    """Splits responses into the texts of their tokens; remembers those it has seen."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._text = functools.lru_cache(maxsize=1 << 16)(self._decoded)

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """Return the text that each token adds to those before it.

        A character of several tokens belongs to the last of them, the others have an empty text.
        """
        ids = [int(token) for token in ids]
        alone = [self._text((token,)) for token in ids]
        whole = self._decoded(tuple(ids))
        if "".join(alone) == whole and UNFINISHED not in whole:
            return alone
        return self._in_context(ids)

    def _in_context(self, ids: list[int]) -> list[str]:
        """Return the texts by decoding each token behind the one before it."""
        pieces, before, begun = [], 0, 0
        for end in range(1, len(ids) + 1):
            whole = self._text(tuple(ids[before:end]))
            if whole.endswith(UNFINISHED) and end - begun < PENDING and end < len(ids):
                pieces.append("")
                continue
            head = self._text(tuple(ids[before:begun]))
            alone = whole.startswith(head)
            pieces.append(whole[len(head) :] if alone else self._text(tuple(ids[begun:end])))
            before, begun = begun, end
        return pieces

    def _decoded(self, ids: tuple[int, ...]) -> str:
        if not ids:
            return ""
        text = self._tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text
