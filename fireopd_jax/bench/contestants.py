"""The contestants of the rollout benchmark: engine, own static batch, Hugging Face `generate`."""

import dataclasses
import multiprocessing
import os
import time
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fireopd_jax.bench.workload import Contestant, Workload
from fireopd_jax.config import UserError
from fireopd_jax.models.hf_config import hf_config_json
from fireopd_jax.models.hf_names import hf_tensors
from fireopd_jax.models.language_model import LanguageModel, Params
from fireopd_jax.rollout.engine import CacheLayout, generate
from fireopd_jax.rollout.sampling import Sampling
from fireopd_jax.rollout.streaming import Engine
from fireopd_jax.types import Prompts

ENGINE, STATIC = "engine", "static batch"
HF_THREADS, HF_BATCHES = (1, 2), (16, 64)


def make_engine(
    model: LanguageModel, params: Params, work: Workload, slots: int, memory: CacheLayout
) -> Engine:
    """Return a compiled engine for a workload, loaded with `params`."""
    rows, width = work.prompt.shape
    engine = Engine(
        model, width=width, room=work.room, seed=0, slots=slots, rows=rows, memory=memory
    )
    engine.load(params)
    return engine


def run_engine(engine: Engine, work: Workload) -> None:
    """Generate all responses; raise RuntimeError if one has not its requested length."""
    for completion, length in zip(engine.generate(work.requests()), work.response, strict=True):
        if len(completion.tokens) != length:
            raise RuntimeError(
                f"a response has {len(completion.tokens)} tokens, {length} were requested"
            )


def on_one_core(
    model: LanguageModel, work: Workload, slots: int, memory: CacheLayout
) -> Contestant:
    """Return the engine in a process of one core, to compare with Hugging Face on one thread.

    XLA starts as many threads as the process has cores, and two cost more CPU seconds than one.
    """
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_answer_on_one_core, args=(theirs, model, work, slots, memory), daemon=True
    )
    process.start()
    theirs.close()

    def run() -> float:
        ours.send("run")
        return ours.recv()

    return Contestant(f"{ENGINE}, 1 core", work.tokens, run)


def _answer_on_one_core(
    pipe: Connection, model: LanguageModel, work: Workload, slots: int, memory: CacheLayout
) -> None:
    """Generate all responses at each message on the pipe; reply with the CPU seconds used."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before JAX starts its threads
    params = jax.jit(model.init)(jax.random.key(0))
    engine = make_engine(model, params, work, slots, memory)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        start = time.process_time()
        run_engine(engine, work)
        pipe.send(time.process_time() - start)


def static_batch(
    model: LanguageModel, params: Params, work: Workload, batch: int, memory: CacheLayout
) -> Contestant:
    """Return a contestant that generates batch after batch: no slot is refilled."""
    rows = len(work.length)
    sampling = dataclasses.replace(
        Sampling.of((), 1, 0).rows(batch), max_tokens=np.zeros(batch, np.int32)
    )
    version, zeros = jnp.int32(0), np.zeros(batch, np.int32)
    sizes = {"max_tokens": work.room, "slots": batch, "memory": memory}

    @jax.jit
    def draw(params: Params, prompts: Prompts, sampling: Sampling) -> Any:
        return generate(model, params, prompts, sampling, version, **sizes)

    def run() -> None:
        for start in range(0, rows, batch):
            at = slice(start, start + batch)
            ids = np.arange(start, start + batch, dtype=np.int32)
            tokens, length = work.prompt[at], work.length[at]
            prompts = Prompts(tokens, length, tokens, length, zeros, ids, ids, ids)
            knobs = dataclasses.replace(sampling, max_tokens=work.response[at])
            jax.block_until_ready(draw(params, prompts, knobs))

    return Contestant(STATIC, work.tokens, run)


def pytorch() -> tuple[Any, str]:
    """Return PyTorch and the name of its device of the kind that JAX uses here.

    Raises UserError on other platforms, or if PyTorch is missing or lacks CUDA.
    """
    platform = jax.default_backend()
    if platform not in ("cpu", "gpu"):
        raise UserError(
            f"--compare hf runs on CPU or GPU only, this machine has {platform.upper()}"
        )
    try:
        torch: Any = import_module("torch")  # imported here: only this comparison needs it
    except ImportError as error:
        raise UserError("--compare hf needs PyTorch: pip install fireopd-jax[parity]") from error
    if platform == "gpu" and not torch.cuda.is_available():
        raise UserError("--compare hf on a GPU needs PyTorch with CUDA, this one has none")
    return torch, "cpu" if platform == "cpu" else "cuda"


def hugging_face(
    model: LanguageModel, params: Params, work: Workload, slots: int
) -> list[Contestant]:
    """Return contestants that run `transformers` on the same weights, in left-padded batches.

    On a CPU with 1 and 2 threads and two batch sizes. On a GPU one batch, with as many rows as the
    engine has slots, because more would only take longer.
    """
    torch, device = pytorch()
    reference = hugging_face_model(model, params)
    if device == "cuda":
        return [left_padded("hf generate", reference, work.first(slots), slots)]

    def on_cpu(threads: int, batch: int) -> Contestant:
        name = f"hf generate, {threads} threads, batch {batch}"
        contestant = left_padded(name, reference, work, batch)
        run = contestant.run

        def with_threads() -> None:
            torch.set_num_threads(threads)
            run()

        return dataclasses.replace(contestant, run=with_threads)

    batches = sorted({min(batch, len(work.length)) for batch in HF_BATCHES})
    return [on_cpu(threads, batch) for threads in HF_THREADS for batch in batches]


def hugging_face_model(model: LanguageModel, params: Params) -> Any:
    """Return the `transformers` model with these parameters."""
    import transformers

    torch, device = pytorch()
    transformers.logging.set_verbosity_error()
    described = hf_config_json(model.config, model.vocab_size)
    described |= {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(**described)
    dtype = getattr(torch, model.config.dtype)
    # On the device, because drawing the initial weights, unused, would take a CPU a minute.
    with torch.device(device):
        reference = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    weights = {
        name: torch.from_numpy(np.array(tensor, np.float32)).to(dtype)
        for name, tensor in hf_tensors(params, model.config)
    }
    missing, unexpected = reference.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise RuntimeError(f"weights do not fit: {missing}, {unexpected}")
    reference.tie_weights()
    return reference


def left_padded(name: str, reference: Any, work: Workload, batch: int) -> Contestant:
    """Return a contestant that generates left-padded batches; every row stops at its length."""
    import transformers

    torch, device = pytorch()

    class Lengths(transformers.StoppingCriteria):
        def __init__(self, prompt: int, response: np.ndarray):
            self.prompt, self.response = prompt, torch.as_tensor(response, device=device)

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return (input_ids.shape[1] - self.prompt) >= self.response

    settings = transformers.GenerationConfig(
        max_new_tokens=work.room, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip

    def run() -> None:
        for start in range(0, len(work.length), batch):
            at = slice(start, start + batch)
            tokens, length = work.prompt[at], work.length[at]
            width = int(length.max())
            ids = np.zeros((len(length), width), np.int64)
            for row, prompt, real in zip(ids, tokens, length, strict=True):
                row[width - real :] = prompt[:real]
            mask = (np.arange(width)[None] >= width - length[:, None]).astype(np.int64)
            ends = transformers.StoppingCriteriaList([Lengths(width, work.response[at])])
            with torch.no_grad():
                reference.generate(
                    input_ids=torch.from_numpy(ids).to(device),
                    attention_mask=torch.from_numpy(mask).to(device),
                    generation_config=settings,
                    stopping_criteria=ends,
                )

    return Contestant(name, work.tokens, run)
