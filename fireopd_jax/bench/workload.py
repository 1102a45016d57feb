"""Workloads of the rollout benchmark: models with random weights, requests, contestants.

"ragged" has responses of very different lengths, as in training: log-normal, median 40 or 100.
"equal" has one batch of equal lengths. Lengths are forced, by limits and no stop token, so that all
contestants do the same work.
"""

import dataclasses
import random
import statistics
import time
from collections.abc import Callable

import numpy as np

from fireopd_jax.models.architecture import DecoderConfig
from fireopd_jax.rollout.requests import Knobs, Request

VOCABULARY = 8192
SMALL = DecoderConfig(
    vocab_size=VOCABULARY,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    intermediate_size=768,
    rope_theta=1e6,
)
QWEN3_0_6B = dataclasses.replace(
    SMALL,
    vocab_size=151936,
    hidden_size=1024,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=3072,
    dtype="bfloat16",
    param_dtype="bfloat16",
)
QWEN3_1_7B = dataclasses.replace(QWEN3_0_6B, hidden_size=2048, intermediate_size=6144)
MODELS = {"small": SMALL, "qwen3-0.6b": QWEN3_0_6B, "qwen3-1.7b": QWEN3_1_7B}


@dataclasses.dataclass(frozen=True)
class Workload:
    """Right-padded prompts and the length of each response."""

    name: str
    prompt: np.ndarray
    length: np.ndarray
    response: np.ndarray

    @property
    def tokens(self) -> int:
        """Number of response tokens."""
        return int(self.response.sum())

    @property
    def room(self) -> int:
        """Length of the longest response."""
        return int(self.response.max())

    def first(self, rows: int) -> "Workload":
        """Return the workload of the first `rows` rows."""
        return Workload(self.name, self.prompt[:rows], self.length[:rows], self.response[:rows])

    def requests(self) -> list[Request]:
        """Return the workload as requests to an engine."""
        return [
            Request(i, self.prompt[i, : self.length[i]], Knobs(max_tokens=int(self.response[i])))
            for i in range(len(self.length))
        ]


@dataclasses.dataclass
class Contestant:
    """One way to run a workload, and its CPU and wall-clock seconds by round."""

    name: str
    tokens: int
    run: Callable[[], float | None]
    """Returns the CPU seconds if another process does the work."""
    cpu: list[float] = dataclasses.field(default_factory=list)
    wall: list[float] = dataclasses.field(default_factory=list)

    def rate(self, clock: str) -> float:
        """Return tokens per second of `clock` ("cpu" or "wall"), at the median round."""
        return self.tokens / statistics.median(getattr(self, clock))


def ragged(
    rows: int = 64, width: int = 64, room: int = 256, median: int = 40, seed: int = 0
) -> Workload:
    """Return prompts of `width` / 8 to `width` tokens with log-normal response lengths."""
    rng = np.random.default_rng(seed)
    length = rng.integers(width // 8, width + 1, rows).astype(np.int32)
    prompt = rng.integers(0, VOCABULARY, (rows, width)).astype(np.int32)
    response = np.round(np.exp(rng.normal(np.log(median), 0.9, rows))).clip(1, room)
    return Workload("ragged", prompt, length, response.astype(np.int32))


def equal(rows: int = 8, width: int = 32, room: int = 128) -> Workload:
    """Return one batch that differs in nothing but its tokens."""
    prompt = np.random.default_rng(0).integers(0, VOCABULARY, (rows, width)).astype(np.int32)
    return Workload("equal", prompt, np.full(rows, width, np.int32), np.full(rows, room, np.int32))


def to_fill(work: Workload, fill: float) -> Workload:
    """Return the workload with shorter or longer rows: `fill` of its padded tokens are real.

    All lengths are multiplied by one factor, up to the width of the prompts and the longest
    response; the longest row is of that length, so that padded rows remain as wide.
    """
    width, room = work.prompt.shape[1], work.room

    def scaled(factor: float) -> tuple[np.ndarray, np.ndarray]:
        length, response = (
            np.round(factor * each).clip(1, most).astype(np.int32)
            for each, most in ((work.length, width), (work.response, room))
        )
        longest = work.response.argmax()
        length[longest], response[longest] = width, room
        return length, response

    least, most = 0.0, float(max(width, room))
    for _ in range(50):
        factor = (least + most) / 2
        real = sum(int(each.sum()) for each in scaled(factor))
        few = real < fill * len(work.length) * (width + room)
        least, most = (factor, most) if few else (least, factor)
    length, response = scaled(most)
    return Workload(work.name, work.prompt, length, response)


def workloads(name: str, slots: int) -> list[Workload]:
    """Return the workloads of a model; a large one has four requests per slot."""
    if name == "small":
        return [ragged(), equal()]
    return [ragged(rows=4 * slots, width=256, room=512, median=100)]


def measure(contestants: list[Contestant], rounds: int) -> None:
    """Run every contestant once unmeasured, then `rounds` times, in shuffled order."""
    order = random.Random(0)
    for contestant in contestants:
        contestant.run()
    for _ in range(rounds):
        for contestant in order.sample(contestants, len(contestants)):
            start, clock = time.process_time(), time.perf_counter()
            elsewhere = contestant.run()
            here = time.process_time() - start
            contestant.cpu.append(here if elsewhere is None else elsewhere)
            contestant.wall.append(time.perf_counter() - clock)
