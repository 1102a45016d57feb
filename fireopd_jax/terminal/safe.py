r"""Text that cannot command a terminal: control characters are shown as escapes.

    safe("a\x1b[2Jb") -> "a\x1b[2Jb"  (the escape written out)

Responses of models, rows of data and names of files are shown through it.
"""

import re

# C0 but for tab and newline, DEL and C1; marks that turn the direction of text, break lines or are
# invisible; lone surrogates, which no stream can encode; tags.
CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ud800-\udfff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def safe(text: str) -> str:
    """Return the text with every control character but tab and newline written as an escape."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def one_line(text: str) -> str:
    """Return the same in one line: newlines and tabs are escapes, too."""
    return safe(text).replace("\n", "\\n").replace("\t", "\\t")
