"""The few pytrees that the stages pass to one another.

    prompts -> roll out -> Rollout -> score -> Scores -> filter, reweight -> Batch -> update

Every `[B, T]` array speaks of the response token at the same index. `mask` is true on the tokens
that the sampler drew, the end-of-sequence token included, and false after it.

B rows, P and Q prompt tokens, T response tokens, R reference tokens, S slots of a support, E width
of a teacher.
"""

import dataclasses
from typing import TypeVar, dataclass_transform

import jax
import numpy as np
from jaxtyping import Bool, Float, Float32, Int32

Array = jax.Array | np.ndarray
Class = TypeVar("Class")


@dataclass_transform(frozen_default=True)
def pytree(cls: type[Class]) -> type[Class]:
    """Make `cls` a frozen dataclass and a JAX pytree whose every field is a child.

    Rebuilding skips `__init__`: JAX puts tracers, shapes and sentinels into the leaves, which a
    checked constructor would refuse.
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
    """What student and teachers are asked. A row of length 0 is padding: it is never ranked."""

    tokens: Int32[Array, "B P"]
    """Prompt ids of the student, right-padded."""
    length: Int32[Array, " B"]
    teacher_tokens: Int32[Array, "B Q"]
    """The same prompt in the template of the row's own teacher, right-padded."""
    teacher_length: Int32[Array, " B"]
    teacher: Int32[Array, " B"]
    """Route: index of the teacher that scores the row."""
    row: Int32[Array, " B"]
    """Index into the data set, for answers and reports."""
    sample_id: Int32[Array, " B"]
    """Identity of the row's random stream."""
    group: Int32[Array, " B"]
    """Rows of one prompt share their group."""
    reference: Int32[Array, "B R"] | None = None
    """A reference response, right-padded, its end-of-sequence token included."""
    reference_length: Int32[Array, " B"] | None = None


@pytree
class Rollout:
    """Responses, and what the sampler knew of them."""

    prompts: Prompts
    tokens: Int32[Array, "B T"]
    mask: Bool[Array, "B T"]
    logprob: Float32[Array, "B T"]
    """Of the distribution really sampled: after temperature and filters."""
    model_logprob: Float32[Array, "B T"]
    """Of the raw model at temperature 1."""
    finished: Bool[Array, " B"]
    """The response ended with a stop token (not by its length limit)."""
    version: Int32[Array, "B T"]
    """Update count of the parameters that drew each token."""


@pytree
class TokenStats:
    """A model's view of `rollout.tokens`."""

    logprob: Float32[Array, "B T"]
    entropy: Float32[Array, "B T"]
    """Nats over the whole vocabulary."""
    support: Float32[Array, "B T S"] | None = None
    """Of a student that learns: log-probabilities of `scores.support.ids`."""
    divergence: Float32[Array, "B T"] | None = None
    """Of a student that learns: the divergence from its teacher that the loss has asked for."""


@pytree
class Support:
    """The words that student and teacher are compared at, S slots a position."""

    ids: Int32[Array, "B T S"]
    """-1 in a slot that is empty; no word stands twice."""
    teacher: Float32[Array, "B T S"]
    """The teacher's log-probabilities, over the whole vocabulary."""


@pytree
class Overlap:
    """How far the K most probable words of student and teacher are the same.

    References: arXiv 2604.13016, Eq. 6, 7, 9 and 10.
    """

    ratio: Float32[Array, "B T"]
    """Share of the K words that both name."""
    student_mass: Float32[Array, "B T"]
    """The student's probability of the common words."""
    teacher_mass: Float32[Array, "B T"]
    advantage: Float32[Array, "B T"]
    """Mean over the common words of p (log q - log p), both renormalised on them; 0 of none."""


@pytree
class Margin:
    """How far apart a prompt's right and wrong responses are, and what would part them enough.

    References: arXiv 2605.03677 (Uni-OPD), Eq. 23.
    """

    shift: Float32[Array, " B"]
    """Added to every advantage of a row: + d / 2 of a right one, - d / 2 of a wrong one."""
    gap: Float32[Array, " B"]
    """mean s+ - mean s- of the row's group, s the mean advantage; 0 where all are of one sort."""


@pytree
class Scores:
    """What the models say of a rollout, each at the rollout's temperature; no gradient."""

    student: TokenStats
    teacher: TokenStats
    base: TokenStats | None = None
    """The policy that a method extrapolates from."""
    support: Support | None = None
    overlap: Overlap | None = None
    teacher_hidden: Float[Array, "B T E"] | None = None
    """The teacher's final hidden states, for losses over the whole vocabulary."""
    reverse_kl: Float32[Array, "B T"] | None = None
    """KL(student || teacher) over the whole vocabulary."""
    correct: Float32[Array, " B"] | None = None
    """1 where the response was graded as right, 0 where not."""
    margin: Margin | None = None


@dataclasses.dataclass(frozen=True)
class Rows:
    """What a filter or a weighting may know of the rows besides their scores."""

    mask: Bool[Array, "B T"]
    teacher: Int32[Array, " B"]
    """Route: index of the teacher that scores the row."""
    num_teachers: int = 1
    vocab_size: int | None = None
    tokens: Int32[Array, "B T"] | None = None
    sample_id: Int32[Array, " B"] | None = None
    progress: Float32[Array, ""] | float = 0.0
    """Share of the updates that are done, 0 to 1."""
    recent: Float32[Array, "W B 2"] | None = None
    """Scores and teachers of the rows of earlier batches; NaN where there was none."""
    special: tuple[int, ...] | None = None
    """Ids that the method's filter has named by their texts."""
    stop: tuple[int, ...] | None = None
    """Ids that end a response."""

    def masked(self, mask: Bool[Array, "B T"]) -> "Rows":
        """Look at some of the tokens only."""
        return dataclasses.replace(self, mask=mask)


@pytree
class Batch:
    """A rollout ready for the update; its sums over any micro-batches are the global loss."""

    rollout: Rollout
    scores: Scores
    weight: Float32[Array, "B T"]
    """The method's weight of each token, mean 1 over a trajectory."""
    coefficient: Float32[Array, "B T"]
    """Each token's share of the loss: 0 where dropped or masked, sums to 1."""
