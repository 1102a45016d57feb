"""Useful tokens a second: the engine, our own static batch, and Hugging Face `generate`.

    one random model, one list of requests -> every contestant -> interleaved rounds -> medians

"ragged" has responses of very different lengths, as training has: log-normal, median 40 or 100.
"equal" has one batch of equal ones. Lengths are forced, by limits and no stop token, so that all do
the same work. On a CPU seconds are those of the whole process, all threads; elsewhere those of the
clock. Prefill is included, compiling is not.
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
from fireopd_jax.config import UserError, nearest
from fireopd_jax.models.architecture import DecoderConfig
from fireopd_jax.models.hf_config import hf_config_json
from fireopd_jax.models.hf_names import hf_tensors
from fireopd_jax.models.language_model import LanguageModel, Params
from fireopd_jax.rollout.engine import DENSE, Memory, generate
from fireopd_jax.rollout.kv_paged import Paged
from fireopd_jax.rollout.kv_paged_gpu import PagedGPU
from fireopd_jax.rollout.requests import Knobs, Request
from fireopd_jax.rollout.sampling import Sampling
from fireopd_jax.rollout.serving import Engine, Statistics
from fireopd_jax.types import Prompts

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
PAGE = 64
CACHES: dict[str, Memory] = {
    "dense": DENSE,
    "paged": Paged(page_size=PAGE),
    "paged_gpu": PagedGPU(page_size=PAGE),
}
STATIC = "static batch"
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

    def first(self, rows: int) -> "Workload":
        """Take a part of it."""
        return Workload(self.name, self.prompt[:rows], self.length[:rows], self.response[:rows])

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
    tokens: int
    run: Callable[[], None]
    cpu: list[float] = dataclasses.field(default_factory=list)
    wall: list[float] = dataclasses.field(default_factory=list)

    def rate(self, clock: str) -> float:
        """Give the useful tokens a second, by the median of the rounds."""
        return self.tokens / statistics.median(getattr(self, clock))


def ragged(
    rows: int = 64, width: int = 64, room: int = 256, median: int = 40, seed: int = 0
) -> Workload:
    """Draw prompts of an eighth to all of `width`, and log-normal lengths of responses."""
    rng = np.random.default_rng(seed)
    length = rng.integers(width // 8, width + 1, rows).astype(np.int32)
    prompt = rng.integers(0, VOCABULARY, (rows, width)).astype(np.int32)
    response = np.round(np.exp(rng.normal(np.log(median), 0.9, rows))).clip(1, room)
    return Workload("ragged", prompt, length, response.astype(np.int32))


def equal(rows: int = 8, width: int = 32, room: int = 128) -> Workload:
    """Draw one batch in which nothing differs but the tokens."""
    prompt = np.random.default_rng(0).integers(0, VOCABULARY, (rows, width)).astype(np.int32)
    return Workload("equal", prompt, np.full(rows, width, np.int32), np.full(rows, room, np.int32))


def workloads(name: str, slots: int) -> list[Workload]:
    """Give a model the work that it is measured by: a large one four requests a slot."""
    if name == "small":
        return [ragged(), equal()]
    return [ragged(rows=4 * slots, width=256, room=512, median=100)]


def bench_rollout(
    compare: str | None,
    slots: int,
    rounds: int,
    file: Path | None,
    name: str = "small",
    cache: str = "dense",
) -> Row:
    """Measure, print a table and write the figures."""
    for option, given, known in (
        ("--compare", compare, ("hf", None)),
        ("--model", name, tuple(MODELS)),
        ("--cache", cache, tuple(CACHES)),
    ):
        if given not in known:
            names = [each for each in known if each]
            hint = nearest(str(given), names)
            raise UserError(f"{option} {given}: expected {', '.join(names)}{hint}")
    config, memory = MODELS[name], CACHES[cache]
    assert config.vocab_size is not None
    model = LanguageModel(config, config.vocab_size)
    params = jax.jit(model.init)(jax.random.key(0))
    command = f"fireopd bench rollout --model {name} --cache {cache} --slots {slots}"
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    result: Row = {
        "command": f"{command} --rounds {rounds}" + (f" --compare {compare}" if compare else ""),
        "platform": device.platform,
        "device": device.device_kind,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "rounds": rounds,
        "bandwidth": None if on_cpu else bandwidth(),
        "workloads": [],
    }
    for work in workloads(name, slots):
        fitting = min(slots, len(work.length))
        engine = make_engine(model, params, work, fitting, memory)
        contestants = [
            Contestant(
                "engine", work.tokens, lambda engine=engine, work=work: run_engine(engine, work)
            )
        ]
        if on_cpu:  # elsewhere its program would compile for a minute more
            contestants.append(static_batch(model, params, work, fitting))
        if compare == "hf":
            contestants += hugging_face(model, params, work, slots)
        measure(contestants, rounds)
        row = figures(work, engine.programs, engine.statistics, contestants, on_cpu)
        if result["bandwidth"]:
            row |= floor(model, params, work, engine.statistics, rounds, result["bandwidth"])
            row["share_of_floor"] = row["floor_seconds"] / row["wall_seconds"]
        result["workloads"].append(row)
    first = result["workloads"][0]
    keys = ("useful_tokens_per_cpu_second", "ratio_to_hf", "ratio_to_static", "programs")
    result |= {key: first[key] for key in (*keys, "slot_use", "compile_seconds")}
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
            contestant.cpu.append(time.process_time() - start)
            contestant.wall.append(time.perf_counter() - clock)


def bandwidth(gib: int = 2, calls: int = 20) -> float:
    """Measure the bytes a second that an elementwise pass reads and writes."""
    x = jnp.zeros(gib * 2**30 // 4, jnp.float32)
    turn = jax.jit(jnp.negative, donate_argnums=0)
    x = jax.block_until_ready(turn(x))
    start = time.perf_counter()
    for _ in range(calls):
        x = turn(x)
    jax.block_until_ready(x)
    return 2 * x.nbytes * calls / (time.perf_counter() - start)


def floor(
    model: LanguageModel,
    params: Params,
    work: Workload,
    engine: Statistics,
    rounds: int,
    bandwidth: float,
) -> Row:
    """Tell how long the steps would take if they only read what they must.

    That is the weights once a step, and once a token the keys and values of all before it.
    """
    c = model.config
    shapes = jax.tree.leaves(jax.eval_shape(model.relay, params))
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in shapes)
    position = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    response = work.response.astype(np.int64)
    seen = (response * work.length + response * (response - 1) // 2).sum()
    cache = int(seen) * position * jnp.dtype(c.dtype).itemsize
    steps = engine.steps / (rounds + 1)
    seconds = (weights * steps + cache) / bandwidth
    return {"steps": steps, "weight_bytes": weights, "cache_bytes": cache, "floor_seconds": seconds}


def make_engine(
    model: LanguageModel, params: Params, work: Workload, slots: int, memory: Memory
) -> Engine:
    """Compile an engine for a workload."""
    rows, width = work.prompt.shape
    engine = Engine(
        model, width=width, room=work.room, seed=0, slots=slots, rows=rows, memory=memory
    )
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

    return Contestant(STATIC, work.tokens, run)


def hugging_face(
    model: LanguageModel, params: Params, work: Workload, slots: int
) -> list[Contestant]:
    """Let `transformers` generate with the same weights, in left-padded batches.

    On a GPU it does one batch, of as many rows as we have slots: more would only take longer.
    """
    try:
        torch: Any = import_module("torch")  # by name: only this comparison needs it
    except ImportError as error:
        raise UserError("--compare hf needs PyTorch: pip install fireopd-jax[parity]") from error
    import transformers

    transformers.logging.set_verbosity_error()
    on_cpu = jax.default_backend() == "cpu"
    device = "cpu" if on_cpu else "cuda"
    described = hf_config_json(model.config, model.vocab_size)
    described |= {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(**described)
    dtype = getattr(torch, model.config.dtype)
    with torch.device(device):  # its first weights, drawn in vain, take a CPU a minute
        reference = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    weights = {
        name: torch.from_numpy(np.array(tensor, np.float32)).to(dtype)
        for name, tensor in hf_tensors(params, model.config)
    }
    missing, unexpected = reference.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise RuntimeError(f"weights do not fit: {missing}, {unexpected}")
    reference.tie_weights()

    class Lengths(transformers.StoppingCriteria):
        def __init__(self, prompt: int, response: np.ndarray):
            self.prompt, self.response = prompt, torch.as_tensor(response, device=device)

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return (input_ids.shape[1] - self.prompt) >= self.response

    def contestant(work: Workload, threads: int, batch: int) -> Contestant:
        settings = transformers.GenerationConfig(
            max_new_tokens=work.room, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip

        def run() -> None:
            torch.set_num_threads(threads)
            for start in range(0, len(work.length), batch):
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
                        input_ids=torch.from_numpy(ids).to(device),
                        attention_mask=torch.from_numpy(mask.astype(np.int64)).to(device),
                        generation_config=settings,
                        stopping_criteria=transformers.StoppingCriteriaList(
                            [Lengths(width, work.response[at])]
                        ),
                    )

        name = f"hf generate, {threads} threads, batch {batch}" if on_cpu else "hf generate"
        return Contestant(name, work.tokens, run)

    if not on_cpu:
        return [contestant(work.first(slots), torch.get_num_threads(), slots)]
    batches = sorted({min(batch, len(work.length)) for batch in HF_BATCHES})
    return [contestant(work, threads, batch) for threads in HF_THREADS for batch in batches]


def figures(
    work: Workload,
    programs: int,
    engine: Statistics,
    contestants: list[Contestant],
    on_cpu: bool = True,
) -> Row:
    """Gather what is reported of a workload.

    Ratios are of rates by medians, on a CPU by its seconds unless their name says otherwise.
    """
    usual, ours = "cpu" if on_cpu else "wall", contestants[0]
    static = [each for each in contestants if each.name == STATIC]
    hf = [each for each in contestants if each.name.startswith("hf")]

    def ratio(others: list[Contestant], clock: str = usual) -> float | None:
        if not others:
            return None
        return ours.rate(clock) / max(each.rate(clock) for each in others)

    return {
        "workload": work.name,
        "useful_tokens": work.tokens,
        "cpu_seconds": statistics.median(ours.cpu),
        "wall_seconds": statistics.median(ours.wall),
        "useful_tokens_per_cpu_second": ours.rate("cpu"),
        "useful_tokens_per_second": ours.rate("wall"),
        "ratio_to_hf": ratio(hf),
        "wall_ratio_to_hf": ratio(hf, "wall"),
        "ratio_to_static": ratio(static),
        "programs": programs,
        "slot_use": engine.slot_use,
        "compile_seconds": engine.compile_seconds,
        "contestants": [
            {
                "name": each.name,
                "useful_tokens": each.tokens,
                "cpu_seconds": statistics.median(each.cpu),
                "wall_seconds": statistics.median(each.wall),
                "all_cpu": each.cpu,
                "all_wall": each.wall,
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
        for head in ("tokens", "CPU s", "tokens / CPU s", "s", "tokens / s"):
            table.add_column(head, justify="right")
        for each in row["contestants"]:
            tokens, cpu, wall = (
                each[key] for key in ("useful_tokens", "cpu_seconds", "wall_seconds")
            )
            table.add_row(
                each["name"],
                f"{tokens}",
                f"{cpu:.3f}",
                f"{tokens / cpu:.0f}",
                f"{wall:.3f}",
                f"{tokens / wall:.0f}",
            )
        console.print(table)
        ratios = {"static batch": row["ratio_to_static"], "Hugging Face": row["ratio_to_hf"]}
        told = [f"{value:.2f} x {name}, " for name, value in ratios.items() if value]
        console.print(
            f"engine: {''.join(told)}slots in use {row['slot_use']:.2f}, "
            f"{row['programs']} programs, compiled in {row['compile_seconds']:.1f} s"
        )
        if "share_of_floor" in row:
            console.print(
                f"to read weights and cache alone takes {row['floor_seconds']:.2f} s, "
                f"{row['share_of_floor']:.2f} of the time, at {result['bandwidth'] / 1e12:.2f} TB/s"
            )
