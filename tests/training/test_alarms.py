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
}
COURSES = {
    "incompatible": ({"distill/overlap_ratio": (0.5, 0.5)}, "template"),
    "unsure late": ({"distill/student_entropy_quarter_4": (1.0, 3.0)}, "rollout.max_tokens"),
    "leaking": ({"policy/support_mass": (0.9, 0.5)}, "method.loss.head=tail_bucket"),
    "looping": (
        {"completions/clipped_ratio": (0.05, 0.8), "distill/reverse_kl": (0.5, 0.2)},
        "repetition_guard",
    ),
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
        lines += alarms.check(values)
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


def test_what_is_missing_or_not_finite_tells_nothing():
    alarms = Alarms()
    for _ in range(3 * FIRST):
        assert list(alarms.check({"policy/support_mass": float("nan")})) == []
        assert list(alarms.check({})) == []
