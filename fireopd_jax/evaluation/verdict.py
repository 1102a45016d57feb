"""What a grader says about one response."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a response is correct, and which rule decided it."""

    correct: bool
    rule: str
    """Where the final answer was found and how it was compared, such as `box: number`."""
    plain: bool | None = None
    """Verdict of math-verify alone, without our additions; None where it was not asked, or did not
    finish in time."""
