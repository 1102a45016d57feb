"""Rows that repeat a prompt: counted, named where their answers differ, or dropped.

rows -> prompt_digest -> find_repeats, distinct
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from fireopd_jax.data.rows import Row


def prompt_digest(row: Row) -> bytes:
    """Return the SHA-256 of a prompt: its messages, tools, and the response's given beginning."""
    turns: list[Any] = []
    for message in row.prompt:
        turn: list[Any] = [message["role"], message["content"]]
        # The digest of a plain conversation is that of its roles and contents, in all versions.
        if len(message) > 2:
            turn.append({k: v for k, v in message.items() if k not in ("role", "content")})
        turns.append(turn)
    if row.tools:
        turns.append({"tools": row.tools})
    if row.begun:
        turns.append({"begun": row.begun})
    return hashlib.sha256(json.dumps(turns, default=str).encode()).digest()


def find_repeats(rows: Sequence[Row]) -> tuple[int, tuple[tuple[Row, Row], ...]]:
    """Return the number of rows that repeat an earlier prompt, and pairs with different answers.

    A pair is the first row of a prompt that has an answer, and a later one with another.
    """
    seen: set[bytes] = set()
    answered: dict[bytes, Row] = {}
    conflicts: list[tuple[Row, Row]] = []
    for row in rows:
        digest = prompt_digest(row)
        seen.add(digest)
        if row.answer is None:
            continue
        first = answered.setdefault(digest, row)
        if first.answer != row.answer:
            conflicts.append((first, row))
    return len(rows) - len(seen), tuple(conflicts)


def distinct(rows: Sequence[Row]) -> list[Row]:
    """Return the first row of each prompt, in order."""
    return list({prompt_digest(row): row for row in reversed(rows)}.values())[::-1]
