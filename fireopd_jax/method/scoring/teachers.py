"""The teacher interface, and the routing of rows to several teachers.

    rollout, token ids -> teacher.score -> log-prob, entropy, log-probs at the ids, top-K
    several teachers   -> rows sorted by route; each teacher scores its own rows in blocks

The student's scores come from the same interface. All models score at the rollout's temperature,
without gradients.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Float32, Int32

from fireopd_jax.models.language_model import LanguageModel, Params
from fireopd_jax.models.packing import Packs, Predicted, gather_tokens, scatter_tokens, states_at
from fireopd_jax.ops.head import head_gather, head_stats, head_topk
from fireopd_jax.sharding.mesh import by_rows, join_micro_batches, micro_batches
from fireopd_jax.types import Array, ModelScores, Rollout, TokenStats, pytree


@dataclasses.dataclass(frozen=True)
class ScoreOptions:
    """What is computed for each response token besides log-probability and entropy, and how."""

    k: int = 0
    """Number of most probable token ids returned; 0: none."""
    hidden: bool = False
    """Whether the final hidden states are returned."""
    strengths: tuple[float, float] | None = None
    """(alpha, beta) of FiRe-OPD's token weight, computed by the head kernel; None: no weight."""
    implementation: str | None = None
    chunk: int | None = None
    mesh: Mesh | None = None
    """Devices that the rows are sharded over."""
    pack_tokens: int | None = None
    """Tokens of one device in a forward pass, of rows packed without padding; None: rows are
    padded to the longest possible."""

    @property
    def groups(self) -> int:
        """Number of groups of rows that are packed apart: the devices."""
        return 1 if self.mesh is None else self.mesh.size


@pytree
class ScoreRows:
    """Responses and the prompts that they are scored after, one row each."""

    context: Int32[Array, "B C"]
    """Prompt token ids in the scoring model's template, right-padded."""
    context_length: Int32[Array, " B"]
    tokens: Int32[Array, "B T"]
    mask: Bool[Array, "B T"]
    ids: Int32[Array, "B T N"] | None = None
    """Token ids at which log-probabilities are returned; -1 in empty slots."""
    student_entropy: Float32[Array, "B T"] | None = None
    """The student's entropy in nats, where the teacher's head kernel computes the token weight."""


@runtime_checkable
class Teacher(Protocol):
    """Scores given token ids: a resident model, the student itself, or a served model."""

    def score(
        self, rows: ScoreRows, temperature: Array | float, options: ScoreOptions
    ) -> ModelScores:
        """Return log-probability and entropy of each token, and log-probs at `rows.ids` if any."""
        ...


@dataclasses.dataclass(frozen=True)
class Resident:
    """A model whose parameters are on the mesh."""

    model: LanguageModel
    params: Params

    def head(self, mesh: Mesh | None) -> Float[Array, "V D"]:
        """Return the output projection from hidden states to logits."""
        return self.model.head(self.params, mesh)

    def head_options(self, temperature: Array | float, options: ScoreOptions):
        """Return the keyword arguments of the head functions for this model."""
        return self.model.head_options(
            temperature, options.implementation, options.chunk, options.mesh
        )

    def score(
        self, rows: ScoreRows, temperature: Array | float, options: ScoreOptions
    ) -> ModelScores:
        """Run the model over the rows; see `Teacher`."""
        if options.pack_tokens is not None:
            return self._score_packed(rows, temperature, options, options.pack_tokens)
        hidden, head = self.model.response_hidden(
            self.params,
            rows.context,
            rows.context_length,
            rows.tokens,
            rows.mask,
            mesh=options.mesh,
        )
        wanted = (rows.tokens, rows.ids, rows.student_entropy)
        return self._statistics(hidden, head, *wanted, temperature, options)

    def _score_packed(
        self, rows: ScoreRows, temperature: Array | float, options: ScoreOptions, tokens: int
    ) -> ModelScores:
        """Return the scores, with rows packed without padding; 0 where `rows.mask` is false."""
        sequences = (rows.context, rows.context_length, rows.tokens, rows.mask)
        packs = Packs.of(*sequences, tokens, options.groups)
        wanted = (rows.tokens, rows.ids, rows.student_entropy)

        def model(*sequences: Array) -> tuple[Array, Array]:
            return self.model.hidden(self.params, *sequences, mesh=options.mesh)

        def scores(hidden: Array, head: Array, at: Predicted) -> ModelScores:
            hidden, of_tokens = states_at(hidden, at), gather_tokens(wanted, at)
            return self._statistics(hidden, head, *of_tokens, temperature, options)

        def of_pass(j: Array, out: ModelScores) -> ModelScores:
            hidden, head, at = packs.states(j, model)

            def block(at: Predicted, _: Array, out: ModelScores) -> ModelScores:
                return scatter_tokens(out, scores(hidden, head, at), at)

            return packs.over_blocks(at, block, out)

        shapes = jax.eval_shape(lambda: scores(*packs.states(0, model)))
        out = jax.tree.map(
            lambda leaf: jnp.zeros((*rows.tokens.shape, *leaf.shape[2:]), leaf.dtype), shapes
        )
        return jax.lax.fori_loop(0, packs.passes, of_pass, out)

    def _statistics(
        self,
        hidden: Float[Array, "B T D"],
        head: Float[Array, "V D"],
        tokens: Int32[Array, "B T"],
        ids: Int32[Array, "B T N"] | None,
        student_entropy: Float32[Array, "B T"] | None,
        temperature: Array | float,
        options: ScoreOptions,
    ) -> ModelScores:
        """Return the scores of tokens from the states that predict them."""
        head_options = self.head_options(temperature, options)
        top_ids = top_logprob = at_ids = token_weight = None
        if options.strengths is not None:
            # The kernel computes the weight only with a top-K: a top-1 where none is needed.
            alpha, beta = options.strengths
            listed = head_topk(
                hidden,
                head,
                tokens,
                k=options.k or 1,
                student_entropy=student_entropy,
                alpha=alpha,
                beta=beta,
                **head_options,
            )
            stats, token_weight = TokenStats(listed.logprob, listed.entropy), listed.weight
        elif options.k:
            listed = head_topk(hidden, head, tokens, k=options.k, **head_options)
            stats = TokenStats(listed.logprob, listed.entropy)
        else:
            listed = None
            plain = head_stats(hidden, head, tokens, **head_options)
            stats = TokenStats(plain.logprob, plain.entropy)
        if options.k and listed is not None:
            top_ids, top_logprob = listed.top_ids, listed.top_logprob
        if ids is not None:
            at_ids = head_gather(hidden, head, tokens, ids, **head_options).support_logprob
        kept = hidden if options.hidden else None
        return ModelScores(stats, top_ids, top_logprob, at_ids, kept, token_weight)


def score_student(
    student: Resident,
    rollout: Rollout,
    temperature: Array | float,
    options: ScoreOptions,
    micro_batch_size: int | None,
) -> ModelScores:
    """Return one model's scores of every row, after the student's prompt."""
    prompts, count = rollout.prompts, rollout.tokens.shape[0]
    rows = ScoreRows(prompts.tokens, prompts.length, rollout.tokens, rollout.mask)
    if options.pack_tokens is not None:
        return student.score(rows, temperature, options)
    return _in_micro_batches(
        lambda x: student.score(x, temperature, options), rows, count // (micro_batch_size or count)
    )


def score_teachers(
    teachers: Sequence[Teacher],
    rollout: Rollout,
    temperature: Array | float,
    options: ScoreOptions,
    micro_batch_size: int | None,
    *,
    ids: Int32[Array, "B T N"] | None = None,
    student_entropy: Float32[Array, "B T"] | None = None,
) -> ModelScores:
    """Return each row's scores by the teacher it is routed to, after that teacher's prompt.

    `ids` are the token ids to score besides the sampled one; `student_entropy` is used only with
    `options.strengths`.
    """
    prompts, count = rollout.prompts, rollout.tokens.shape[0]
    rows = ScoreRows(
        prompts.teacher_tokens,
        prompts.teacher_length,
        rollout.tokens,
        rollout.mask,
        ids,
        None if options.strengths is None else student_entropy,
    )
    scorers = [lambda x, each=each: each.score(x, temperature, options) for each in teachers]
    if options.pack_tokens is not None:
        return _each_its_own(scorers, rows, prompts.teacher)
    if len(scorers) == 1:
        return _in_micro_batches(scorers[0], rows, count // (micro_batch_size or count))
    size = micro_batch_size or _block(count, options.mesh)
    return _routed(scorers, rows, prompts.teacher, size, options.mesh)


def _in_micro_batches(
    score: Callable[[ScoreRows], ModelScores], rows: ScoreRows, count: int
) -> ModelScores:
    if count == 1:
        return score(rows)
    return join_micro_batches(jax.lax.map(score, micro_batches(rows, count)))


def _each_its_own(
    scorers: Sequence[Callable[[ScoreRows], ModelScores]],
    rows: ScoreRows,
    route: Int32[Array, " B"],
) -> ModelScores:
    """Return the scores with each scorer run on its own rows; those of others cost nothing."""
    if len(scorers) == 1:
        return scorers[0](rows)
    out = None
    for teacher, score in enumerate(scorers):
        mine = route == teacher
        found = score(dataclasses.replace(rows, mask=rows.mask & mine[:, None]))
        # Rows of other teachers are exactly 0.
        out = found if out is None else jax.tree.map(jnp.add, out, found)
    assert out is not None
    return out


def _block(rows: int, mesh: Mesh | None) -> int:
    """Return the block size: an eighth of the rows, rounded up to a multiple of the devices."""
    devices = 1 if mesh is None else mesh.size
    return -(-rows // (8 * devices)) * devices


def _routed(
    scorers: Sequence[Callable[[ScoreRows], ModelScores]],
    rows: ScoreRows,
    route: Int32[Array, " B"],
    size: int,
    mesh: Mesh | None,
) -> ModelScores:
    """Return the scores with each scorer run on its own rows, in blocks of `size`.

    The number of blocks is traced, so that a new routing compiles nothing.
    """
    count = route.shape[0]

    def shard(tree: Any) -> Any:
        """Shard the rows; after a gather by index they would be replicated on each device."""
        return tree if mesh is None else jax.lax.with_sharding_constraint(tree, by_rows(mesh))

    order = jnp.argsort(route, stable=True)
    shapes = jax.eval_shape(scorers[0], rows)
    out = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    start = jnp.int32(0)
    for teacher, score in enumerate(scorers):
        end = start + (route == teacher).sum()

        def block(i, out, score=score, start=start, end=end):
            at = start + i * size + jnp.arange(size)
            mine = order[jnp.minimum(at, count - 1)]
            part = shard(score(shard(jax.tree.map(lambda x: x[mine], rows))))
            target = jnp.where(at < end, mine, count)
            return jax.tree.map(lambda o, p: o.at[target].set(p, mode="drop"), out, part)

        out = jax.lax.fori_loop(0, -(-(end - start) // size), block, out)
        start = end
    return out
