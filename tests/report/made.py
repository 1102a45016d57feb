"""Run folders made by hand: no model is trained, every number is known."""

import dataclasses
import json

import numpy as np

from fireopd_jax.data.sources import Row
from fireopd_jax.evaluation.evaluator import EvalResult
from fireopd_jax.evaluation.responses import Graded, write_responses
from fireopd_jax.method.batch import init_states, stage_context
from fireopd_jax.recipe.schema import as_tree, load_config
from fireopd_jax.runs.completions import Texts, on_host, write_completions
from fireopd_jax.runs.tracking import Tracker, record_alarm
from fireopd_jax.runtime.yaml_core import dump
from fireopd_jax.types import Support
from tests import cases

HOSTILE = "</script><img src=x onerror=alert(1)><!-- \ud800 & ]]> \x00"
"""A text that would end the script, load a picture and is no valid Unicode."""
PIECES = ["the", " answer", " is", "\n", "4", "2", "</script>", "<b>", "é", ""]


def make_run(folder, *settings, steps=6, every=3, rows=24, tokens=16, words=0, seed=0, prompt=""):
    """Write a run of so many steps, with trajectories every so many; return its folder."""
    folder.mkdir(parents=True)
    config = load_config(["smoke", f"run.steps={max(steps, 1)}", *settings])
    (folder / "config.yaml").write_text(dump(as_tree(config)))
    command = ["fireopd", "train", "configs/smoke.yaml", f"run.steps={steps}"]
    environment = {"command": command, "devices": ["cpu:0"], "packages": {"fireopd-jax": "0.1.0"}}
    (folder / "env.json").write_text(json.dumps(environment))
    (folder / "memory.json").write_text(json.dumps({"rollout": 2**30, "device": 2**34}))
    rng = np.random.default_rng(seed)
    with Tracker(folder) as tracker:
        for step in range(1, steps + 1):
            values = {"loss": 1 / step, "distill/reverse_kl": 0.5 / step, "num_tokens": 100.0}
            values |= {"grad_norm": float("nan") if step == 2 else 1.0, "timing_s/step": 0.5}
            values |= {"timing_s/rollout": 0.25, "timing_s/score": 0.125, "timing_s/update": 0.0625}
            tracker.log(step, values)
    for step in range(every, steps + 1, every):
        file = folder / "completions" / f"step_{step:06d}.parquet"
        save_step(file, config.method, rows, tokens, words, int(rng.integers(1000)), prompt)
    if steps:
        evaluate(folder, "student_before", 0.25)
        evaluate(folder, "teacher_default", 0.875)
        evaluate(folder, "student_after", 0.625)
        for step in (0, steps):
            evaluate(folder, f"student_step_{step:06d}", 0.25 + 0.375 * bool(step), figures=False)
        alarm = {"step": 2, "rule": "still", "metrics": ["grad_norm"], "text": "the gradient is 0"}
        record_alarm(folder, alarm)
        figures = {
            key: json.loads((folder / "eval" / f"{label}.json").read_text())
            for key, label in {
                "teacher": "teacher_default",
                "student_before": "student_before",
                "student_after": "student_after",
            }.items()
        }
        summary = {**figures, "controls": {}, "steps": steps, "seconds": 12.5}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def make_case(rows, tokens, words, seed):
    """Return scores and rollout of random rows of two teachers; row 1 has no token."""
    scores, mask, teacher = cases.random_case(seed, rows, tokens)
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, len(PIECES), mask.shape).astype(np.int32)
    rollout = dataclasses.replace(cases.make_rollout(mask, teacher), tokens=ids)
    if words:
        every = np.broadcast_to(np.arange(len(PIECES)), (*mask.shape, len(PIECES)))
        likely = rng.permuted(every, axis=-1)
        logprob = np.log(rng.dirichlet(np.ones(words + 1), mask.shape)[..., :words])
        support = Support(likely[..., :words].astype(np.int32), logprob.astype(np.float32))
        scores = dataclasses.replace(scores, support=support)
    return scores, rollout


def save_step(file, method, rows=24, tokens=16, words=0, seed=0, prompt=""):
    """Write the trajectories of a step, filtered and weighted by a method; return its batch."""
    scores, rollout = make_case(rows, tokens, words, seed)
    filter, reweight = method.filter, method.reweight
    context = stage_context(rollout, 2)
    states = init_states(filter, reweight, rows)
    keep, _ = filter(scores, context, states.filter)
    batch, _ = cases.assembled(rollout, scores, filter, reweight, method.aggregate, 2)
    batch, keep = on_host(batch), np.asarray(keep)
    questions = [
        Row(({"role": "user", "content": f"{prompt}{i}"},), answer, None, None, f"rows:{i}")
        for i, answer in enumerate(answers_of(rollout))
    ]
    texts = Texts(
        questions, ("a", "b"), lambda ids: "".join(PIECES[i] for i in ids),
        lambda ids: [PIECES[i] for i in ids], lambda row: "exact",
    )  # fmt: skip
    judged = filter.judged(batch.scores, context, keep, states.filter)
    measured = reweight.measured(batch.scores, context, keep)
    write_completions(file, batch, keep, texts, judged=judged, measured=measured)
    return batch, keep


def answers_of(rollout):
    """Yield the answer of each row: the response of every other row is right."""
    for i, (ids, real) in enumerate(zip(rollout.tokens, np.asarray(rollout.mask), strict=True)):
        response = "".join(PIECES[token] for token in ids[real])
        yield response.strip() or "none" if i % 2 else "another"


def evaluate(folder, label, share, problems=8, samples=2, figures=True, text="it is ", distinct=8):
    """Write graded responses, of which the first share of the problems is right.

    The problems from number `distinct` on are the first ones again.
    """
    graded = [
        Graded(
            row=i, response=f"{text}{i}", answer=str(i % distinct), sample=k,
            correct=i < share * problems,
            final=str(i), rule="exact", plain=None, tokens=5, finished=True, set="held_out",
            question=f"q{i % distinct}", origin=f"rows:{i}", prompt=f"problem {i}",
        )
        for i in range(problems)
        for k in range(samples)
    ]  # fmt: skip
    write_responses(folder / "eval" / f"{label}.jsonl", graded)
    if figures:
        summary = EvalResult.of(graded, samples).summary()
        (folder / "eval" / f"{label}.json").write_text(json.dumps(summary))
