"""Configuration of the data: which sources, which of their columns, which rows are kept.

SourceConfig (where rows are, what their columns mean) -> Source (with weight and teacher)
-> DataConfig (one source, or a mixture)
"""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from fireopd_jax.config import LOCAL, Section, config


@config
class SourceConfig(Section):
    """Rows of one origin, and the meaning of their columns.

    A column may be a path into objects: `reward_model.ground_truth`; a column whose own name has
    the dot comes first. null recognises the column by its name, "" uses none.
    """

    path: Annotated[str | tuple[str, ...], LOCAL]
    """A .jsonl, .json, .parquet, .csv, .tsv or .arrow file (JSON, CSV also as .gz, .bz2 or .zst), a
    pattern such as `data/*.jsonl`, a folder written by `save_to_disk` or with data files,
    `OWNER/NAME` of the Hugging Face hub, or a built-in task (`builtin:addition-D`,
    `builtin:subtraction-D`); or a list of them, concatenated."""
    subset: str | None = None
    """Of a hub's data set: its subset (`name` of `datasets.load_dataset`), such as `main`."""
    split: str | None = None
    """Of a hub's data set or a folder: its split, such as `test` or `train[:100]`. null: `train`,
    or the only one."""
    revision: str | None = None
    """Of a hub's data set: branch, tag or commit. null: its newest."""
    prompt_column: str | None = None
    """Column of the prompt: a text, or a list of messages with `role` and `content`. null: the
    first of prompt, messages, conversations, problem, question, query, instruction."""
    answer_column: str | None = None
    """Column of the answer that responses are graded against. null: the first of answer,
    reward_model.ground_truth, ground_truth, final_answer, expected_answer, extra_info.answer,
    solution."""
    reference_column: str | None = None
    """Column of a reference response. null: the first of reference, completion, response, output,
    solution (if it is not the answer); else the last assistant turn of the conversation."""
    privileged_column: str | None = None
    """Column of the solution that only the teacher sees, for methods with privileged information.
    null: `privileged`, if a row has it, else the reference response."""
    tools_column: str | None = None
    """Column of the tools that the chat template describes. null: `tools`, if a row has it."""
    teacher_column: str | None = None
    """Column with the name of each row's teacher, or with a value that `routes` maps to one. null:
    there is a single teacher, or each source of the mixture names its own."""
    last_turn: Literal["reference", "prefill"] | None = None
    """A conversation that ends with an assistant's turn: it is the `reference` response to the
    turns before, or the beginning of the response (`prefill`). null: prefill in the column
    `prompt`, where TRL has it so, else reference."""


@config
class Source(SourceConfig):
    """One source of a mixture."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the prompts, relative to the other sources' weights, whatever their sizes."""
    teacher: str | None = None
    """Teacher of all rows of this source."""

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """Yield the column that the source's own teacher replaces."""
        if self.teacher is not None:
            yield "teacher_column", "with teacher, which all rows of the source have"


@config
class DataConfig(SourceConfig):
    """Sources of the prompts."""

    path: Annotated[str | tuple[str, ...], LOCAL] = "builtin:addition-2"
    """A .jsonl, .json, .parquet, .csv, .tsv or .arrow file (JSON, CSV also as .gz, .bz2 or .zst), a
    pattern such as `data/*.jsonl`, a folder written by `save_to_disk` or with data files,
    `OWNER/NAME` of the Hugging Face hub, or a built-in task (`builtin:addition-D`,
    `builtin:subtraction-D`); or a list of them, concatenated."""
    mixture: tuple[Source, ...] = ()
    """Sources with weights, instead of `path`: `[{path: a.jsonl, weight: 3, teacher: math}, ...]`.
    Each has the keys of columns and of the hub that this section has."""
    routes: dict[str, str] = dataclasses.field(default_factory=dict)
    """Value of `teacher_column` -> teacher, such as `{openai/gsm8k: math, "code*": code}`; the
    first pattern that matches counts. Empty: the column names the teachers themselves."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Rows that repeat the prompt of an earlier row: `drop` drops and counts them."""
    min_prompt_tokens: Annotated[int, Field(ge=0)] = 0
    """Shortest prompt, as tokenized for the student; rows with a shorter one are dropped."""
    max_prompt_tokens: Annotated[int, Field(ge=1)] = 512
    """Longest prompt, as tokenized for the student and for the row's teacher; prompts are padded
    to this length."""
    overlong: Literal["drop", "error"] = "drop"
    """Rows with a longer prompt: `drop` drops and counts them, `error` raises an error."""
    grader: str = "math"
    """How responses are graded: `math` by value, `exact` by text, `choice` by letter, `code` by
    running tests, or the dotted name of a function (response, answer) -> bool. Built-in tasks have
    a rule of their own for `math`."""

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The sources of the mixture, or the one that the section itself describes."""
        return self.mixture or (self,)

    @property
    def weights(self) -> tuple[float, ...]:
        """Weight of each source; none without a mixture."""
        return tuple(source.weight for source in self.mixture)

    @property
    def routed(self) -> bool:
        """Whether every source says which teacher its rows have."""
        return all(
            source.teacher_column or (isinstance(source, Source) and source.teacher)
            for source in self.sources
        )

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """Yield the keys of the single source where a mixture is given."""
        if self.mixture:
            for name in SourceConfig.__dataclass_fields__:
                yield name, "with mixture: expected in each of its sources"
        elif self.routes and self.teacher_column is None:
            yield "routes", "without teacher_column"
