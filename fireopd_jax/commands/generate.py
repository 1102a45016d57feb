"""`fireopd generate`: sample responses to prompts.

    a run, a folder or a hub's name -> parameters, tokenizer ┐
    --prompts -> ids -> buckets of similar lengths ──────────┴─> an Engine each -> lines of --out

Responses are written to .OUT.part as they finish, each with its index; when all are there, they are
written in order to the output file. A killed command resumes from .OUT.part with the same
responses, as sampling depends only on the seed, the row's index and the token position.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from fireopd_jax.commands.journal import begun_with, lines_to, say
from fireopd_jax.commands.prompts import (
    STANDARD,
    Asked,
    plain_ids,
    read_prompts,
    rendered_ids,
)
from fireopd_jax.config import UserError
from fireopd_jax.data.messages import check_unicode
from fireopd_jax.data.pipeline import SAMPLE_IDS
from fireopd_jax.models.language_model import Params
from fireopd_jax.rollout.buckets import by_length
from fireopd_jax.rollout.requests import Completion, Knobs, Request
from fireopd_jax.rollout.sampling import seed_for
from fireopd_jax.rollout.streaming import Engine
from fireopd_jax.runtime.compilation import compile_cache
from fireopd_jax.runtime.files import plain
from fireopd_jax.session.opening import open_any
from fireopd_jax.session.specs import ModelSpec
from fireopd_jax.sharding.mesh import MeshConfig, make_mesh, replicated
from fireopd_jax.terminal.progress import progress
from fireopd_jax.text.chat import decode
from fireopd_jax.text.clock import CLOCK, now, stopped_kwargs

OTHER = "row_"
"""Prefix of columns whose names are those of the results."""


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """Options of the sampling, and of how prompts are written."""

    max_tokens: int = 256
    samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    """Texts that end a response."""
    seed: int = 0
    raw: bool = False
    """Prompts are plain text: no chat template, no special tokens."""
    bos: bool = False
    """Raw prompts begin with the BOS that the tokenizer adds."""
    chat_template: str | None = None
    """Another chat template than the model's own; see the key `chat_template` of models."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute dtype; by default the model's own."""

    def check(self) -> None:
        """Raise UserError for options that conflict."""
        if self.bos and not self.raw:
            raise UserError("--bos goes with --raw: a chat template writes its own BOS")
        for text in self.stop:
            check_unicode(text, "--stop")
            if not text:
                raise UserError("--stop: the text is empty; expected one that ends a response")
        if self.raw and self.chat_template is not None:
            raise UserError(f"--chat-template {self.chat_template} has no effect with --raw")


def generate_to_file(
    model: str,
    prompts: str | Path,
    out: str | Path,
    settings: GenerateOptions = GenerateOptions(),
    *,
    name: str = "student",
    column: str | None = None,
    slots: int | None = None,
    tensor: int = 1,
    logprobs: bool = True,
    ignore_config_keys: Sequence[str] = (),
) -> None:
    """Sample `samples` responses to each prompt, and write them in order to `out`.

    `model` is a run (whose model `name` is used, with its template and its arguments), a model's
    folder or a name on the hub. `prompts` and `out` are files, or "-" for the standard streams.
    All devices are used, `tensor` of them for each replica of the model. Lines have `prompt`,
    `text`, `sample`, `token_ids`, `logprobs`, `finish`, and the other columns of the prompt's row.

    Raises UserError for an existing `out`, an unknown model, or prompts that do not fit it.
    """
    settings.check()
    to = None if str(out) == STANDARD else Path(out)
    if to is not None and to.exists():
        raise UserError(f"{to} exists; expected a new file")
    asked = read_prompts(str(prompts), column)
    say(f"{len(asked):,} prompts; loading {model}")
    mesh = make_mesh(MeshConfig(tensor=tensor))
    spec, params, kwargs = open_any(
        model, name, settings.dtype, replicated(mesh), ignore_config_keys, settings.chat_template
    )
    kwargs = kwargs if settings.raw else with_clock(spec, kwargs, to)
    rows = [each.row for each in asked]
    ids = plain_ids(spec, rows, settings.bos) if settings.raw else rendered_ids(spec, rows, kwargs)
    identity = {"model": model, "name": name, "prompts": digest(ids, asked)}
    identity |= {**dataclasses.asdict(settings), "clock": kwargs.get(CLOCK)}
    identity |= {"ignore_config_keys": list(ignore_config_keys), "logprobs": logprobs}
    every = list(make_requests(spec, ids, settings, [row.origin for row in rows]))
    with lines_to(to, identity, len(every)) as (done, write):
        requests = [request for request in every if request.id not in done]
        if done:
            say(f"{len(done):,} of {len(every):,} responses are there; sampling the others")
        for completion in answers(spec, params, requests, settings, slots, mesh):
            number, sample = divmod(completion.id, settings.samples)
            write(completion.id, record(spec, asked[number], completion, sample, logprobs))


def answers(
    spec: ModelSpec,
    params: Params,
    requests: Sequence[Request],
    settings: GenerateOptions,
    slots: int | None,
    mesh: Mesh,
    purpose: str = "generate",
) -> Iterator[Completion]:
    """Yield the responses as they end, those to short prompts first.

    `purpose` is part of the seed, and shown with the progress.
    """
    compile_cache()
    for width, own in by_length([len(request.prompt) for request in requests]):
        lengths = [len(requests[i].prompt) for i in own]
        say(f"compiling for prompts of {min(lengths)} to {max(lengths)} tokens")
        start = time.monotonic()
        engine = Engine(
            spec.model,
            width=width,
            room=min(settings.max_tokens, limit_of(spec)),
            seed=seed_for(settings.seed, purpose),
            slots=slots,
            text=lambda tokens: decode(spec.tokenizer, tokens),
            mesh=mesh,
        )
        engine.load(params)
        seconds = time.monotonic() - start
        say(f"compiled in {seconds:.0f} s; sampling {len(own):,} responses")
        with progress(purpose, len(own)) as bar:
            for completion in engine.stream([requests[i] for i in own]):
                yield completion
                bar(1, tokens=engine.statistics.drawn)


def with_clock(spec: ModelSpec, kwargs: Mapping[str, Any], out: Path | None) -> Mapping[str, Any]:
    """Return the arguments of the template, with the date that its clock shows.

    It is that of the run, or of the killed command that is resumed, or now.
    """
    before = {} if out is None else begun_with(out)
    kwargs = stopped_kwargs(spec.tokenizer.chat_template, kwargs, before.get("clock") or now())
    if CLOCK in kwargs:
        say(f"the chat template reads the clock, which shows {kwargs[CLOCK]}")
    return kwargs


def limit_of(spec: ModelSpec) -> int:
    """Return the positions that a model has: prompt and response stay within them."""
    return spec.model.config.max_position_embeddings or 2**30


def make_requests(
    spec: ModelSpec,
    ids: Sequence[Sequence[int]],
    settings: GenerateOptions,
    origins: Sequence[str] | None = None,
) -> Iterator[Request]:
    """Yield a request for every sample of every prompt.

    Prompt and response stay within the model's positions. Raises UserError for a longer prompt.
    """
    limit = limit_of(spec)
    names = ("temperature", "top_p", "top_k", "min_p", "min_tokens")
    shared = {name: getattr(settings, name) for name in names}
    for i, tokens in enumerate(ids):
        room = min(settings.max_tokens, limit - len(tokens))
        if room < 1:
            where = f"prompt {i + 1}" if origins is None else f"{origins[i]}: the prompt"
            raise UserError(
                f"{where} has {len(tokens)} tokens, no room for a response: the model has "
                f"{limit} positions (max_position_embeddings)"
            )
        knobs = Knobs(max_tokens=room, stop=spec.stop, stop_strings=settings.stop, **shared)
        for sample in range(settings.samples):
            number = (i * settings.samples + sample) % SAMPLE_IDS
            yield Request(number, np.asarray(tokens, np.int32), knobs)


def record(
    spec: ModelSpec, asked: Asked, completion: Completion, sample: int, logprobs: bool
) -> dict[str, Any]:
    """Return a response as a line of the file; log-probs of greedy tokens are the raw model's."""
    ids = completion.tokens.tolist()
    line = {
        "prompt": asked.prompt,
        "text": decode(spec.tokenizer, ids),
        "sample": sample,
        "token_ids": ids,
        "logprobs": completion.logprobs.tolist(),
        "finish": completion.finish,
    }
    if not logprobs:
        del line["logprobs"]
    return line | other_columns(line, asked)


def other_columns(line: Mapping[str, Any], asked: Asked) -> dict[str, Any]:
    """Return the columns of a prompt's row; one with the name of a result is `row_NAME`.

    The column of the prompt is not repeated.
    """
    found = {}
    for name, value in plain(asked.columns).items():
        if name == "prompt" and value in (asked.prompt, list(asked.row.prompt)):
            continue
        own = name
        while own in line or (own != name and own in asked.columns):
            own = OTHER + own
        found[own] = value
    return found


def digest(ids: Sequence[Sequence[int]], asked: Sequence[Asked]) -> str:
    """Return a hash of the prompts' token ids, and of the columns that are kept with them."""
    out = hashlib.sha256()
    for row, each in zip(ids, asked, strict=True):
        out.update(np.asarray([len(row), *row], "<i8").tobytes())
        out.update(json.dumps(plain(each.columns), default=str).encode())
    return out.hexdigest()[:16]
