"""The pytrees that the stages pass to one another.

    prompts -> roll out -> Rollout -> score -> Scores -> filter, reweight -> Batch -> update

Index t of every `[B, T]` array refers to response token t. `mask` is true on the sampled tokens,
the end-of-sequence token included, and false after it.

B rows, P and Q prompt tokens, T response tokens, R reference tokens, S slots of a support, E width
of a teacher's hidden states, M audited chunks.
"""

import dataclasses
import enum
from typing import TypeVar, dataclass_transform

import jax
import numpy as np
from jaxtyping import Bool, Float, Float32, Int32

Array = jax.Array | np.ndarray
Class = TypeVar("Class")


@dataclass_transform(frozen_default=True)
def pytree(cls: type[Class]) -> type[Class]:
    """Return `cls` as a frozen dataclass and a JAX pytree with every field as a child.

    Unflattening skips `__init__`: JAX puts tracers, shapes and sentinels into the leaves, which a
    type-checked constructor would reject.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    names = tuple(field.name for field in dataclasses.fields(cls))  # pyright: ignore[reportArgumentType]
    keys = tuple(jax.tree_util.GetAttrKey(name) for name in names)

    def flatten(value: Class):
        return tuple(getattr(value, name) for name in names), None

    def flatten_with_keys(value: Class):
        children, _ = flatten(value)
        return tuple(zip(keys, children, strict=True)), None

    def unflatten(_: None, children) -> Class:
        value = object.__new__(cls)
        for name, child in zip(names, children, strict=True):
            object.__setattr__(value, name, child)
        return value

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


@pytree
class Prompts:
    """The prompts of a batch, for student and teachers. A row of length 0 is padding."""

    tokens: Int32[Array, "B P"]
    """Prompt token ids in the student's template, right-padded."""
    length: Int32[Array, " B"]
    teacher_tokens: Int32[Array, "B Q"]
    """The same prompt in the template of the row's own teacher, right-padded."""
    teacher_length: Int32[Array, " B"]
    teacher: Int32[Array, " B"]
    """Route: index of the teacher that scores the row."""
    row: Int32[Array, " B"]
    """Index into the data set."""
    sample_id: Int32[Array, " B"]
    """Sampling is a function of the run's seed, this id and the token position."""
    group: Int32[Array, " B"]
    """Equal for the rows of one prompt."""
    reference: Int32[Array, "B R"] | None = None
    """A reference response, right-padded, its end-of-sequence token included."""
    reference_length: Int32[Array, " B"] | None = None


class Writer(enum.IntEnum):
    """Source of a response token."""

    STUDENT = 0
    """Sampled from the student in this step."""
    REFERENCE = 1
    """From a reference response: of the data set, or sampled from another model earlier."""
    REWRITER = 2
    """Sampled from the teacher, after a prompt that quotes the student's response."""


class Rewritten(enum.IntEnum):
    """Outcome of a row where responses are rewritten; `KEPT` and `DONE` rows are trained on."""

    KEPT = 0
    """The student's response was not to be rewritten."""
    DONE = 1
    """The rewrite stands in the place of the student's response."""
    CUT = 2
    """The rewrite reached the length limit."""
    OVERLONG = 3
    """Not even the prompt without a quotation fits into its limit."""
    SHORT = 4
    """The rewrite is shorter than the guard against a collapse of lengths allows."""
    WORSE = 5
    """The student's response was graded as right, and its rewrite as wrong."""


@pytree
class Original:
    """The student's responses before they were rewritten."""

    tokens: Int32[Array, "B T"]
    mask: Bool[Array, "B T"]
    model_logprob: Float32[Array, "B T"]
    """Log-probability under the raw model at temperature 1."""
    outcome: Int32[Array, " B"]
    """A `Rewritten` for each row."""
    rewrite: Bool[Array, "B T"]
    """Tokens of each rewrite in `rollout.tokens`, whose mask is false where it was dropped."""


@pytree
class Audit:
    """Comparisons of chunks of a response with what the teacher writes in their place.

    Chunks of a row are disjoint and within the response.
    """

    anchor: Int32[Array, "B M"]
    """Position of each chunk's first token in the response, ascending; -1 where there is none."""
    length: Int32[Array, "B M"]
    """Tokens of each chunk; 0 where there is none."""
    agreement: Float32[Array, "B M"]
    """k_sem: similarities to the teacher's continuations, each in [0, 1], summed."""
    samples: Float32[Array, "B M"]
    """N, the number of continuations; a chunk without any is not audited."""


@pytree
class TokenStats:
    """A model's statistics at each position of `rollout.tokens`."""

    logprob: Float32[Array, "B T"]
    entropy: Float32[Array, "B T"]
    """Entropy over the whole vocabulary, in nats; NaN where a served teacher does not return it."""
    support: Float32[Array, "B T S"] | None = None
    """In the update only: the student's log-probabilities at `scores.support.ids`."""
    divergence: Float32[Array, "B T"] | None = None
    """In the update only: the exact divergence that the loss needs."""


@pytree
class ModelScores:
    """Scores of each response token by one model."""

    stats: TokenStats
    top_ids: Int32[Array, "B T K"] | None = None
    top_logprob: Float32[Array, "B T K"] | None = None
    at_ids: Float32[Array, "B T N"] | None = None
    """Log-probabilities at the token ids that were asked for."""
    hidden: Float[Array, "B T E"] | None = None
    token_weight: Float32[Array, "B T"] | None = None


@pytree
class TopTokens:
    """The K most probable token ids of student and teacher at each token, likeliest first."""

    student_ids: Int32[Array, "B T K"]
    student_logprob: Float32[Array, "B T K"]
    teacher_ids: Int32[Array, "B T K"] | None = None
    """None where no teacher is scored here."""
    teacher_logprob: Float32[Array, "B T K"] | None = None


@pytree
class EarlyScores:
    """Scores that a host stage needed, or got from servers, before the score program."""

    student: ModelScores
    """Top-K ids are -1 where a served teacher did not return their log-probabilities."""
    teacher: ModelScores | None = None
    """Scores by teachers behind HTTP; None where the method's teachers are scored here, or not."""


@pytree
class Rollout:
    """Responses, with the sampler's log-probabilities."""

    prompts: Prompts
    tokens: Int32[Array, "B T"]
    mask: Bool[Array, "B T"]
    logprob: Float32[Array, "B T"]
    """Log-probability under the distribution sampled from: after temperature and filters."""
    model_logprob: Float32[Array, "B T"]
    """Log-probability under the raw model at temperature 1."""
    finished: Bool[Array, " B"]
    """Whether the response ended with a stop token, not by the length limit."""
    version: Int32[Array, "B T"]
    """Update count of the parameters that each token was sampled with."""
    writer: Int32[Array, "B T"]
    """Source of each token: a `Writer`."""
    correct: Float32[Array, " B"] | None = None
    """1 where the response was graded as right, 0 where not; None where nothing was graded."""
    original: Original | None = None
    """The student's own responses, where the method rewrites them."""
    leaked: Bool[Array, " B"] | None = None
    """Whether the response speaks of privileged information; None where that is not counted."""
    early: EarlyScores | None = None
    """Scores from before the score program, which does not compute them again."""
    audit: Audit | None = None
    """Chunks that were compared with a teacher's text; None for methods without an audit."""
    policy: TokenStats | None = None
    """The student's statistics from the decoding steps: of its unfiltered distribution at the
    rollout's temperature. None where they are not the scores of the student."""


@pytree
class Support:
    """The token ids at which student and teacher are compared: S slots per position."""

    ids: Int32[Array, "B T S"]
    """Distinct token ids; -1 in empty slots."""
    teacher: Float32[Array, "B T S"]
    """The teacher's log-probabilities, normalised over the whole vocabulary; -inf if empty."""


@pytree
class Overlap:
    """Overlap of the top-K token ids of student and teacher.

    References: arXiv 2604.13016, Eq. 6, 7, 9 and 10.
    """

    ratio: Float32[Array, "B T"]
    """Number of token ids in both top-K sets, over K."""
    student_mass: Float32[Array, "B T"]
    """The student's probability mass on the common token ids."""
    teacher_mass: Float32[Array, "B T"]
    advantage: Float32[Array, "B T"]
    """Mean over the common ids of p (log q - log p), p and q renormalised on them; 0 if none."""


@pytree
class Margin:
    """Gap in mean advantage between a prompt's right and wrong responses, and the added shift.

    References: arXiv 2605.03677 (Uni-OPD), Eq. 23.
    """

    shift: Float32[Array, " B"]
    """Added to every advantage of a row: + d / 2 if right, - d / 2 if wrong."""
    gap: Float32[Array, " B"]
    """mean s+ - mean s- of the row's group, s the mean advantage; 0 if all are right or wrong."""


@pytree
class Chunks:
    """Audited chunks, as values of their tokens."""

    audited: Bool[Array, "B T"]
    """True on the tokens of audited chunks."""
    target: Float32[Array, "B T"]
    """Posterior weight of the token's chunk, in [0, 1]; 0 outside of audited chunks."""
    prior: Float32[Array, "B T"]
    """Length-normalised probability of the token's chunk; 0 outside of audited chunks."""
    baseline: Float32[Array, " B"]
    """Mean target of the chunks of the prompt's other responses; 0 where they have none."""


@pytree
class Scores:
    """Scores of a rollout by student and teacher, at the rollout's temperature; no gradient."""

    student: TokenStats
    teacher: TokenStats | None
    """None where the teacher returns text without log-probabilities."""
    base: TokenStats | None = None
    """The base policy's statistics, for losses with extrapolation."""
    support: Support | None = None
    overlap: Overlap | None = None
    teacher_hidden: Float[Array, "B T E"] | None = None
    """The teacher's final hidden states, for losses over the whole vocabulary."""
    reverse_kl: Float32[Array, "B T"] | None = None
    """KL(student || teacher) over the whole vocabulary."""
    margin: Margin | None = None
    token_weight: Float32[Array, "B T"] | None = None
    """FiRe-OPD's raw token weight with log V in place of both maxima, from the teacher's head
    kernel; None unless the reweighting asks for it."""
    chunks: Chunks | None = None
    base_hidden: Float[Array, "B T E"] | None = None
    """The base policy's final hidden states, for losses with an anchor over the vocabulary."""

    @property
    def teacher_stats(self) -> TokenStats:
        """The teacher's statistics; raises ValueError where there are none."""
        if self.teacher is None:
            raise ValueError("the teacher's log-probabilities are needed, but it returns only text")
        return self.teacher

    @property
    def advantage(self) -> Float32[Array, "B T"]:
        """A = log pi_T - log pi_S of each response token, in nats."""
        return self.teacher_stats.logprob - self.student.logprob


@dataclasses.dataclass(frozen=True)
class StageContext:
    """Inputs of filters and reweightings besides the scores; built once per step."""

    mask: Bool[Array, "B T"]
    """True on response tokens; in `all_of`, on those that the previous filters kept."""
    teacher: Int32[Array, " B"]
    """Route: index of the teacher that scores the row."""
    num_teachers: int = 1
    vocab_size: int | None = None
    """Size of the student's vocabulary."""
    tokens: Int32[Array, "B T"] | None = None
    sample_id: Int32[Array, " B"] | None = None
    progress: Float32[Array, ""] | float = 0.0
    """Fraction of the updates done, 0 to 1."""
    special: tuple[int, ...] | None = None
    """Token ids of `MethodConfig.texts`."""
    stop: tuple[int, ...] | None = None
    """Token ids that end a response."""

    def masked(self, mask: Bool[Array, "B T"]) -> "StageContext":
        """Return the same context restricted to the tokens of `mask`."""
        return dataclasses.replace(self, mask=mask)


@pytree
class Batch:
    """A rollout ready for the update; the loss is a plain sum over its tokens."""

    rollout: Rollout
    scores: Scores
    weight: Float32[Array, "B T"]
    """Weight of each token by the reweighting, usually of mean 1 over a trajectory."""
    coefficient: Float32[Array, "B T"]
    """Each token's share of the loss: 0 where dropped or masked; sums to 1."""
    row: Int32[Array, "B T"] | None = None
    """In the update only, where rows are packed: the row of each token; tokens of one row are next
    to one another. None: one row of the batch in each row of the arrays."""
