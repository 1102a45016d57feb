"""The variance of the gradient against reward-to-go, in one dimension.

    two tasks -> a teacher each, by REINFORCE -> one student of both, for each gamma -> Var(g)

A walk s' = s + d, d ~ N(mu, sigma), of `STEPS` steps: from +2 to -3 in one task, from -2 to +3 in
the other. A policy is an MLP from (task, s, t / STEPS) to mu and sigma. The student draws 64 walks
of one task, of the other in the next iteration, and descends

    mean over walks of sum_t log p(d_t) R_t,   R_t = sum_{u >= t} gamma^(u - t) log p(d_u) / q(d_u)

with R fixed. Var(g) = (1/8) sum_m |g_m - mean g|^2 over the output layer's gradients of eight
micro-batches.

References: arXiv 2603.25562, its toy study. The paper gives tasks, sizes, gammas, iterations, seeds
and the variance; steps, reward, activation, the form of sigma and learning rates are ours.
"""

import dataclasses
import functools
import itertools
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float32
from rich.console import Console
from rich.table import Table

from fireopd_jax.bench.chart import line_chart
from fireopd_jax.bench.head import write_whole
from fireopd_jax.config import UserError
from fireopd_jax.method.losses.sampled_token import reward_to_go
from fireopd_jax.types import Array

STARTS, GOALS = (2.0, -2.0), (-3.0, 3.0)
STEPS, WIDTH = 20, 64
GAMMAS = (0.0, 0.25, 0.5, 0.75, 1.0)
SEEDS = (42, 43, 2026)
TEACHER_BATCH, BATCH, MICRO_BATCHES = 256, 64, 8
TEACHER_RATE, RATE = 3e-3, 1e-3
SMALLEST_SIGMA = 0.01

Policy = Any
"""Kernel and bias of each layer."""
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Walks:
    """B walks of T steps."""

    position: Float32[Array, "B T"]
    """Position before each step."""
    step: Float32[Array, "B T"]

    @property
    def reached(self) -> Array:
        """Position after each step."""
        return self.position + self.step


def init_policy(key: Array) -> Policy:
    """Return a random policy, the kernel of its last layer scaled by 0.1."""
    sizes = (3, WIDTH, WIDTH, 2)
    keys = jax.random.split(key, 3)
    kernels = [
        jax.random.normal(k, (i, o)) * i**-0.5
        for k, i, o in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]
    kernels[-1] *= 0.1
    return tuple((kernel, jnp.zeros(kernel.shape[1])) for kernel in kernels)


multiply = functools.partial(jnp.tensordot, axes=1, precision="highest")


def act(policy: Policy, task: Array, position: Array, t: Array) -> tuple[Array, Array]:
    """Return mu and sigma at positions of any shape; `task` is 0 or 1, t a step's index."""
    given = (task.astype(jnp.float32), t / STEPS)
    x = jnp.stack([position, *(jnp.broadcast_to(v, position.shape) for v in given)], axis=-1)
    for kernel, bias in policy[:-1]:
        x = jnp.tanh(multiply(x, kernel) + jnp.broadcast_to(bias, (*x.shape[:-1], WIDTH)))
    kernel, bias = policy[-1]
    out = multiply(x, kernel) + jnp.broadcast_to(bias, (*x.shape[:-1], 2))
    return out[..., 0], SMALLEST_SIGMA + jax.nn.softplus(out[..., 1] - 1.0)


def walk(policy: Policy, task: Array, key: Array, count: int) -> Walks:
    """Return `count` random walks of a policy in a task."""

    def step(position: Array, at: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        t, noise = at
        mu, sigma = act(policy, task, position, t)
        moved = mu + sigma * noise
        return position + moved, (position, moved)

    start = jnp.broadcast_to(jnp.asarray(STARTS)[task], (count,))
    noise = jax.random.normal(key, (STEPS, count))
    _, (position, moved) = jax.lax.scan(step, start, (jnp.arange(STEPS), noise))
    return Walks(position.T, moved.T)


def logprob(policy: Policy, task: Array, walks: Walks) -> Float32[Array, "B T"]:
    """Return log N(d; mu, sigma) of every step."""
    t = jnp.broadcast_to(jnp.arange(STEPS), walks.step.shape)
    mu, sigma = act(policy, task, walks.position, t)
    return -0.5 * ((walks.step - mu) / sigma) ** 2 - jnp.log(sigma) - 0.5 * np.log(2 * np.pi)


def train_teacher(key: Array, task: Array, iterations: int) -> Policy:
    """Return a teacher trained by REINFORCE.

    The reward is -|s' - goal|; its sum from each step on is normalised.
    """
    optimizer = optax.adam(TEACHER_RATE)

    def iteration(state, key):
        policy, opt_state = state
        walks = walk(policy, task, key, TEACHER_BATCH)
        reward = -jnp.abs(walks.reached - jnp.asarray(GOALS)[task])
        value = reward_to_go(reward, 1.0)
        value = value - value.mean(axis=0, keepdims=True)
        value = value / jnp.maximum(value.std(), 1e-6)

        def loss(policy: Policy) -> Array:
            return -(logprob(policy, task, walks) * value).sum(axis=1).mean()

        steps, opt_state = optimizer.update(jax.grad(loss)(policy), opt_state)
        return (optax.apply_updates(policy, steps), opt_state), None

    key, first = jax.random.split(key)
    policy = init_policy(first)
    keys = jax.random.split(key, iterations)
    (policy, _), _ = jax.lax.scan(iteration, (policy, optimizer.init(policy)), keys)
    return policy


def distil(key: Array, teachers: Policy, gamma: Array, iterations: int) -> tuple[Array, Policy]:
    """Return Var(g) of each iteration, and the student; `teachers` are stacked by task."""
    optimizer = optax.adam(RATE)

    def iteration(state, at):
        policy, opt_state = state
        count, key = at
        task = count % 2
        teacher = jax.tree.map(lambda leaf: leaf[task], teachers)
        walks = walk(policy, task, key, BATCH)
        ratio = logprob(policy, task, walks) - logprob(teacher, task, walks)
        value = reward_to_go(ratio, gamma)

        def loss(policy: Policy, position: Array, step: Array, value: Array) -> Array:
            return (logprob(policy, task, Walks(position, step)) * value).sum(axis=1).mean()

        parts = [x.reshape(MICRO_BATCHES, -1, STEPS) for x in (walks.position, walks.step, value)]
        each = jax.vmap(jax.grad(loss), (None, 0, 0, 0))(policy, *parts)
        steps, opt_state = optimizer.update(jax.tree.map(lambda g: g.mean(axis=0), each), opt_state)
        return (optax.apply_updates(policy, steps), opt_state), variance(each[-1])

    key, first = jax.random.split(key)
    policy = init_policy(first)
    counted = jnp.arange(iterations), jax.random.split(key, iterations)
    (policy, _), variances = jax.lax.scan(iteration, (policy, optimizer.init(policy)), counted)
    return variances, policy


def variance(gradients: tuple[Array, Array]) -> Array:
    """Return (1/M) sum_m |g_m - mean g|^2 of a layer's gradients, stacked by micro-batch."""
    squares = [jnp.square(g - g.mean(axis=0, keepdims=True)).sum() for g in gradients]
    return (squares[0] + squares[1]) / MICRO_BATCHES


def end_error(key: Array, policy: Policy) -> Float32[Array, "2"]:
    """Return the mean distance from the goal after the last step, by task."""

    def of_task(task: Array) -> Array:
        walks = walk(policy, task, jax.random.fold_in(key, task), 512)
        return jnp.abs(walks.reached[:, -1] - jnp.asarray(GOALS)[task]).mean()

    return jax.vmap(of_task)(jnp.arange(2))


@functools.partial(jax.jit, static_argnums=(1, 2))
def study(keys: Array, iterations: int, teacher_iterations: int) -> tuple[Array, Array, Array]:
    """Return Var(g) [seeds, gammas, iterations], errors of students and of teachers at the end."""

    def of_seed(key: Array):
        for_teachers, for_student, for_end = jax.random.split(key, 3)
        both = jax.random.split(for_teachers), jnp.arange(2)
        teachers = jax.lax.map(
            lambda each: train_teacher(each[0], each[1], teacher_iterations), both
        )

        def of_gamma(gamma: Array) -> tuple[Array, Array]:
            variances, student = distil(for_student, teachers, gamma, iterations)
            return variances, end_error(for_end, student)

        own = jax.vmap(end_error, (None, 0))(for_end, teachers)
        return *jax.vmap(of_gamma)(jnp.asarray(GAMMAS)), jnp.diagonal(own)

    # `lax.map`, not `vmap`: one seed at a time stays in a CPU's cache.
    return jax.lax.map(of_seed, keys)


def read_seeds(text: str) -> tuple[int, ...]:
    """Return the seeds of a text such as `42,43`; raise UserError for other texts."""
    try:
        return tuple(int(seed) for seed in text.split(","))
    except ValueError:
        raise UserError(f"--seeds: expected whole numbers such as 42,43, got {text!r}") from None


def bench_toy(
    iterations: int = 2000,
    seeds: tuple[int, ...] = SEEDS,
    figure: Path | None = None,
    file: Path | None = None,
    teacher_iterations: int | None = None,
) -> Row:
    """Run the study, print its table, write figure and JSON; return the contents of the JSON.

    Teachers train for 1.5 times as many iterations as the student, unless `teacher_iterations` is
    given. Raises UserError for fewer than 4 iterations.
    """
    if iterations < 4:
        raise UserError(f"--iterations: expected at least 4, got {iterations}")
    learning = teacher_iterations or iterations * 3 // 2
    start = time.perf_counter()
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    variances, errors, of_teachers = jax.tree.map(np.asarray, study(keys, iterations, learning))
    result: Row = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "iterations": iterations,
        "teacher_iterations": learning,
        "seconds": time.perf_counter() - start,
        "gammas": list(GAMMAS),
        "rows": [
            {
                "seed": seed,
                # The last quarter: 500 of 2000.
                "late_variance": np.median(curves[:, -(iterations // 4) :], axis=1).tolist(),
                "end_error": error.tolist(),
                "teacher_end_error": own.tolist(),
            }
            for seed, curves, error, own in zip(seeds, variances, errors, of_teachers, strict=True)
        ],
    }
    if file is not None:
        write_whole(file, json.dumps(result, indent=2) + "\n")
    if figure is not None:
        write_whole(figure, draw(variances))
    print_table(result)
    return result


def draw(variances: Array, points: int = 100) -> str:
    """Return the SVG of Var(g), one line per gamma: medians over seeds and pieces of iterations."""
    iterations = variances.shape[-1]
    ends = np.linspace(0, iterations, min(points, iterations) + 1).astype(int)
    lines = {}
    for i, gamma in enumerate(GAMMAS):
        pieces = [variances[:, i, a:b] for a, b in itertools.pairwise(ends)]
        lines[f"γ = {gamma:g}"] = [
            ((a + b) / 2, float(np.median(piece)))
            for a, b, piece in zip(ends[:-1], ends[1:], pieces, strict=True)
        ]
    return line_chart(
        lines,
        title="Variance of the student's gradient, by the discount of the rewards that follow",
        x_label="iteration",
        y_label="Var(g) of the output layer",
    )


def print_table(result: Row) -> None:
    """Print the late variances and the final errors."""
    table = Table(
        title=f"Late Var(g), and mean |s - goal| after the last step (left / right task); "
        f"{result['iterations']} iterations, {result['device']}, {result['seconds']:.0f} s"
    )
    table.add_column("seed", justify="right")
    for gamma in result["gammas"]:
        table.add_column(f"γ = {gamma:g}", justify="right")
    table.add_column("teachers", justify="right")
    for row in result["rows"]:
        table.add_row(str(row["seed"]), *(f"{v:.2e}" for v in row["late_variance"]), "")
        errors = [*row["end_error"], row["teacher_end_error"]]
        table.add_row("", *(f"{left:.3f} / {right:.3f}" for left, right in errors))
    # A pipe has no width; do not truncate the numbers.
    Console(width=max(Console().width, 120)).print(table)
