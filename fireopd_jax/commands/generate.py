"""`fireopd generate`: sample responses to the prompts of a file.

    a run, a folder or a hub's name -> parameters, tokenizer ┐
    prompts.jsonl -> ids ────────────────────────────────────┴─> Engine -> .OUT.part -> out.jsonl

Responses are written to .OUT.part as they finish, each with its index; when all are there, they are
written in order to the output file. A killed command resumes from .OUT.part with the same
responses, as sampling depends only on the seed, the row's index and the token position.
"""

import dataclasses
import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jax.sharding import Sharding

from fireopd_jax.config import UserError
from fireopd_jax.data.pipeline import SAMPLE_IDS
from fireopd_jax.data.sources import DataConfig, Row, read_rows
from fireopd_jax.models.hf_load import resolve
from fireopd_jax.models.language_model import Params
from fireopd_jax.recipe.models import ModelConfig
from fireopd_jax.rollout.requests import Completion, Knobs, Request
from fireopd_jax.rollout.sampling import seed_for
from fireopd_jax.rollout.streaming import Engine
from fireopd_jax.runs.tracking import progress
from fireopd_jax.runtime.compilation import compile_cache
from fireopd_jax.session.finished import open_model, own_template_kwargs, run_config
from fireopd_jax.session.parameters import load_or_make
from fireopd_jax.session.specs import ModelSpec, load_spec
from fireopd_jax.sharding.mesh import MeshConfig, make_mesh, replicated
from fireopd_jax.text.chat import decode, prompt_ids

ALIGN = 16
"""Prompts are padded to a multiple of this, so that fewer programs are compiled."""


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """GenerateOptions of the sampling."""

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
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute dtype; by default the model's own."""


def generate_to_file(
    model: str,
    prompts: Path,
    out: Path,
    settings: GenerateOptions = GenerateOptions(),
    *,
    name: str = "student",
    slots: int | None = None,
    tensor: int = 1,
    logprobs: bool = True,
) -> None:
    """Sample `samples` responses to each prompt of a file, and write them in order to `out`.

    `model` is a run (whose model `name` is used, with its template arguments), a model's folder or
    a name on the hub. All devices are used, `tensor` of them for each replica of the model. Lines
    have `prompt`, `text`, `token_ids`, `logprobs` and `finish`.

    Raises UserError for an existing `out`, an unknown model, or prompts that do not fit it.
    """
    if out.exists():
        raise UserError(f"{out} exists; expected a new file")
    mesh = make_mesh(MeshConfig(tensor=tensor))
    spec, params, template_kwargs = open_any(model, name, settings.dtype, replicated(mesh))
    rows = read_rows(DataConfig(path=str(prompts), prompt_column="prompt"))
    ids = plain_ids(spec, rows) if settings.raw else rendered_ids(spec, rows, template_kwargs)
    identity = {"model": model, "name": name, "prompts": digest(ids)}
    identity |= dataclasses.asdict(settings)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    with journal(part, json.loads(json.dumps(identity))) as (done, write):
        requests = [
            request for request in make_requests(spec, ids, settings) if request.id not in done
        ]
        if requests:
            compile_cache()
            engine = Engine(
                spec.model,
                width=-(-max(map(len, ids)) // ALIGN) * ALIGN,
                room=settings.max_tokens,
                seed=seed_for(settings.seed, "generate"),
                slots=slots,
                text=lambda tokens: decode(spec.tokenizer, tokens),
                mesh=mesh,
            )
            engine.load(params)
            with progress("generate", len(requests)) as bar:
                for completion in engine.stream(requests):
                    row = rows[completion.id // settings.samples]
                    write(completion.id, record(spec, row, completion, logprobs))
                    bar(1, tokens=engine.statistics.drawn)
        settle(part, out, len(rows) * settings.samples)


def open_any(
    model: str, name: str, dtype: Literal["float32", "bfloat16"] | None, place: Sharding
) -> tuple[ModelSpec, Params, Mapping[str, Any]]:
    """Return spec, parameters and template arguments of a model of a run, folder or the hub."""
    folder = Path(model)
    if (folder / "models").is_dir() or (folder / "config.yaml").is_file():
        spec, params = open_model(folder, name, dtype, place)
        return spec, params, own_template_kwargs(run_config(folder), name)
    if folder.is_dir() and not any((folder / f).is_file() for f in ("model.json", "config.json")):
        raise UserError(
            f"{folder}: no finished model; expected the folder of a run that has trained, or one "
            "with a model.json or a config.json"
        )
    folder = resolve(model)
    spec = load_spec("model", folder, ModelConfig(path=str(folder), dtype=dtype))
    return spec, load_or_make(spec, place), {}


def rendered_ids(
    spec: ModelSpec, rows: Sequence[Row], template_kwargs: Mapping[str, Any]
) -> list[list[int]]:
    """Return the token ids of the prompts in the model's chat template."""
    return prompt_ids(spec.tokenizer, [row.prompt for row in rows], template_kwargs)


def plain_ids(spec: ModelSpec, rows: Sequence[Row]) -> list[list[int]]:
    """Return the token ids of plain-text prompts, without template or special tokens.

    Raises UserError for a chat, and for an empty prompt.
    """
    for row in rows:
        if len(row.prompt) != 1:
            raise UserError(f"{row.origin}: --raw expects a plain-text prompt, not a chat")
    texts = [row.prompt[0]["content"] for row in rows]
    ids = spec.tokenizer(texts, add_special_tokens=False)["input_ids"]
    for row, tokens in zip(rows, ids, strict=True):  # pyright: ignore[reportArgumentType]
        if not tokens:
            raise UserError(f"{row.origin}: the prompt is empty; --raw adds no token to it")
    return [list(tokens) for tokens in ids]  # pyright: ignore[reportGeneralTypeIssues, reportArgumentType]


def make_requests(
    spec: ModelSpec, ids: Sequence[Sequence[int]], settings: GenerateOptions
) -> Iterator[Request]:
    """Yield a request for every sample of every prompt.

    Prompt and response stay within the model's positions. Raises UserError for a longer prompt.
    """
    limit = spec.model.config.max_position_embeddings or 2**30
    names = ("temperature", "top_p", "top_k", "min_p", "min_tokens")
    shared = {name: getattr(settings, name) for name in names}
    for i, tokens in enumerate(ids):
        room = min(settings.max_tokens, limit - len(tokens))
        if room < 1:
            raise UserError(
                f"prompt {i + 1} has {len(tokens)} tokens, no room for a response: the model has "
                f"{limit} positions (max_position_embeddings)"
            )
        knobs = Knobs(max_tokens=room, stop=spec.stop, stop_strings=settings.stop, **shared)
        for sample in range(settings.samples):
            number = (i * settings.samples + sample) % SAMPLE_IDS
            yield Request(number, np.asarray(tokens, np.int32), knobs)


def record(spec: ModelSpec, row: Row, completion: Completion, logprobs: bool) -> dict[str, Any]:
    """Return a response as a line of the file; log-probs of greedy tokens are the raw model's."""
    ids = completion.tokens.tolist()
    prompt = row.prompt
    line = {
        "prompt": prompt[0]["content"] if len(prompt) == 1 else list(prompt),
        "text": decode(spec.tokenizer, ids),
        "token_ids": ids,
        "logprobs": completion.logprobs.tolist(),
        "finish": completion.finish,
    }
    return line if logprobs else {key: line[key] for key in line if key != "logprobs"}


def digest(ids: Sequence[Sequence[int]]) -> str:
    """Return a hash of the prompts' token ids."""
    out = hashlib.sha256()
    for row in ids:
        out.update(np.asarray([len(row), *row], "<i8").tobytes())
    return out.hexdigest()[:16]


@contextmanager
def journal(part: Path, identity: Mapping[str, Any]) -> Iterator[tuple[set[int], Any]]:
    """Open the file of finished responses; yield their indices, and a function that appends one.

    The first line holds the settings; a line cut off by a kill is dropped. Raises UserError for a
    file of other settings, or in use by another process.
    """
    with part.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{part}: in use by a live process; wait for it") from None
        file.seek(0)
        lines = file.read().split(b"\n")[:-1]
        file.truncate(sum(len(line) + 1 for line in lines))
        if not lines:
            file.write(json.dumps(identity).encode() + b"\n")
        elif (begun := json.loads(lines[0])) != identity:
            key = next(key for key in identity if begun.get(key) != identity[key])
            raise UserError(
                f"{part} was begun with {key}={begun.get(key)!r}, not {identity[key]!r}; use the "
                "same settings, or remove that file"
            )
        done = {json.loads(line)["index"] for line in lines[1:]}

        def write(index: int, row: Mapping[str, Any]) -> None:
            file.write(json.dumps({"index": index, "row": row}).encode() + b"\n")
            file.flush()

        yield done, write


def settle(part: Path, out: Path, count: int) -> None:
    """Write the responses in order to `out`, then remove the file of finished responses."""
    lines = part.read_text(encoding="utf-8").splitlines()[1:]
    rows = {line["index"]: line["row"] for line in map(json.loads, lines)}
    assert sorted(rows) == list(range(count))
    beside = out.with_name(f".writing-{out.name}")
    try:
        beside.write_text("".join(json.dumps(rows[i]) + "\n" for i in range(count)), "utf-8")
        out.hardlink_to(beside)  # fails where a rename would overwrite a file created meanwhile
    finally:
        beside.unlink(missing_ok=True)
    part.unlink()
