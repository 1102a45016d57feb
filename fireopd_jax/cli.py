"""The command line: `fireopd train | sft | eval | generate | export | verify | bench | env`.

Nothing heavy is imported before a command needs it, so that `--help` answers at once. The keys it
lists come from `configs/schema.json`, which `fireopd schema` writes from the config classes.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
# The models are ours; the library is here for tokenizers and misses no PyTorch.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

app = typer.Typer(
    name="fireopd",
    help="On-policy distillation of language models, native to JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

bench = typer.Typer(help="Measure a part of the package.", no_args_is_help=True)
app.add_typer(bench, name="bench")


class KeysCommand(TyperCommand):
    """A command whose help ends with every key of the configuration."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the usual help, then the keys."""
        super().format_help(ctx, formatter)
        formatter.write("\nKeys, with type and default:\n")
        for line in key_lines():
            formatter.write(line + "\n")


def schema_file() -> Path:
    """Find the schema that was written beside the shipped configurations."""
    here = Path(__file__).parent
    places = [here / "configs" / "schema.json", here.parent / "configs" / "schema.json"]
    return next((place for place in places if place.is_file()), places[0])


def key_lines() -> Iterator[str]:
    """Lay out every key: a heading a section, a line a key, its documentation below."""
    schema = json.loads(schema_file().read_text(encoding="utf-8"))
    yield from _section(schema, schema, "")


def _section(schema: dict[str, Any], node: dict[str, Any], prefix: str) -> Iterator[str]:
    later: list[tuple[str, dict[str, Any]]] = []
    for name, field in node.get("properties", {}).items():
        if sections := list(_sections(schema, field)):
            several = len(sections) > 1
            for label, section in sections:
                kind = section["properties"].get("kind", {}).get("const")
                head = f"{prefix}{name}{label}" + (f" (kind: {kind})" if several else "")
                later.append((head, section))
            continue
        default = json.dumps(field["default"]) if "default" in field else "-"
        yield f"  {prefix}{name}: {_type(field)} = {default}"
        if text := " ".join(field.get("description", "").split()):
            yield f"      {text}"
    for head, section in later:
        yield ""
        yield f"{head}: {' '.join(section.get('description', '').split())}"
        yield from _section(schema, section, head.partition(" ")[0] + ".")


def _sections(
    schema: dict[str, Any], field: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Find the config classes behind a field: itself, its alternatives, or those it names."""
    if "$ref" in field:
        yield "", schema["$defs"][field["$ref"].rpartition("/")[2]]
    for alternative in field.get("anyOf", field.get("oneOf", field.get("allOf", []))):
        yield from _sections(schema, alternative)
    if isinstance(extra := field.get("additionalProperties"), dict):
        for _, section in _sections(schema, extra):
            yield ".NAME", section


def _type(field: dict[str, Any]) -> str:
    if "enum" in field:
        return " | ".join(field["enum"])
    if "const" in field:
        return json.dumps(field["const"])
    if "anyOf" in field:
        return " | ".join(_type(part) for part in field["anyOf"])
    if field.get("type") == "array" and "items" in field:
        return f"list of {_type(field['items'])}"
    bounds = {
        "minimum": "≥ {}",
        "exclusiveMinimum": "> {}",
        "maximum": "≤ {}",
        "exclusiveMaximum": "< {}",
    }
    limits = [text.format(field[key]) for key, text in bounds.items() if key in field]
    return " ".join([field.get("type", "any"), *limits])


Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG.yaml | key=value]...",
        help="Files laid left to right, then overrides such as optim.learning_rate=1e-6.",
    ),
]


DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Resolve and check the configuration, print it, stop.")
]


@app.command(cls=KeysCommand)
def train(settings: Settings = None, dry_run: DryRun = False) -> None:
    """Distil: make or read the models, train the student, evaluate it before and after."""
    launch("train", settings, dry_run)


@app.command(cls=KeysCommand)
def sft(settings: Settings = None, dry_run: DryRun = False) -> None:
    """Do the supervised part alone: the embedded teachers and the student's cold start."""
    launch("sft", settings, dry_run)


def launch(work: str, settings: list[str] | None, dry_run: bool) -> None:
    """Resolve the configuration, then print it or do the work of that name."""
    from fireopd_jax.recipe.schema import load_config

    config = load_config(settings or [])
    if dry_run:
        print_config(config)
    else:
        from fireopd_jax.training import run

        getattr(run, work)(config)


def print_config(config: Any) -> None:
    """Print a resolved configuration as YAML."""
    import yaml

    from fireopd_jax.recipe.schema import as_tree

    print(yaml.safe_dump(as_tree(config), sort_keys=False), end="")


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    model: Annotated[
        str, typer.Option(help="Which of its models/: student, student_start, teacher_NAME ...")
    ] = "student",
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[eval.key=value]...", help="Overrides.")
    ] = None,
) -> None:
    """Grade a model of a run on its held-out problems; prints avg@k with its interval as JSON."""
    from fireopd_jax.session.finished import evaluate_model

    print(json.dumps(evaluate_model(run, model, settings or []), indent=2))


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A run, a model's folder, or a name on the hub.")],
    prompts: Annotated[Path, typer.Option(help="JSON lines with a `prompt` (text or messages).")],
    out: Annotated[Path, typer.Option(help="File to write; it must not exist.")],
    name: Annotated[
        str, typer.Option("--model", help="Of a run: which of its models/.")
    ] = "student",
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest response.")] = 256,
    min_tokens: Annotated[int, typer.Option(min=0, help="Shortest response.")] = 0,
    samples: Annotated[int, typer.Option(min=1, help="Responses a prompt.")] = 1,
    greedy: Annotated[bool, typer.Option("--greedy", help="The same as --temperature 0.")] = False,
    temperature: Annotated[float | None, typer.Option(min=0, help="By default 1.")] = None,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 is off.")] = 0,
    min_p: Annotated[float, typer.Option(min=0, max=1)] = 0.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends a response; may be repeated.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Prompts are plain text: no template, no special tokens.")
    ] = False,
    logprobs: Annotated[bool, typer.Option(help="Write each token's log-prob.")] = True,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; by default the model's own.")
    ] = None,
    seed: Annotated[int, typer.Option()] = 0,
    slots: Annotated[
        int | None,
        typer.Option(min=1, help="Responses drawn at a time, a copy; changes no response."),
    ] = None,
    tensor: Annotated[int, typer.Option(min=1, help="Devices that share a copy of the model.")] = 1,
) -> None:
    """Answer prompts from a file; a command that was killed goes on where it was."""
    from fireopd_jax.commands.generate import Settings, generate_to_file
    from fireopd_jax.config import UserError

    if greedy and temperature:
        raise UserError(f"--greedy and --temperature {temperature:g} contradict; give one of them")
    settings = Settings(
        max_tokens=max_tokens,
        samples=samples,
        temperature=0.0 if greedy else 1.0 if temperature is None else temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        min_tokens=min_tokens,
        stop=tuple(stop or ()),
        seed=seed,
        raw=raw,
        dtype=known_dtype(dtype),
    )
    generate_to_file(
        model, prompts, out, settings, name=name, slots=slots, tensor=tensor, logprobs=logprobs
    )


def known_dtype(dtype: str | None) -> Any:
    """Refuse a type that no model has."""
    from fireopd_jax.config import UserError, nearest

    known = ("float32", "bfloat16")
    if dtype not in (None, *known):
        raise UserError(f"--dtype {dtype}: expected {' or '.join(known)}{nearest(dtype, known)}")
    return dtype


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.")],
    to: Annotated[Path, typer.Option(help="Folder to write; it must be new or empty.")],
    step: Annotated[
        int | None, typer.Option(help="A checkpoint's step; by default the finished model.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="Which of its models/, or with --step: student or a control.")
    ] = "student",
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; by default as trained.")
    ] = None,
    max_shard_gib: Annotated[
        float, typer.Option(min=0, help="Largest file of weights, in GiB.")
    ] = 4.0,
) -> None:
    """Write a model of a run as a Hugging Face folder, which `transformers` loads."""
    from fireopd_jax.session.exporting import export_run

    size = int(max_shard_gib * 2**30)
    export_run(run, to, model=model, step=step, dtype=known_dtype(dtype), max_shard_bytes=size)
    print(to)


@bench.command("head")
def bench_head(
    tokens: Annotated[int, typer.Option(help="Positions.")] = 2048,
    width: Annotated[int, typer.Option(help="Of the hidden states.")] = 256,
    vocab: Annotated[int, typer.Option(help="Rows of the head.")] = 32768,
    top_k: Annotated[int, typer.Option(help="Ids per position, 1 to 128.")] = 16,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    implementations: Annotated[
        str | None, typer.Option(metavar="A,B", help="By default all that run on this machine.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Interleaved; medians are reported.")] = 7,
    chunk: Annotated[int | None, typer.Option(help="Columns at a time, if not the usual.")] = None,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="Time block sizes instead; nothing reads their table."),
    ] = False,
    file: Annotated[
        Path | None,
        typer.Option("--json", help="File to write; that of --tune gains what it lacks."),
    ] = None,
) -> None:
    """Time the head statistics against full logits with `lax.top_k` and a bare product."""
    from fireopd_jax.bench.head import Shape, bench_head
    from fireopd_jax.bench.tune import tune_head

    shape = Shape(tokens, width, vocab, top_k, dtype, chunk)
    names = implementations and [name.strip() for name in implementations.split(",")]
    (tune_head if tune else bench_head)(shape, names or None, rounds, file)


@bench.command("load")
def bench_load(
    folder: Annotated[
        Path | None, typer.Argument(help="Folder of Hugging Face; by default random weights.")
    ] = None,
    gib: Annotated[float, typer.Option(help="Size of the random weights, in bfloat16.")] = 2.0,
    dtype: Annotated[
        str | None, typer.Option(help="Of the parameters: float32 or bfloat16; by default as read.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Medians are reported.")] = 3,
    file: Annotated[Path | None, typer.Option("--json", help="File to write.")] = None,
) -> None:
    """Time loading against reading the files, and compiling deep models against shallow ones."""
    from fireopd_jax.bench.load import bench_load

    bench_load(folder, gib, dtype, rounds, file=file)


@bench.command("methods")
def bench_methods(
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG.yaml | key=value]...", help="By default quickstart."),
    ] = None,
    methods: Annotated[
        str | None, typer.Option(metavar="A,B", help="Names of configs/method/; opd is added.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved; medians are reported.")] = 7,
    file: Annotated[Path | None, typer.Option("--json", help="File to write.")] = None,
) -> None:
    """Time score and update of the methods, beside those of on-policy distillation."""
    from fireopd_jax.bench.methods import bench_methods

    names = methods and [name.strip() for name in methods.split(",")]
    bench_methods(settings or ["quickstart"], names or None, rounds, file)


@bench.command("rollout")
def bench_rollout(
    compare: Annotated[
        str | None, typer.Option(help="hf: Hugging Face `generate` beside ours; needs PyTorch.")
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="Responses decoded at a time.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved; medians are reported.")] = 5,
    model: Annotated[
        str, typer.Option(help="small, qwen3-0.6b or qwen3-1.7b: shapes, with random weights.")
    ] = "small",
    cache: Annotated[
        str, typer.Option(help="dense; paged, of 64 tokens; on a GPU dense_gpu, paged_gpu.")
    ] = "dense",
    file: Annotated[Path | None, typer.Option("--json", help="File to write.")] = None,
) -> None:
    """Time rollouts of ragged lengths, and by the small model of equal ones, in tokens a second."""
    # Read when PyTorch starts its threads: those that wait must not count as work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if compare is not None:  # JAX would take most of a GPU's memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    from fireopd_jax.bench.rollout import bench_rollout

    bench_rollout(compare, slots, rounds, file, model, cache)


@bench.command("toy")
def bench_toy(
    iterations: Annotated[int, typer.Option(help="Of the student; the teachers' are 3/2.")] = 2000,
    seeds: Annotated[str, typer.Option(metavar="A,B", help="One study each.")] = "42,43,2026",
    figure: Annotated[Path | None, typer.Option(help="SVG to write.")] = None,
    file: Annotated[Path | None, typer.Option("--json", help="File to write.")] = None,
) -> None:
    """Measure the variance of the gradient against gamma, in one dimension (arXiv 2603.25562)."""
    from fireopd_jax.bench.toy_study import bench_toy, read_seeds

    bench_toy(iterations, read_seeds(seeds), figure, file)


@app.command()
def verify(
    file: Annotated[Path | None, typer.Option("--json", help="File to write.")] = None,
) -> None:
    """Compare objectives and statistics with NumPy in float64, here; status 1 if any is off."""
    from fireopd_jax.runtime.xla_flags import several_cpu_devices

    several_cpu_devices()
    from fireopd_jax.verify.command import verify

    if not verify(file):
        raise typer.Exit(1)


@app.command()
def env() -> None:
    """Print what a bug report needs: versions, machine, devices."""
    import jax

    from fireopd_jax.runs.folder import environment

    print(json.dumps(environment([str(device) for device in jax.devices()]), indent=2))


@app.command(hidden=True)
def schema(out: Annotated[Path, typer.Argument()]) -> None:
    """Write the JSON schema of the configuration, for --help and for editors."""
    from pydantic import TypeAdapter

    from fireopd_jax.recipe.schema import Config

    text = json.dumps(TypeAdapter(Config).json_schema(), indent=1, ensure_ascii=False)
    out.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit status 2."""
    from fireopd_jax.config import UserError
    from fireopd_jax.runtime.xla_flags import compile_quickly_on_cpu

    compile_quickly_on_cpu()
    try:
        app()
    except UserError as error:
        print(f"fireopd: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("fireopd: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if type(error).__name__ != "Interrupted":
            raise
        print(f"fireopd: {error}", file=sys.stderr)
        sys.exit(130)
