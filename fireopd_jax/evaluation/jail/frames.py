"""Messages on a pipe: four bytes of length, then JSON."""

import json
import os
import select
import struct
import time
from typing import Any

HEADER = struct.Struct(">I")
CHUNK = 1 << 16


class Ended(Exception):
    """The other end of the pipe is closed."""


class Late(Exception):
    """No whole message before the deadline."""


def write_frame(fd: int, message: Any) -> None:
    """Write one message; BrokenPipeError if nobody reads any more."""
    # ASCII: a lone surrogate of a program's text has no UTF-8.
    body = json.dumps(message, ensure_ascii=True).encode("ascii")
    view = memoryview(HEADER.pack(len(body)) + body)
    while view:
        view = view[os.write(fd, view[:CHUNK]) :]


def read_frame(fd: int, deadline: float | None = None) -> Any:
    """Return the next message; raise Ended, or Late once `time.monotonic()` passes `deadline`."""
    (size,) = HEADER.unpack(_exactly(fd, HEADER.size, deadline))
    return json.loads(_exactly(fd, size, deadline))


def _exactly(fd: int, size: int, deadline: float | None) -> bytes:
    parts = []
    while size:
        if deadline is not None:
            left = max(0.0, deadline - time.monotonic())
            if not readable(fd, left):
                raise Late
        part = os.read(fd, min(size, CHUNK))
        if not part:
            raise Ended
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def readable(fd: int, seconds: float) -> bool:
    """Return whether a read would not block, waiting for it up to `seconds`.

    `poll`, not `select`: a trainer may have more than 1024 files open.
    """
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))
