"""The command line: arguments and help; the commands are implemented in `commands/`.

Large dependencies are imported only when a command needs them, so that `--help`, `keys` and the
error for a mistyped key are printed at once.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from fireopd_jax.commands.bench import bench
from fireopd_jax.commands.options import (
    AnyModel,
    Dtype,
    Greedy,
    IgnoredKeys,
    OfRun,
    Slots,
    Temperature,
    Template,
    Tensor,
    comma_separated,
    known_dtype,
    temperature_of,
)
from fireopd_jax.config import UserError

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
# transformers is used for tokenizers only; silence its warning that PyTorch is missing.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

app = typer.Typer(
    name="fireopd",
    help="On-policy distillation of language models, native to JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(bench, name="bench")

Layers = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG.yaml | key=value]...",
        help="Files, merged left to right, then overrides such as optim.learning_rate=1e-6.",
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Resolve and check the configuration, print it, exit.")
]
KEYS = "`fireopd keys` lists every key with type, default and meaning; `fireopd keys rollout` one \
section of them. Values are YAML; quote those with spaces: 'student.lora={rank: 16}'."


@app.command(epilog=KEYS)
def train(settings: Layers = None, dry_run: DryRun = False) -> None:
    """Distil: load or make the models, train the student, evaluate it before and after."""
    from fireopd_jax.commands.train import launch

    launch("train", settings or [], dry_run)


@app.command(epilog=KEYS)
def sft(settings: Layers = None, dry_run: DryRun = False) -> None:
    """Run only the supervised training of a run: of its teachers and its student."""
    from fireopd_jax.commands.train import launch

    launch("sft", settings or [], dry_run)


@app.command(epilog=KEYS)
def data(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE | CONFIG.yaml | key=value]...",
            help="Rows (files, folders, patterns, names on the hub), or a run's configuration.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Show what a run would make of its rows: columns, prompts, lengths, routes, problems."""
    from fireopd_jax.commands.data import show

    show(sources or [], as_json)


@app.command()
def keys(
    prefix: Annotated[
        str | None, typer.Argument(help="A section or a key, such as rollout or method.filter.")
    ] = None,
) -> None:
    """List the keys of the configuration: all, or those of one section."""
    from fireopd_jax.commands.keys import lines

    for line in lines(prefix or ""):
        print(line)


@app.command("eval")
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="A run, a model's folder, a name on the hub, or a file of graded responses."
        ),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[key=value]...",
            help="Overrides: eval.*; with --set also data.answer_column and the like.",
        ),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="[NAME=]FILE",
            help="Problems with answers; may be repeated. By default a run's held-out problems.",
        ),
    ] = None,
    name: OfRun = "student",
    step: Annotated[
        int | None, typer.Option(help="Of a run: a checkpoint's step; by default the end.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Responses per problem; by default 8, greedy 1.")
    ] = None,
    problems: Annotated[
        int | None,
        typer.Option(min=1, help="Problems per set, chosen by hash; by default all."),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum response length; by default 1024.")
    ] = None,
    greedy: Greedy = False,
    temperature: Temperature = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="By default 1.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    against: Annotated[
        str | None,
        typer.Option(help="Compare with another model, run or file, paired by question."),
    ] = None,
    against_model: Annotated[
        str, typer.Option(help="Of a run to compare with: which of its models.")
    ] = "student",
    out: Annotated[
        Path | None, typer.Option(help="Write the graded responses here, as JSON lines.")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here, too.")
    ] = None,
    chat_template: Template = None,
    dtype: Dtype = None,
    slots: Slots = None,
    tensor: Tensor = 1,
    ignore_config_keys: IgnoredKeys = None,
) -> None:
    """Grade a model on problems with answers; print avg@k, pass@k, maj@k, intervals as JSON."""
    from fireopd_jax.commands.evaluate import EvalOptions, Evaluated, evaluate_to, show

    options = EvalOptions(
        sets=tuple(sets or ()),
        settings=tuple(settings or ()),
        samples=samples,
        problems=problems,
        max_tokens=max_tokens,
        temperature=temperature_of(greedy, temperature, None),
        top_p=top_p,
        seed=seed,
        chat_template=chat_template,
        dtype=known_dtype(dtype),
        slots=slots,
        tensor=tensor,
        ignore_config_keys=comma_separated(ignore_config_keys),
    )
    other = None if against is None else Evaluated(against, against_model)
    one = Evaluated(model, name, step)
    found = evaluate_to(one, options, against=other, out=out, figures=figures)
    show(found, flat=not (options.sets or other or one.file))


@app.command()
def generate(
    model: AnyModel,
    prompts: Annotated[
        str,
        typer.Option(
            help="Rows as for training (.jsonl, .parquet, .csv ...), or .txt with a prompt a line; "
            "- is standard input, JSON lines or text."
        ),
    ] = "-",
    out: Annotated[
        str, typer.Option(help="File to write, which must not exist; - is standard output.")
    ] = "-",
    prompt_column: Annotated[
        str | None,
        typer.Option(help="Column of the prompt (text or messages); by default by its name."),
    ] = None,
    chat_template: Template = None,
    name: OfRun = "student",
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum response length.")] = 256,
    min_tokens: Annotated[int, typer.Option(min=0, help="Minimum response length.")] = 0,
    samples: Annotated[int, typer.Option(min=1, help="Responses per prompt.")] = 1,
    greedy: Greedy = False,
    temperature: Temperature = None,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 is off.")] = 0,
    min_p: Annotated[float, typer.Option(min=0, max=1)] = 0.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends a response; may be repeated.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Plain-text prompts: no template, no special tokens.")
    ] = False,
    bos: Annotated[
        bool, typer.Option("--bos", help="With --raw: begin with the BOS that the tokenizer adds.")
    ] = False,
    logprobs: Annotated[bool, typer.Option(help="Write each token's log-prob.")] = True,
    dtype: Dtype = None,
    seed: Annotated[int, typer.Option()] = 0,
    slots: Slots = None,
    tensor: Tensor = 1,
    ignore_config_keys: IgnoredKeys = None,
) -> None:
    """Sample responses to prompts; a killed command that writes a file can be resumed."""
    from fireopd_jax.commands.journal import say

    say("starting")  # The imports below take seconds.
    from fireopd_jax.commands.generate import GenerateOptions, generate_to_file

    options = GenerateOptions(
        max_tokens=max_tokens,
        samples=samples,
        temperature=temperature_of(greedy, temperature, 1.0),
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        min_tokens=min_tokens,
        stop=tuple(stop or ()),
        seed=seed,
        raw=raw,
        bos=bos,
        chat_template=chat_template,
        dtype=known_dtype(dtype),
    )
    generate_to_file(
        model,
        prompts,
        out,
        options,
        name=name,
        column=prompt_column,
        slots=slots,
        tensor=tensor,
        logprobs=logprobs,
        ignore_config_keys=comma_separated(ignore_config_keys),
    )


@app.command()
def serve(
    model: AnyModel,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is all of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free port.")] = 8000,
    model_id: Annotated[
        str | None, typer.Option("--name", help="Model id in the API; by default MODEL.")
    ] = None,
    name: OfRun = "student",
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=2, help="Longest prompt and response; by default the model's, at most 4096."
        ),
    ] = None,
    slots: Slots = None,
    queue: Annotated[
        int, typer.Option(min=1, help="Open responses and scores, beyond which clients must wait.")
    ] = 1024,
    chat_template: Template = None,
    dtype: Dtype = None,
    tensor: Tensor = 1,
    ignore_config_keys: IgnoredKeys = None,
) -> None:
    """Serve a model over an OpenAI-compatible HTTP API: texts, and log-probs of given tokens.

    If FIREOPD_SERVE_KEY is set, clients must send it as their API key.
    """
    from fireopd_jax.commands.serve import ServeCommand

    settings = ServeCommand(
        model=model,
        name=name,
        host=host,
        port=port,
        model_id=model_id,
        max_tokens=max_tokens,
        slots=slots,
        queue=queue,
        chat_template=chat_template,
        dtype=known_dtype(dtype),
        tensor=tensor,
        ignore_config_keys=comma_separated(ignore_config_keys),
    )
    settings.run()


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
        float, typer.Option(min=0, help="Maximum size of a weight file, in GiB.")
    ] = 4.0,
) -> None:
    """Export a model of a run as a Hugging Face folder, which `transformers` loads."""
    from fireopd_jax.session.exporting import export_run

    size = int(max_shard_gib * 2**30)
    export_run(run, to, model=model, step=step, dtype=known_dtype(dtype), max_shard_bytes=size)
    print(to)


@app.command()
def verify(
    file: Annotated[Path | None, typer.Option("--json", help="File to write.")] = None,
) -> None:
    """Check objectives and statistics on this machine against NumPy; exit status 1 on failure."""
    from fireopd_jax.runtime.xla_flags import several_cpu_devices

    several_cpu_devices()
    from fireopd_jax.verify.command import verify

    if not verify(file):
        raise typer.Exit(1)


@app.command()
def env() -> None:
    """Print versions, machine and devices as JSON, for bug reports."""
    from fireopd_jax.commands.env import show

    show()


@app.command(hidden=True)
def schema(out: Annotated[Path, typer.Argument()]) -> None:
    """Write the JSON schema of the configuration, used by `keys` and by editors."""
    from fireopd_jax.commands.schema import write

    write(out)


def main() -> None:
    """Run the command line; a `UserError` is one line on stderr and exit status 2."""
    from fireopd_jax.runtime.warnings import warnings_on_stderr
    from fireopd_jax.runtime.xla_flags import compile_quickly_on_cpu

    compile_quickly_on_cpu()
    try:
        with warnings_on_stderr():
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
