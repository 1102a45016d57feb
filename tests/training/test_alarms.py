"""Each alarm fires once, on its own course of metrics, and names the option to set."""

import pytest

from fireopd_jax.training.alarms import FIRST, RULES, Alarms

CALM = {
    "distill/overlap_ratio": 0.9,
    "distill/student_entropy_quarter_1": 1.0,
    "distill/student_entropy_quarter_4": 1.0,
    "policy/support_mass": 0.9,
    "completions/clipped_ratio": 0.05,
    "distill/reverse_kl": 0.5,
    "completions/repetition_rate": 0.02,
    "distill/foreign_fraction": 0.0,
    "sampler/logprob_gap": 0.01,
    "audit/base_kl": 0.01,
    "refine/length_ratio": 0.9,
    "refine/cut_fraction": 0.05,
    "refine/nll": 0.6,
    "refine/nll_original": 0.5,
    "completions/mean_length": 100.0,
    "distill/log_ratio_max": 3.0,
    "num_tokens": 6400.0,
    "loss_tokens": 6400.0,
    "grad_norm": 0.3,
    "student_entropy": 0.5,
    "teacher_entropy": 0.4,
}
COURSES = {
    "incompatible": ({"distill/overlap_ratio": (0.5, 0.5)}, "template"),
    "unsure late": ({"distill/student_entropy_quarter_4": (1.0, 3.0)}, "rollout.max_tokens"),
    "leaking": ({"policy/support_mass": (0.9, 0.5)}, "method.loss.head=tail_bucket"),
    "looping": (
        {"completions/clipped_ratio": (0.05, 0.8), "distill/reverse_kl": (0.5, 0.2)},
        "repetition_guard",
    ),
    "always cut": ({"completions/clipped_ratio": (1.0, 1.0)}, "rollout.max_tokens"),
    "collapsing": ({"completions/mean_length": (100.0, 3.0)}, "completions/"),
    "leaving": (
        {"completions/mean_length": (100.0, 45.0), "distill/reverse_kl": (0.5, 1.2)},
        "student.sft",
    ),
    "empty": ({"completions/mean_length": (1.0, 1.0)}, "student.chat_template"),
    "equal": (
        {"distill/reverse_kl": (0.0, 0.0), "distill/log_ratio_max": (0.0, 0.0)},
        "teacher.path",
    ),
    "still": ({"grad_norm": (0.0, 0.0)}, "method.loss"),
    "certain": ({"student_entropy": (0.5, 0.01)}, "optim.learning_rate"),
    "repeating": ({"completions/repetition_rate": (0.02, 0.7)}, "repetition_guard"),
    "foreign": ({"distill/foreign_fraction": (0.05, 0.05)}, "special_tokens"),
    "drifting": ({"sampler/logprob_gap": (0.4, 0.4)}, "importance_cap"),
    "unanchored": ({"audit/base_kl": (0.0, 0.2)}, "method.loss.beta"),
    "shortening": ({"refine/length_ratio": (0.9, 0.1)}, "min_length_ratio"),
    "cut": ({"refine/cut_fraction": (0.1, 0.9)}, "rollout.max_tokens"),
    "far": ({"refine/nll": (0.6, 4.5)}, "method.refine.fraction"),
}


def run(changes, steps=120):
    alarms, lines = Alarms(), []
    for step in range(steps):
        share = min(1.0, step / 60)
        values = CALM | {k: a + share * (b - a) for k, (a, b) in changes.items()}
        lines += [alarm.text for alarm in alarms.check(values)]
    return lines


def test_a_calm_run_is_silent():
    assert run({}) == []
    assert run({"distill/overlap_ratio": (0.5, 0.9)}) == []
    assert run({"completions/clipped_ratio": (0.05, 0.8), "distill/reverse_kl": (0.5, 0.9)}) == []


@pytest.mark.parametrize("name", RULES)
def test_each_rule_rings_once_and_names_what_to_do(name):
    changes, remedy = COURSES[name]
    (line,) = run(changes)
    assert remedy in line


@pytest.mark.parametrize(
    "changes",
    [
        # Short of always; a student that learns to end; one that was cut at first and gets terse.
        {"completions/clipped_ratio": (0.9, 0.9)},
        {"completions/clipped_ratio": (1.0, 0.1), "completions/mean_length": (500.0, 30.0)},
        {"completions/mean_length": (100.0, 45.0)},
        {"completions/mean_length": (100.0, 45.0), "distill/reverse_kl": (0.5, 0.2)},
        # Answers of one letter, cut by their limit of one token.
        {"completions/mean_length": (2.0, 2.0)},
        # A converged student, and one whose entropy falls with a teacher that has none.
        {"distill/reverse_kl": (0.0, 0.0), "distill/log_ratio_max": (0.2, 0.2)},
        {"student_entropy": (0.9, 0.02), "teacher_entropy": (0.02, 0.02)},
        {"grad_norm": (1e-6, 1e-6)},
    ],
)
def test_what_is_healthy_rings_nothing(changes):
    assert [line for line in run(changes) if "length limit" not in line] == []


def test_a_student_that_was_cut_and_learns_to_end_is_told_only_of_the_first():
    (line,) = run({"completions/clipped_ratio": (1.0, 0.0)})
    assert "from the first steps on" in line


def test_short_runs_are_long_enough():
    """Twenty steps tell what is wrong from the start, and a collapse in the second half."""
    assert "rollout.max_tokens" in run({"completions/clipped_ratio": (1.0, 1.0)}, steps=5)[0]
    assert "same model" in run(COURSES["equal"][0], steps=2)[0]
    alarms = Alarms()
    lengths = [100.0] * 10 + [2.0] * 10
    lines = [x.text for n in lengths for x in alarms.check(CALM | {"completions/mean_length": n})]
    assert len(lines) == 1 and "100 to 2 tokens" in lines[0]


def test_five_steps_without_a_cold_start_are_enough():
    """A student that answers in prose, by adapters at a learning rate of 1e-3."""
    alarms, lines = Alarms(), []
    for length, gap in ((37, 0.6), (29, 0.7), (20, 0.9), (13, 1.1), (9, 1.2)):
        values = {"completions/mean_length": float(length), "distill/reverse_kl": gap}
        lines += [alarm.text for alarm in alarms.check(CALM | values)]
    assert len(lines) == 1 and "37 to 9 tokens" in lines[0] and "0.60 to 1.20 nats" in lines[0]


def test_one_short_step_is_no_departure():
    alarms = Alarms()
    courses = [(100.0, 0.5)] * 6 + [(30.0, 1.5)] + [(100.0, 0.5)] * 6
    for length, gap in courses:
        values = {"completions/mean_length": length, "distill/reverse_kl": gap}
        assert list(alarms.check(CALM | values)) == []


def test_one_step_of_a_collapse_is_none():
    alarms = Alarms()
    lengths = [100.0] * 12 + [2.0] + [100.0] * 12
    assert [x for n in lengths for x in alarms.check(CALM | {"completions/mean_length": n})] == []


def test_without_a_token_nothing_is_equal():
    alarms = Alarms()
    none = {"distill/reverse_kl": 0.0, "distill/log_ratio_max": 0.0, "num_tokens": 0.0}
    assert [line for _ in range(20) for line in alarms.check(none)] == []


def test_what_is_missing_or_not_finite_tells_nothing():
    alarms = Alarms()
    for _ in range(3 * FIRST):
        assert list(alarms.check({"policy/support_mass": float("nan")})) == []
        assert list(alarms.check({})) == []
