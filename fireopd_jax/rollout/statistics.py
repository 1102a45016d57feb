"""Counts of an engine, summed over its replicas and runs."""

import dataclasses


@dataclasses.dataclass
class Statistics:
    """Counts since the engine was made, summed over replicas."""

    steps: int = 0
    """Decoding steps."""
    drawn: int = 0
    """Sampled tokens."""
    slot_steps: int = 0
    """Decoding steps times slots."""
    prefills: int = 0
    prefilled: int = 0
    """Prompt tokens whose keys and values were computed."""
    stalled: int = 0
    """Slots without a free page, summed over decoding steps."""
    preempted: int = 0
    """Rows that lost their slot for lack of pages, and were queued again."""
    not_finite: int = 0
    """Responses that ended at logits that were not finite."""
    overlong: int = 0
    """Requests that were refused: a prompt or a begun response does not fit the table."""
    compile_seconds: float = 0.0

    @property
    def slot_use(self) -> float:
        """Sampled tokens per slot and decoding step, at most 1."""
        return self.drawn / max(self.slot_steps, 1)
