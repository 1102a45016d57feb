"""Counters of requests, tokens and money, and the budget.

reserve the most a request may cost -> send -> settle for what it did cost
"""

import threading
from collections import Counter

from fireopd_jax.remote.errors import BudgetSpent
from fireopd_jax.remote.settings import ServedConfig

Tokens = tuple[int, int]
"""Tokens of prompts, tokens of completions."""

COUNTERS = (
    "sent",  # attempts, repetitions included
    "answered",
    "from_cache",
    "retried",
    "failed",  # given up
    "unanswered",  # attempts lost with a connection or a time-out: the server may have answered
    "rate_limited",
    "malformed",
)


class Ledger:
    """What a teacher has cost and may still cost; safe to use from several threads."""

    def __init__(self, settings: ServedConfig, name: str, paid: Tokens):
        self.settings, self.name, self.paid = settings, name, paid
        self.counts: Counter[str] = Counter()
        self.used: Tokens = (0, 0)
        self.in_flight = 0
        self._held: Tokens = (0, 0)
        self._changed = threading.Condition()

    def count(self, name: str, number: int = 1) -> None:
        """Add to a counter."""
        with self._changed:
            self.counts[name] += number

    def reserve(self, bound: Tokens) -> None:
        """Set aside the most that a request may cost; raise `BudgetSpent` if it is not there.

        Waits while other requests hold reservations that may turn out smaller.
        """
        with self._changed:
            while problem := self._excess(bound):
                if not self.in_flight:
                    raise BudgetSpent(problem)
                self._changed.wait()
            self.in_flight += 1
            self._held = _sum(self._held, bound)

    def settle(self, bound: Tokens, used: Tokens) -> None:
        """Replace a reservation by what the request did cost."""
        with self._changed:
            self.in_flight -= 1
            self._held = (self._held[0] - bound[0], self._held[1] - bound[1])
            self.used = _sum(self.used, used)
            self._changed.notify_all()

    def stats(self) -> dict[str, float]:
        """Return the counters, tokens and cost of this process, and those in the cache."""
        with self._changed:
            total = _sum(self.used, self.paid)
            return {
                **{f"requests_{name}": float(self.counts[name]) for name in COUNTERS},
                "requests_in_flight": float(self.in_flight),
                **{name: float(n) for name, n in self.counts.items() if name not in COUNTERS},
                "tokens_in": float(self.used[0]),
                "tokens_out": float(self.used[1]),
                "cost": self.settings.cost(*self.used),
                "total_tokens": float(sum(total)),
                "total_cost": self.settings.cost(*total),
            }

    def _excess(self, bound: Tokens) -> str | None:
        """Return which budget a further request could exceed, None if none."""
        spent = _sum(self.used, self.paid)
        future = _sum(_sum(spent, self._held), bound)
        most, tokens = self.settings.max_tokens_budget, sum(future)
        where = f"teacher {self.name!r}: budget spent"
        kept = "answers so far are kept; raise it to go on"
        if most is not None and tokens > most:
            return (
                f"{where}: {sum(spent):,} of {most:,} tokens, and the next request may take "
                f"{sum(bound):,} (max_tokens_budget); {kept}"
            )
        cost, limit = self.settings.cost(*future), self.settings.max_cost
        if limit is not None and cost > limit:
            return (
                f"{where}: {self.settings.cost(*spent):.4g} of {limit:.4g}, and the next request "
                f"may cost {self.settings.cost(*bound):.4g} (max_cost); {kept}"
            )
        return None


def _sum(one: Tokens, other: Tokens) -> Tokens:
    return one[0] + other[0], one[1] + other[1]
