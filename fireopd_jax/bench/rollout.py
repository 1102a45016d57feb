"""Useful tokens a CPU second: the engine, our own static batch, and Hugging Face `generate`.

    one random model, one list of requests -> every contestant -> interleaved rounds -> medians

"ragged" has responses of very different lengths, as training has: log-normal, median 40. "equal"
has one batch of equal ones. Lengths are forced, by limits and no stop token, so that all do the
same work. CPU seconds are those of the whole process, all threads, prefill included, compiling not.
"""

import dataclasses
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from fireopd_jax.bench.head import write_whole
from fireopd_jax.config import UserError
from fireopd_jax.models.architecture import DecoderConfig
from fireopd_jax.models.hf_config import hf_config_json
from fireopd_jax.models.hf_names import hf_tensors
from fireopd_jax.models.language_model import LanguageModel, Params
from fireopd_jax.rollout.engine import generate
from fireopd_jax.rollout.requests import Knobs, Request
from fireopd_jax.rollout.sampling import Sampling
from fireopd_jax.rollout.serving import Engine, Statistics
from fireopd_jax.types import Prompts

MODEL = DecoderConfig(
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    intermediate_size=768,
    rope_theta=1e6,
)
VOCABULARY = 8192
HF_THREADS, HF_BATCHES = (1, 2), (16, 64)

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Workload:
    """Prompts, right-padded, and the length that each response will have."""

    name: str
    prompt: np.ndarray
    length: np.ndarray
    response: np.ndarray

    @property
    def tokens(self) -> int:
        """Count the tokens that are of use."""
        return int(self.response.sum())

    @property
    def room(self) -> int:
        """Tell the longest response."""
        return int(self.response.max())

    def requests(self) -> list[Request]:
        """Ask an engine for all of it."""
        return [
            Request(i, self.prompt[i, : self.length[i]], Knobs(max_tokens=int(self.response[i])))
            for i in range(len(self.length))
        ]


@dataclasses.dataclass
class Contestant:
    """One way to do a workload, and the seconds of CPU and of the clock that it took."""

    name: str
    run: Callable[[], None]
    seconds: list[float] = dataclasses.field(default_factory=list)
    wall: list[float] = dataclasses.field(default_factory=list)


def ragged(rows: int = 64, width: int = 64, room: int = 256, seed: int = 0) -> Workload:
    """Draw prompts of 8 to 64 tokens and log-normal lengths of responses, at most `room`."""
    rng = np.random.default_rng(seed)
    length = rng.integers(8, width + 1, rows).astype(np.int32)
    prompt = rng.integers(0, VOCABULARY, (rows, width)).astype(np.int32)
    response = np.round(np.exp(rng.normal(np.log(40), 0.9, rows))).clip(1, room)
    return Workload("ragged", prompt, length, response.astype(np.int32))


def equal(rows: int = 8, width: int = 32, room: int = 128) -> Workload:
    """Draw one batch in which nothing differs but the tokens."""
    prompt = np.random.default_rng(0).integers(0, VOCABULARY, (rows, width)).astype(np.int32)
    return Workload("equal", prompt, np.full(rows, width, np.int32), np.full(rows, room, np.int32))


def bench_rollout(
    compare: str | None, slots: int, rounds: int, file: Path | None, seed: int = 0
) -> Row:
    """Measure, print a table and write the figures."""
    if compare not in (None, "hf"):
        raise UserError(f"--compare {compare}: expected hf")
    model = LanguageModel(MODEL, VOCABULARY)
    params = jax.jit(model.init)(jax.random.key(0))
    result: Row = {
        "command": f"fireopd bench rollout --slots {slots} --rounds {rounds}"
        + (f" --compare {compare}" if compare else ""),
        "platform": jax.default_backend(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "rounds": rounds,
        "workloads": [],
    }
    for work in (ragged(seed=seed), equal()):
        engine = make_engine(model, params, work, min(slots, len(work.length)))
        contestants = [
            Contestant("engine", lambda engine=engine, work=work: run_engine(engine, work)),
            static_batch(model, params, work, min(slots, len(work.length))),
        ]
        if compare == "hf":
            contestants += hugging_face(model, params, work)
        measure(contestants, rounds)
        row = figures(work, engine.programs, engine.statistics, contestants)
        result["workloads"].append(row)
    ragged_row = result["workloads"][0]
    keys = ("useful_tokens_per_cpu_second", "ratio_to_hf", "ratio_to_static", "programs")
    result |= {key: ragged_row[key] for key in (*keys, "slot_use", "compile_seconds")}
    print_table(result)
    if file is not None:
        write_whole(file, json.dumps(result, indent=2) + "\n")
    return result


def measure(contestants: list[Contestant], rounds: int) -> None:
    """Run every contestant once unmeasured, then in rounds of shuffled order."""
    order = random.Random(0)
    for contestant in contestants:
        contestant.run()
    for _ in range(rounds):
        for contestant in order.sample(contestants, len(contestants)):
            start, clock = time.process_time(), time.perf_counter()
            contestant.run()
            contestant.seconds.append(time.process_time() - start)
            contestant.wall.append(time.perf_counter() - clock)


def make_engine(model: LanguageModel, params: Params, work: Workload, slots: int) -> Engine:
    """Compile an engine for a workload."""
    rows, width = work.prompt.shape
    engine = Engine(model, width=width, room=work.room, seed=0, slots=slots, rows=rows)
    engine.load(params)
    return engine


def run_engine(engine: Engine, work: Workload) -> None:
    """Answer all requests; every response must have its length."""
    for completion, length in zip(engine.generate(work.requests()), work.response, strict=True):
        if len(completion.tokens) != length:
            raise RuntimeError(f"{len(completion.tokens)} tokens came, {length} were asked for")


def static_batch(model: LanguageModel, params: Params, work: Workload, batch: int) -> Contestant:
    """Answer batch after batch, each waiting for its longest response: no slot is refilled."""
    rows = len(work.length)
    sampling = dataclasses.replace(
        Sampling.of((), 1, 0).rows(batch), max_tokens=np.zeros(batch, np.int32)
    )
    zeros = np.zeros(batch, np.int32)

    @jax.jit
    def draw(params: Params, prompts: Prompts, sampling: Sampling) -> Any:
        return generate(
            model, params, prompts, sampling, jnp.int32(0), max_tokens=work.room, slots=batch
        )

    def run() -> None:
        for start in range(0, rows, batch):
            at = slice(start, start + batch)
            ids = np.arange(start, start + batch, dtype=np.int32)
            tokens, length = work.prompt[at], work.length[at]
            prompts = Prompts(tokens, length, tokens, length, zeros, ids, ids, ids)
            knobs = dataclasses.replace(sampling, max_tokens=work.response[at])
            jax.block_until_ready(draw(params, prompts, knobs))

    return Contestant("static batch", run)


def hugging_face(model: LanguageModel, params: Params, work: Workload) -> list[Contestant]:
    """Let `transformers` generate with the same weights, in left-padded batches."""
    try:
        torch: Any = import_module("torch")  # by name: only this comparison needs it
    except ImportError as error:
        raise UserError("--compare hf needs PyTorch: pip install fireopd-jax[parity]") from error
    import transformers

    transformers.logging.set_verbosity_error()
    described = hf_config_json(MODEL, VOCABULARY)
    described |= {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(**described)
    reference = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    weights = {
        name: torch.from_numpy(np.array(tensor)) for name, tensor in hf_tensors(params, MODEL)
    }
    missing, unexpected = reference.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise RuntimeError(f"weights do not fit: {missing}, {unexpected}")
    reference.tie_weights()

    class Lengths(transformers.StoppingCriteria):
        def __init__(self, prompt: int, response: np.ndarray):
            self.prompt, self.response = prompt, torch.as_tensor(response)

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return (input_ids.shape[1] - self.prompt) >= self.response

    rows = len(work.length)

    def contestant(threads: int, batch: int) -> Contestant:
        settings = transformers.GenerationConfig(
            max_new_tokens=work.room, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip

        def run() -> None:
            torch.set_num_threads(threads)
            for start in range(0, rows, batch):
                at = slice(start, start + batch)
                width = int(work.length[at].max())
                ids = np.zeros((len(work.length[at]), width), np.int64)
                for i, (tokens, length) in enumerate(
                    zip(work.prompt[at], work.length[at], strict=True)
                ):
                    ids[i, width - length :] = tokens[:length]
                mask = np.arange(width)[None] >= width - work.length[at][:, None]
                with torch.no_grad():
                    reference.generate(
                        input_ids=torch.from_numpy(ids),
                        attention_mask=torch.from_numpy(mask.astype(np.int64)),
                        generation_config=settings,
                        stopping_criteria=transformers.StoppingCriteriaList(
                            [Lengths(width, work.response[at])]
                        ),
                    )

        return Contestant(f"hf generate, {threads} threads, batch {batch}", run)

    batches = sorted({min(batch, rows) for batch in HF_BATCHES})
    return [contestant(threads, batch) for threads in HF_THREADS for batch in batches]


def figures(
    work: Workload, programs: int, engine: Statistics, contestants: list[Contestant]
) -> Row:
    """Gather what is reported of a workload.

    Ratios are of medians, of CPU seconds unless their name says otherwise.
    """
    median = {each.name: statistics.median(each.seconds) for each in contestants}
    wall = {each.name: statistics.median(each.wall) for each in contestants}
    hf = [name for name in median if name.startswith("hf")]
    ours = median["engine"]
    return {
        "workload": work.name,
        "useful_tokens": work.tokens,
        "cpu_seconds": ours,
        "useful_tokens_per_cpu_second": work.tokens / ours,
        "ratio_to_hf": min(median[name] for name in hf) / ours if hf else None,
        "wall_ratio_to_hf": min(wall[name] for name in hf) / wall["engine"] if hf else None,
        "ratio_to_static": median["static batch"] / ours,
        "programs": programs,
        "slot_use": engine.slot_use,
        "compile_seconds": engine.compile_seconds,
        "contestants": [
            {
                "name": each.name,
                "cpu_seconds": median[each.name],
                "wall_seconds": wall[each.name],
                "all": each.seconds,
            }
            for each in contestants
        ],
    }


def print_table(result: Row) -> None:
    """Show the figures."""
    console = Console()
    for row in result["workloads"]:
        table = Table(title=f"{row['workload']}: {row['useful_tokens']} tokens")
        table.add_column("")
        for head in ("CPU s", "tokens / CPU s", "engine is faster", "s", "engine is faster"):
            table.add_column(head, justify="right")
        ours = row["contestants"][0]["wall_seconds"]
        for each in row["contestants"]:
            seconds, wall = each["cpu_seconds"], each["wall_seconds"]
            table.add_row(
                each["name"],
                f"{seconds:.3f}",
                f"{row['useful_tokens'] / seconds:.0f}",
                f"{seconds / row['cpu_seconds']:.2f} x",
                f"{wall:.3f}",
                f"{wall / ours:.2f} x",
            )
        console.print(table)
        console.print(
            f"slots in use {row['slot_use']:.2f}, {row['programs']} programs, compiled in "
            f"{row['compile_seconds']:.1f} s"
        )
