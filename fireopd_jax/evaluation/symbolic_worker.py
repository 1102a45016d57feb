"""The process that runs math-verify: one JSON object a line in, one out.

    {"gold", "answer", "whole", "limit_s"} -> {"equal": true, false or null}

It is a program of its own, so that a formula that sympy cannot finish is killed with it, and so
that its main thread is free for the signal of a time limit. The limit counts processor time: the
load of the machine does not change a grade.
"""

import json
import logging
import resource
import signal
import sys
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

MEMORY_BYTES = 4 << 30
"""Address space of the process."""
GRACE_S = 1
"""Seconds beyond the limit after which the system kills the process."""


class TooLongError(BaseException):
    """Raised by the time limit; no `except Exception` of a library keeps it."""


def compare(gold: str, answer: str, whole: bool) -> bool:
    """Return math-verify's verdict on two formulas, or, if `whole`, on two whole texts."""
    if whole:
        a, b = (parse(text, parsing_timeout=0) for text in (rf"\boxed{{{gold}}}", answer))
        return verify(a, b, timeout_seconds=None)
    latex = [LatexExtractionConfig()]
    a, b = (
        parse(f"${text}$", latex, fallback_mode="no_fallback", parsing_timeout=0)
        for text in (gold, answer)
    )
    # The order matters to math-verify and must not to us.
    return bool(a and b) and (
        verify(a, b, timeout_seconds=None) or verify(b, a, timeout_seconds=None)
    )


def limited(which: int, most: int) -> None:
    """Limit this process; the limit that the user's system has set is never raised."""
    hard = resource.getrlimit(which)[1]
    resource.setrlimit(which, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def answered(request: dict[str, Any]) -> bool | None:
    """Return the verdict, or None if it took too long or too much memory."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = request["limit_s"]
    # Where C code holds the interpreter, the signal does not come through; this limit does.
    seconds = int(used.ru_utime + used.ru_stime + limit + GRACE_S)
    limited(resource.RLIMIT_CPU, seconds)
    signal.setitimer(signal.ITIMER_PROF, limit)
    try:
        return compare(request["gold"], request["answer"], request["whole"])
    except TooLongError:
        return None
    except (MemoryError, RecursionError):
        return None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> None:
    """Answer requests until standard input ends."""
    # math-verify warns that its time-outs are off.
    logging.disable(logging.CRITICAL)
    limited(resource.RLIMIT_AS, MEMORY_BYTES)

    def stop(number: int, frame: object) -> None:
        raise TooLongError

    signal.signal(signal.SIGPROF, stop)
    replies, sys.stdout = sys.stdout, sys.stderr  # A print in a library is no reply.
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps({"equal": answered(json.loads(line))}), file=replies, flush=True)


if __name__ == "__main__":
    main()
