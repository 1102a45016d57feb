"""Warnings about known failures of on-policy distillation, from the metrics, with likely causes.

    {metric: value} of a step -> alarms, each rule once

A rule compares a moving mean with the mean over the first steps of the process, or judges these
first steps themselves; a resumed run starts afresh. References: arXiv 2603.25562, 2604.13016;
2605.11182 and 2604.08527 for collapses.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

FIRST = 10
"""Number of first steps whose mean is the reference value."""
EARLY = 5
"""Number of steps after which what is wrong from the start is reported: short runs have few."""
DECAY = 0.9
"""Decay of the moving means."""
PATIENCE = 50
"""Steps within which the overlap of the models' top-K should rise."""


@dataclasses.dataclass
class Course:
    """Running statistics of one metric."""

    steps: int = 0
    start: float = 0.0
    """Mean over the first steps."""
    now: float = 0.0
    """Exponential moving mean."""
    first: float = 0.0
    """Value of the first step."""
    last: float = 0.0
    """Value of the newest step."""
    previous: float = 0.0
    """Value of the step before it."""

    def add(self, value: float | int) -> None:
        """Add the value of a step; values that are not finite are ignored."""
        if not math.isfinite(value):
            return
        self.first = self.first if self.steps else value
        self.steps, self.last, self.previous = self.steps + 1, value, self.last
        if self.steps <= FIRST:
            self.start += (value - self.start) / self.steps
        self.now = value if self.steps == 1 else DECAY * self.now + (1 - DECAY) * value


@dataclasses.dataclass(frozen=True)
class Alarm:
    """A rule that has fired."""

    rule: str
    metrics: tuple[str, ...]
    """Metrics that the rule looks at."""
    text: str
    """Values, likely cause, and what to do."""


class Alarms:
    """Running statistics of the metrics, and the rules that have fired."""

    def __init__(self) -> None:
        self.courses: dict[str, Course] = {}
        self.fired: set[str] = set()

    def check(self, values: Mapping[str, float | int]) -> Iterator[Alarm]:
        """Add a step's metrics, and yield each rule that fires for the first time."""
        for name, value in values.items():
            self.courses.setdefault(name, Course()).add(value)
        for name, rule in RULES.items():
            seen: list[str] = []

            def get(metric: str, seen: list[str] = seen) -> Course:
                seen.append(metric)
                return self._get(metric)

            if name not in self.fired and (line := rule(get)):
                self.fired.add(name)
                yield Alarm(name, tuple(dict.fromkeys(seen)), line)

    def _get(self, name: str) -> Course:
        """Return the statistics of a metric; an absent metric has no steps."""
        return self.courses.get(name, Course())


Get = Callable[[str], Course]


def _incompatible(get: Get) -> str | None:
    overlap = get("distill/overlap_ratio")
    if overlap.steps > PATIENCE and overlap.now < 0.8 and overlap.now < overlap.start + 0.02:
        return (
            f"distill/overlap_ratio is {overlap.now:.2f} and does not rise: the top-K tokens of "
            "teacher and student differ; compare their templates, use a teacher of the student's "
            "model family, or train the student on the teacher's responses first (student.sft)"
        )
    return None


def _unsure_late(get: Get) -> str | None:
    late, early = (get(f"distill/student_entropy_quarter_{i}") for i in (4, 1))
    if late.steps > FIRST and late.now > 1.5 * late.start + 0.1 and early.now < 1.2 * early.start:
        return (
            f"the student's entropy in the last quarter rises, {late.start:.2f} to {late.now:.2f} "
            "nats: late tokens degrade first; reduce rollout.max_tokens, or cut them with "
            "method.filter.kind=prefix"
        )
    return None


def _leaking(get: Get) -> str | None:
    mass = get("policy/support_mass")
    if mass.steps > FIRST and mass.now < 0.8 * mass.start:
        return (
            f"the student's mass on the support falls, {mass.start:.2f} to {mass.now:.2f}: the "
            "loss does not constrain it; set method.loss.head=tail_bucket, or rollout.top_p=0.9"
        )
    return None


def _looping(get: Get) -> str | None:
    cut, gap = get("completions/clipped_ratio"), get("distill/reverse_kl")
    if cut.steps > FIRST and cut.now > max(0.3, cut.start + 0.2) and gap.now < gap.start:
        return (
            f"more responses reach the length limit, {cut.start:.0%} to {cut.now:.0%}, while the "
            "divergence falls: the student may repeat text that the teacher finds likely; set "
            "method.filter.kind=repetition_guard, or score=student_relative of teacher_quantile"
        )
    return None


def _always_cut(get: Get) -> str | None:
    cut = get("completions/clipped_ratio")
    if cut.steps >= EARLY and min(cut.start, cut.now) > 0.95:
        return (
            f"{cut.start:.0%} of the responses reach the length limit from the first steps on, so "
            "the student never learns to end: raise rollout.max_tokens; where the texts in "
            "completions/ look finished, compare their ends with the stop tokens logged above, and "
            "the chat templates of student and teacher"
        )
    return None


def _collapsing(get: Get) -> str | None:
    length, cut = get("completions/mean_length"), get("completions/clipped_ratio")
    # A student that ran into the limit and learns to end becomes shorter, as it should.
    if length.steps <= FIRST or cut.start > 0.5:
        return None
    if length.now < 0.4 * length.start and length.last < 0.25 * length.start:
        return (
            f"responses collapse in length, {length.start:.0f} to {length.last:.0f} tokens: read "
            "completions/; lower optim.learning_rate, and where the teacher is terse, give each "
            "token the same weight with method.aggregate=token"
        )
    return None


def _leaving(get: Get) -> str | None:
    names = "completions/mean_length", "completions/clipped_ratio", "distill/reverse_kl"
    length, cut, gap = (get(name) for name in names)
    if length.steps < EARLY or cut.start > 0.5:
        return None
    shorter = max(length.last, length.previous) < 0.5 * length.first
    if shorter and min(gap.last, gap.previous) > 1.5 * gap.first > 0:
        return (
            f"responses shrink, {length.first:.0f} to {length.last:.0f} tokens, while the "
            f"divergence of a token grows, {gap.first:.2f} to {gap.last:.2f} nats: the student "
            "leaves what it could write and does not come nearer to the teacher; train it first "
            "on responses of the task (student.sft), or lower optim.learning_rate"
        )
    return None


def _empty(get: Get) -> str | None:
    length, cut = get("completions/mean_length"), get("completions/clipped_ratio")
    if length.steps >= EARLY and length.start < 1.5 and length.now < 1.5 and cut.now < 0.5:
        return (
            "the responses are empty: the student ends with its first token; compare the end of "
            "the prompt logged above with its chat template (student.chat_template, "
            "student.chat_template_kwargs)"
        )
    return None


def _equal(get: Get) -> str | None:
    gap, peak, tokens = (
        get(name) for name in ("distill/reverse_kl", "distill/log_ratio_max", "num_tokens")
    )
    if tokens.start > 0 and gap.steps >= 2 and max(abs(gap.start), peak.start / 100) < 1e-5:
        return (
            "teacher and student give every token the same probability from the start: they are "
            "the same model, so there is nothing to learn; compare student.path and teacher.path"
        )
    return None


def _still(get: Get) -> str | None:
    norm, tokens, gap = get("grad_norm"), get("loss_tokens"), get("distill/reverse_kl")
    if norm.steps >= EARLY and norm.start == norm.now == 0 and tokens.start > 0:
        if _equal(get):  # which says why
            return None
        return (
            f"the gradient of the loss is exactly 0 since the first step (divergence {gap.now:.3g})"
            ": no update changes the student; see method.loss and method.reweight"
        )
    return None


def _certain(get: Get) -> str | None:
    own, other = get("student_entropy"), get("teacher_entropy")
    if own.steps > FIRST and other.now > 0.1 and own.now < 0.3 * min(own.start, other.now):
        return (
            f"the student's entropy collapses, {own.start:.2f} to {own.now:.2f} nats, where the "
            f"teacher's is {other.now:.2f}: lower optim.learning_rate, or use a divergence that "
            "covers the teacher's mass (method/gkd)"
        )
    return None


def _repeating(get: Get) -> str | None:
    rate = get("completions/repetition_rate")
    if rate.steps > FIRST and rate.now > max(0.3, rate.start + 0.2):
        return (
            f"repetition rises, {rate.start:.0%} to {rate.now:.0%} of the responses' n-grams: "
            "lower optim.learning_rate, or set method.filter.kind=repetition_guard"
        )
    return None


def _foreign(get: Get) -> str | None:
    share = get("distill/foreign_fraction")
    if share.steps >= FIRST and share.now > 0.005:
        return (
            f"{share.now:.1%} of the tokens have a token id whose median |log p/q| is above 10: "
            "one model almost never produces it, as of another template or EOS; compare the "
            "prompts logged above, see completions/, or set method.filter.kind=special_tokens"
        )
    return None


def _drifting(get: Get) -> str | None:
    gap, own = get("sampler/logprob_gap"), get("distill/reverse_kl")
    if gap.steps >= FIRST and gap.now > max(0.1, 0.5 * abs(own.now)):
        return (
            f"log-probs of sampler and scorer differ by {gap.now:.2f} nats per token, which is not "
            "small against the KL: due to rollout.top_p or another filter, or to bfloat16; set "
            "method.loss.importance_cap"
        )
    return None


def _unanchored(get: Get) -> str | None:
    kl = get("audit/base_kl")
    if kl.steps >= FIRST and kl.now > 0.05:
        return (
            f"KL(base || student) on unaudited tokens is {kl.now:.3f} nats: the student leaves its "
            "start, where runs without an anchor collapse; raise method.loss.beta, or lower "
            "optim.learning_rate"
        )
    return None


def _shortening(get: Get) -> str | None:
    ratio = get("refine/length_ratio")
    if ratio.steps >= FIRST and ratio.now < 0.25:
        return (
            f"rewrites have {ratio.now:.0%} of the length of the responses that they replace: all "
            "parameters trained on much shorter texts lose long reasoning; train adapters "
            "(student.lora) at a small optim.learning_rate, set method.refine.min_length_ratio, or "
            "ask for full detail in method.refine.prompt"
        )
    return None


def _cut(get: Get) -> str | None:
    cut = get("refine/cut_fraction")
    if cut.steps >= FIRST and cut.now > 0.5:
        return (
            f"{cut.now:.0%} of the rewrites reach their limit and are dropped; raise "
            "rollout.max_tokens (method.refine.max_tokens), or use a stronger teacher"
        )
    return None


def _far(get: Get) -> str | None:
    new, own = get("refine/nll"), get("refine/nll_original")
    if new.steps >= FIRST and new.now > 1.5 * own.now + 0.5:
        return (
            f"rewrites are far from the student's policy: {new.now:.2f} nats per token, its own "
            f"responses {own.now:.2f}; the rewriter may be too weak: read completions/, or mix "
            "with method.refine.fraction"
        )
    return None


RULES: dict[str, Callable[[Get], str | None]] = {
    "incompatible": _incompatible,
    "unsure late": _unsure_late,
    "leaking": _leaking,
    "looping": _looping,
    "always cut": _always_cut,
    "collapsing": _collapsing,
    "leaving": _leaving,
    "empty": _empty,
    "equal": _equal,
    "still": _still,
    "certain": _certain,
    "repeating": _repeating,
    "foreign": _foreign,
    "drifting": _drifting,
    "unanchored": _unanchored,
    "shortening": _shortening,
    "cut": _cut,
    "far": _far,
}
