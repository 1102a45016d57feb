"""What goes wrong in on-policy distillation, told from the metrics, with its likely cause.

    {metric: value} of a step -> lines for the log, each rule once

A rule compares a moving mean with what it was in the first steps of the process: a run that goes on
begins anew. References: arXiv 2603.25562, 2604.13016; 2605.11182 and 2604.08527 for collapses.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

FIRST = 10
"""Steps that tell what a run began with."""
DECAY = 0.9
"""Of the moving means."""
PATIENCE = 50
"""Steps in which the two models' words should come together."""


@dataclasses.dataclass
class Course:
    """One metric over time."""

    steps: int = 0
    start: float = 0.0
    """Mean of the first steps."""
    now: float = 0.0
    """Moving mean."""

    def add(self, value: float | int) -> None:
        """Take one more step; what is not finite tells nothing."""
        if not math.isfinite(value):
            return
        self.steps += 1
        if self.steps <= FIRST:
            self.start += (value - self.start) / self.steps
        self.now = value if self.steps == 1 else DECAY * self.now + (1 - DECAY) * value


class Alarms:
    """The courses of a run, and the rules that have spoken."""

    def __init__(self) -> None:
        self.courses: dict[str, Course] = {}
        self.told: set[str] = set()

    def check(self, values: Mapping[str, float | int]) -> Iterator[str]:
        """Take a step's metrics; give the lines of the rules that find something anew."""
        for name, value in values.items():
            self.courses.setdefault(name, Course()).add(value)
        for name, rule in RULES.items():
            if name not in self.told and (line := rule(self._get)):
                self.told.add(name)
                yield line

    def _get(self, name: str) -> Course:
        """Give the course of a metric; one that is not there has no steps."""
        return self.courses.get(name, Course())


Get = Callable[[str], Course]


def _incompatible(get: Get) -> str | None:
    overlap = get("distill/overlap_ratio")
    if overlap.steps > PATIENCE and overlap.now < 0.8 and overlap.now < overlap.start + 0.02:
        return (
            f"distill/overlap_ratio is {overlap.now:.2f} and does not rise: the teacher and the "
            "student name other words; compare their templates, or take a teacher of the student's "
            "own family, or train the student on the teacher's answers first (student.sft)"
        )
    return None


def _unsure_late(get: Get) -> str | None:
    late, early = (get(f"distill/student_entropy_quarter_{i}") for i in (4, 1))
    if late.steps > FIRST and late.now > 1.5 * late.start + 0.1 and early.now < 1.2 * early.start:
        return (
            f"the student's entropy in the last quarter rises, {late.start:.2f} to {late.now:.2f} "
            "nats: late tokens go wrong first; shorten rollout.max_tokens, or cut them with "
            "method.filter.kind=prefix"
        )
    return None


def _leaking(get: Get) -> str | None:
    mass = get("policy/support_mass")
    if mass.steps > FIRST and mass.now < 0.8 * mass.start:
        return (
            f"the student's mass on the support falls, {mass.start:.2f} to {mass.now:.2f}: nothing "
            "holds it there; set method.loss.head=tail_bucket, or rollout.top_p=0.9"
        )
    return None


def _looping(get: Get) -> str | None:
    cut, gap = get("completions/clipped_ratio"), get("distill/reverse_kl")
    if cut.steps > FIRST and cut.now > max(0.3, cut.start + 0.2) and gap.now < gap.start:
        return (
            f"responses no longer end, {cut.start:.0%} to {cut.now:.0%} are cut off, while the "
            "divergence falls: the student may have found loops that the teacher likes; add "
            "method.filter.kind=repetition_guard, or score=student_relative of teacher_quantile"
        )
    return None


def _repeating(get: Get) -> str | None:
    rate = get("completions/repetition_rate")
    if rate.steps > FIRST and rate.now > max(0.3, rate.start + 0.2):
        return (
            f"responses repeat themselves, {rate.start:.0%} to {rate.now:.0%} of their n-grams: "
            "lower optim.learning_rate, or set method.filter.kind=repetition_guard"
        )
    return None


def _foreign(get: Get) -> str | None:
    share = get("distill/foreign_fraction")
    if share.steps >= FIRST and share.now > 0.005:
        return (
            f"{share.now:.1%} of the tokens have |log p/q| above 10 in most places where they "
            "stand: one of the models would never write them, for another template or end; compare "
            "the prompts shown above, see completions/, or set method.filter.kind=special_tokens"
        )
    return None


def _drifting(get: Get) -> str | None:
    gap, own = get("sampler/logprob_gap"), get("distill/reverse_kl")
    if gap.steps >= FIRST and gap.now > max(0.1, 0.5 * abs(own.now)):
        return (
            f"sampler and trainer disagree by {gap.now:.2f} nats a token, as the models do: "
            "a filter of the sampler (rollout.top_p) or bfloat16; set method.loss.importance_cap"
        )
    return None


RULES: dict[str, Callable[[Get], str | None]] = {
    "incompatible": _incompatible,
    "unsure late": _unsure_late,
    "leaking": _leaking,
    "looping": _looping,
    "repeating": _repeating,
    "foreign": _foreign,
    "drifting": _drifting,
}
