"""A few responses of a step, shown as they come: what the student says now, and how it is judged.

outputs of a step -> lines of the log: end of the prompt, response, grade, teacher's score
"""

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fireopd_jax.data.sources import Row
from fireopd_jax.evaluation.graders import verdict
from fireopd_jax.runtime.processes import fetched
from fireopd_jax.terminal.safe import one_line, safe
from fireopd_jax.types import Batch

SHOWN = 2
"""Number of responses that are shown at a time."""
EVERY_S = 60.0
"""Least number of seconds between two times."""
LINES, WIDTH = 4, 100
"""Lines of a response, and characters of each, that are shown."""


class Samples:
    """Decides when responses are shown: of the first step, then where asked, at times apart."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._shown_at: float | None = None

    def due(self, asked: bool) -> bool:
        """Return whether responses are shown now; `asked` is whether the step is one to keep."""
        now, last = self._clock(), self._shown_at
        if last is not None and not (asked and now - last >= EVERY_S):
            return False
        self._shown_at = now
        return True


def samples(
    batch: Batch,
    rows: Sequence[Row],
    decode: Callable[[list[int]], str],
    grader: Callable[[int], str],
) -> Iterator[str]:
    """Yield a text of a few lines for each of the first responses of a batch to different rows."""
    rollout, teacher = batch.rollout, batch.scores.teacher
    score = None if teacher is None else teacher.logprob
    prompts, tokens, mask, finished, score = fetched(
        (rollout.prompts.row, rollout.tokens, rollout.mask, rollout.finished, score)
    )
    seen: set[int] = set()
    for i in np.flatnonzero(mask.any(axis=1) & (prompts >= 0)):
        row = int(prompts[i])
        if row in seen:
            continue
        seen.add(row)
        source, response = rows[row], decode(tokens[i][mask[i]].tolist())
        judged = [f"{int(mask[i].sum())} tokens" + ("" if finished[i] else ", cut off")]
        if source.answer is not None:
            found = verdict(source.begun + response, source.answer, grader(row))
            judged.append("correct" if found.correct else "wrong")
        if score is not None:
            judged.append(f"teacher {float(score[i][mask[i]].mean()):.2f} nats a token")
        yield shown(str(source.prompt[-1]["content"]), response, judged)
        if len(seen) == SHOWN:
            return


def shown(prompt: str, response: str, judged: Sequence[str]) -> str:
    """Return a prompt's end and a response's beginning as indented lines, control characters out.

    Nothing in them can be taken for a line of the log, or for a command of the terminal.
    """
    cut = "... " if len(prompt) > WIDTH else ""
    lines = [f"  prompt: {cut}{one_line(prompt[-WIDTH:])}"]
    told = safe(response).split("\n")
    for line in told[:LINES]:
        lines.append(f"  > {line[:WIDTH]}" + (" ..." if len(line) > WIDTH else ""))
    if len(told) > LINES:
        lines.append(f"  > ... {len(told) - LINES} more lines")
    return "\n".join([*lines, f"  ({', '.join(judged)})"])
