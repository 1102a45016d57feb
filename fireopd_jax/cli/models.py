"""Commands about a model: eval, generate, chat, export."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from fireopd_jax.cli.app import app
from fireopd_jax.cli.options import (
    HOTTEST,
    LARGEST,
    LONGEST,
    MOST_SAMPLES,
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
        int | None,
        typer.Option(
            min=1, max=MOST_SAMPLES, help="Responses per problem; by default 8, greedy 1."
        ),
    ] = None,
    problems: Annotated[
        int | None,
        typer.Option(min=1, help="Problems per set, chosen by hash; by default all."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, max=LONGEST, help="Maximum response length; by default 1024."),
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
    max_tokens: Annotated[
        int, typer.Option(min=1, max=LONGEST, help="Maximum response length.")
    ] = 256,
    min_tokens: Annotated[
        int, typer.Option(min=0, max=LONGEST, help="Minimum response length.")
    ] = 0,
    samples: Annotated[
        int, typer.Option(min=1, max=MOST_SAMPLES, help="Responses per prompt.")
    ] = 1,
    greedy: Greedy = False,
    temperature: Temperature = None,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, max=LARGEST, help="0 is off.")] = 0,
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


class Compared(TyperCommand):
    """The command chat, in which `--compare` without a value is `--compare before`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; they are changed in place."""
        for at, each in enumerate(args):
            if each == "--compare" and (at + 1 == len(args) or args[at + 1].startswith("--")):
                args.insert(at + 1, "before")
                break
        return super().parse_args(ctx, args)


@app.command(cls=Compared)
def chat(
    model: Annotated[
        str | None, typer.Argument(help="A run, a model's folder, or a name on the hub.")
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="[RUN|MODEL]",
            help="Two answers side by side: a run's student before and after (--compare RUN, or "
            "RUN --compare), or MODEL's and another's (--compare OTHER, or a model of the run: "
            "teacher_NAME ...).",
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    chat_template: Template = None,
    name: OfRun = "student",
    max_tokens: Annotated[
        int, typer.Option(min=1, max=LONGEST, help="Maximum length of an answer.")
    ] = 512,
    context: Annotated[
        int | None,
        typer.Option(
            min=8, help="Maximum length of a conversation; by default the model's, at most 4096."
        ),
    ] = None,
    greedy: Greedy = False,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0, max=HOTTEST, help="By default 0.7, for answers to read; generate has 1."
        ),
    ] = None,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 0.95,
    top_k: Annotated[int, typer.Option(min=0, max=LARGEST, help="0 is off.")] = 0,
    min_p: Annotated[float, typer.Option(min=0, max=1)] = 0.0,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32 or bfloat16; by default the model's own, and float32 on a CPU, where it "
            "is faster."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="By default another one each time.")] = None,
    tensor: Tensor = 1,
    ignore_config_keys: IgnoredKeys = None,
) -> None:
    """Chat with a model, or with a run's student before and after; /help lists what to type."""
    from fireopd_jax.commands.journal import say

    say(f"opening {model or compare or 'a model'}")  # The imports below take seconds.
    from fireopd_jax.commands.chat.command import ChatCommand, some_seed
    from fireopd_jax.commands.chat.settings import Settings

    status = ChatCommand(
        model=model,
        compare=compare,
        name=name,
        system=system,
        chat_template=chat_template,
        context=context,
        settings=Settings(
            temperature=temperature_of(greedy, temperature, 0.7),
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            max_tokens=max_tokens,
            seed=some_seed() if seed is None else seed,
        ),
        dtype=known_dtype(dtype),
        tensor=tensor,
        ignore_config_keys=comma_separated(ignore_config_keys),
    ).run()
    raise typer.Exit(status)


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
        float,
        typer.Option(min=0, max=2**20, help="Maximum size of a weight file, in GiB."),
    ] = 4.0,
) -> None:
    """Export a model of a run as a Hugging Face folder, which `transformers` loads."""
    from fireopd_jax.session.exporting import export_run

    size = int(max_shard_gib * 2**30)
    export_run(run, to, model=model, step=step, dtype=known_dtype(dtype), max_shard_bytes=size)
    print(to)
