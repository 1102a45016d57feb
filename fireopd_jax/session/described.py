"""The setup of a run in words: models, rows used and dropped, one rendered prompt of each model.

Setup -> lines of the log
"""

from collections.abc import Iterator

import numpy as np

from fireopd_jax.evaluation.graders import unreadable
from fireopd_jax.models.decoder import parameter_count
from fireopd_jax.session.session import Session
from fireopd_jax.session.setup import Setup
from fireopd_jax.session.specs import ModelSpec
from fireopd_jax.text.clock import CLOCK

SHOWN_IDS = 24
SHOWN_TEXT = 400
SHOWN_ROWS = 5


def log_setup(session: Session) -> None:
    """Log models, numbers of rows used and dropped, and one rendered prompt of each model."""
    setup, log = session.setup, session.log
    for spec in (setup.student, *setup.teachers):
        count = parameter_count(spec.model.shapes())
        log(f"{spec.name}: {count:,} parameters, tokenizer {spec.tokenizer_name}")
    for line in clock_shown(setup):
        log(line)
    for note in setup.data_notes:
        log(f"data: {note}")
    encoded = setup.encoded
    short = f", {encoded.dropped_short} too short" if encoded.dropped_short else ""
    log(
        f"data: {len(setup.rows)} rows, {len(setup.train)} to train on, {len(setup.held_out)} held"
        f" out; {encoded.dropped_prompts} prompts longer than {encoded.max_prompt_tokens} tokens"
        f" dropped{short}; {encoded.dropped_references} references longer than"
        f" {encoded.max_reference_tokens} not used"
    )
    for opened in setup.sets:
        trained = [setup.rows[index] for index in setup.train]
        for note in (*opened.notes(), *opened.own.overlap(trained)):
            log(f"eval set {note}")
    if line := unreadable_answers(setup):
        log(line)
    log(prompt_shown(setup.student, encoded.prompts[int(encoded.kept[0])]))
    for index, spec in enumerate(setup.teachers):
        for row in setup.own_rows(encoded.kept, index)[:1]:
            log(prompt_shown(spec, encoded.teacher_prompts[int(row)]))


def clock_shown(setup: Setup) -> Iterator[str]:
    """Yield a line for each date that chat templates write: whose they are."""
    dates: dict[str, list[str]] = {}
    models = {spec.name: spec for spec in (setup.student, *setup.teachers)}
    served = {f"teacher {teacher.name}": teacher for teacher in setup.served}
    for name, model in (models | served).items():
        if CLOCK in (kwargs := model.config.chat_template_kwargs):
            dates.setdefault(str(kwargs[CLOCK]), []).append(name)
    for date, names in dates.items():
        yield (
            f"chat templates that read the clock ({', '.join(names)}): it shows {date} in all of "
            f"this run (chat_template_kwargs: {CLOCK})"
        )


def unreadable_answers(setup: Setup) -> str:
    """Return a line with the gold answers that no response can match; empty without any."""
    kind, found = setup.config.data.grader, []
    for index in setup.encoded.kept.tolist():
        row = setup.rows[index]
        if row.answer is not None and (reason := unreadable(row.answer, kind)):
            found.append(f"{row.origin} ({reason})")
    more = f" and {len(found) - SHOWN_ROWS} more" if len(found) > SHOWN_ROWS else ""
    return (
        f"data: {len(found)} gold answers that no response can match: "
        f"{', '.join(found[:SHOWN_ROWS])}{more}"
        if found
        else ""
    )


def prompt_shown(spec: ModelSpec, ids: np.ndarray) -> str:
    """Return a line with a model's rendered prompt: its text, first token ids and stop tokens."""
    text = repr(spec.tokenizer.decode(ids))
    if len(text) > SHOWN_TEXT:
        text = f"{text[: SHOWN_TEXT // 2]} ... {text[-SHOWN_TEXT // 2 :]}"
    shown = " ".join(map(str, ids[:SHOWN_IDS])) + (" ..." if len(ids) > SHOWN_IDS else "")
    stop = ", ".join(map(str, spec.tokenizer.convert_ids_to_tokens(list(spec.stop))))
    return f"{spec.name}: prompt {text}, {len(ids)} tokens: {shown}; stop tokens {stop}"
