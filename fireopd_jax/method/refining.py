"""What happens to a rollout between sampling and scoring; the work is done on the host.

    rollout -> nothing | rewrites by the teacher (TRD) | audited chunks (OmniOPD) -> rollout

The host stages of `session/` do what these settings ask for.
"""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from fireopd_jax.config import Section, UnitInterval, config
from fireopd_jax.evaluation.similarity import Edit, Similarities
from fireopd_jax.method.chunks import chunk_sizes
from fireopd_jax.text.templates import check_template, needs_reference


@config
class NoRefine(Section):
    """Rollouts are scored as they were sampled."""

    kind: Literal["none"] = "none"

    gives: ClassVar[frozenset[str]] = frozenset()
    """Fields of the rollout that its host stage sets."""
    asks_teacher: ClassVar[bool] = False
    """Whether the teacher has to write text."""
    rewrites: ClassVar[bool] = False
    """Whether the responses that are trained on are not the student's."""
    prompt: ClassVar[str | None] = None
    """Prompt that asks for a rewrite."""
    privileged: ClassVar[bool] = False
    """Whether the rows' privileged solutions are needed."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Fields of the rollout that another host stage must set before."""

    def problems(self, max_tokens: int) -> Iterator[str]:
        """Yield what cannot be for responses of at most `max_tokens` tokens: nothing."""
        yield from ()


@config
class Rewrite(Section):
    """The teacher rewrites each response; the rewrite is scored and trained on.

    The student scores a rewrite after its own prompt, the teacher after the prompt that asked for
    it. The teacher is that of `method.teacher`: frozen, or the student itself.

    References: arXiv 2606.08432 (TRD).
    """

    kind: Literal["rewrite"] = "rewrite"
    prompt: str = "maths"
    """Prompt that asks for the rewrite: `maths` or `code`, `maths_reference` or `code_reference`
    with the row's privileged solution (`data.privileged_column`); or a text with `{problem}`,
    `{attempt}` and, if wanted, `{reference}`, in place of the last user message."""
    score_after: Literal["rewrite", "prompt"] = "rewrite"
    """Prompt after which the teacher scores a rewrite: the one that asked for it, or `prompt`: that
    of `method.teacher`, the authors' switch for vanilla scoring."""
    score_template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of the teacher's chat template that hold for scoring only, such as
    `{enable_thinking: true}`: the authors' later code of self-distillation has it."""
    fraction: UnitInterval = 1.0
    """Probability that a row is trained on its rewrite; other rows are trained on the student's own
    response, scored after the teacher's own prompt. 1 is the paper's."""
    max_tokens: PositiveInt | None = None
    """Longest rewrite, at most `rollout.max_tokens`, its default."""
    max_prompt_tokens: PositiveInt | None = None
    """Longest prompt of the rewriter: the quoted response is cut first, then the privileged
    solution. By default enough for everything."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature of rewrites."""
    top_p: UnitInterval = 1.0
    """Nucleus of the sampling of rewrites; 1 is off."""
    top_k: NonNegativeInt = 0
    """Sample rewrites from this many most likely tokens; 0 is off."""
    min_length_ratio: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Smallest length of a rewrite relative to the response that it replaces; shorter ones are
    dropped. Guards against a collapse of lengths; 0 is off, as in the paper."""
    drop_worse: bool = False
    """Drop rows whose response was graded as right and whose rewrite as wrong. Needs answers."""

    gives: ClassVar[frozenset[str]] = frozenset({"rollout.original"})
    asks_teacher: ClassVar[bool] = True
    rewrites: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raise ValueError for a prompt that is neither a known name nor a template."""
        check_template(self.prompt, "rewrite", ("problem", "attempt"))

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """Yield what only the rewriter's own prompt needs."""
        if self.score_after == "prompt":
            yield "score_template_kwargs", "with score_after: prompt"

    def problems(self, max_tokens: int) -> Iterator[str]:
        """Yield what cannot be for responses of at most `max_tokens` tokens: nothing."""
        yield from ()

    @property
    def needs(self) -> frozenset[str]:
        """Fields of the rollout that another host stage must set before."""
        return frozenset({"rollout.correct"}) if self.drop_worse else frozenset()

    @property
    def privileged(self) -> bool:
        """Whether the rows' privileged solutions are needed."""
        return needs_reference(self.prompt)


@config
class Audit(Section):
    """The teacher continues the student's most uncertain chunks, and the texts are compared.

    The responses stay; no log-probability of the teacher is needed.

    References: arXiv 2606.01476 (OmniOPD).
    """

    kind: Literal["audit"] = "audit"
    chunks: PositiveInt | None = None
    """Audited chunks per response, M. null: the paper's 10, or fewer for short responses, so that
    at most half of a response of `rollout.max_tokens` is audited."""
    chunk_tokens: PositiveInt | None = None
    """Tokens of a chunk, C. null: the paper's 50, or an eighth of `rollout.max_tokens`."""
    continuations: PositiveInt = 10
    """Continuations per chunk, N, each sampled by the teacher after the same prefix."""
    similarity: Similarities = Edit()
    """Similarity of a chunk and a continuation, from 0 to 1."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Sampling temperature of continuations; greedy ones would all be equal."""
    top_p: UnitInterval = 1.0
    """Nucleus of the sampling of continuations; 1 is off."""

    gives: ClassVar[frozenset[str]] = frozenset({"rollout.audit"})
    needs: ClassVar[frozenset[str]] = frozenset()
    asks_teacher: ClassVar[bool] = True
    rewrites: ClassVar[bool] = False
    prompt: ClassVar[str | None] = None
    privileged: ClassVar[bool] = False

    def sizes(self, max_tokens: int) -> tuple[int, int]:
        """Return (M, C) for responses of at most `max_tokens` tokens."""
        chunks, size = chunk_sizes(max_tokens)
        return self.chunks or chunks, self.chunk_tokens or size

    def problems(self, max_tokens: int) -> Iterator[str]:
        """Yield chunks that are longer than any response, so that nothing would be audited."""
        if (self.chunk_tokens or 0) > max_tokens:
            yield (
                f"chunk_tokens={self.chunk_tokens}: no response has that many tokens, "
                f"rollout.max_tokens={max_tokens}; expected less, or null"
            )


Refines = Annotated[NoRefine | Rewrite | Audit, Field(discriminator="kind")]
