"""The end of a run that cannot learn.

metrics of each step -> NothingLearnt after many steps in a row without a finite update
"""

from collections.abc import Mapping

from fireopd_jax.config import NothingLearnt
from fireopd_jax.training.update import skip_reason


class Guard:
    """Counts steps in a row whose updates were all skipped as not finite."""

    def __init__(self, name: str, limit: int):
        self.name, self.limit = name, limit
        self.in_a_row = 0
        self.reason = ""
        """Of the newest skipped update."""

    def check(self, done: int, values: Mapping[str, float]) -> None:
        """Count a step by its metrics; raise NothingLearnt at the limit."""
        if values["skipped"]:
            self.reason = skip_reason(values)
        if values["skipped"] < 1 or not values["loss_tokens"]:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        if self.in_a_row >= self.limit:
            raise NothingLearnt(
                f"{self.name}: stopped after step {done}: the last {self.in_a_row} updates were "
                f"skipped (run.max_nonfinite={self.limit}): {self.reason}"
            )

    def end(self, updates: int, skipped: int) -> None:
        """Raise NothingLearnt if all updates of a training were skipped."""
        if updates and skipped == updates:
            why = f": {self.reason}" if self.reason else ""
            raise NothingLearnt(
                f"{self.name}: nothing is learnt: all {updates} updates were skipped{why}"
            )
