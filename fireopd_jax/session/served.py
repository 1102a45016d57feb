"""Teachers behind HTTP in a run: connections, texts for audits, log-probabilities for scores.

Setup.served -> Connections (one client a teacher, checked at the start)
rollout, the student's scores -> token ids to ask for -> the servers' log-probs -> `early`
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from fireopd_jax.config import UserError
from fireopd_jax.data.sources import Row
from fireopd_jax.method.config import MethodConfig
from fireopd_jax.method.scoring.teachers import Resident, ScoreOptions
from fireopd_jax.models.language_model import Params
from fireopd_jax.remote.canary import check_scores, check_texts, check_tokens
from fireopd_jax.remote.client import Client
from fireopd_jax.remote.errors import Mismatched
from fireopd_jax.remote.logprobs import RowScores, ScoreFeatures, ScoreRow, score, score_features
from fireopd_jax.remote.texts import Prefix, TextFeatures, continuations, text_features
from fireopd_jax.rollout.sampling import seed_for
from fireopd_jax.session.contexts import with_privileged
from fireopd_jax.session.host import Policies
from fireopd_jax.session.session import Session
from fireopd_jax.session.setup import ServedTeacher, Setup
from fireopd_jax.session.speaking import Ask, Continue
from fireopd_jax.sharding.mesh import by_rows, shard_rows
from fireopd_jax.text.chat import Message, decode
from fireopd_jax.types import EarlyScores, ModelScores, Prompts, Rollout, TokenStats

EXAMPLE_TOKENS = 16
"""Tokens of the reference or prompt that the checks at the start score or continue."""


class Connection:
    """The client of one served teacher, with what its server supports."""

    def __init__(self, setup: Setup, teacher: ServedTeacher, folder: Path, log: Any):
        self.setup = setup
        settings = teacher.served
        own = folder / "served" / f"{teacher.slug}.answers"
        file = own if settings.cache_file is None else Path(settings.cache_file).expanduser()
        self.client = Client(settings, file, log, name=teacher.name)

    @cached_property
    def texts(self) -> TextFeatures:
        """How the server continues texts, found and checked at the first use."""
        row, own = self._example(), self.setup.rows[int(self.setup.encoded.kept[0])]
        example = self.prefix(own, own.prompt, row.prompt, row.response)
        features = text_features(self.client, example)
        check_texts(self.client, features, example)
        return features

    @cached_property
    def shares_tokens(self) -> bool:
        """Whether prompts may be sent as our token ids, or as text of our template.

        A teacher of texts may have another tokenizer, which would read our ids as other words.
        Where that it has ours is not known, only messages are sent, but for
        `continuation=completions`. Raises UserError for that with another tokenizer.
        """
        setting, row = self.client.settings.continuation, self._example()
        if setting in ("prefill", "instruction"):
            return False
        try:
            known = check_tokens(self.client, self.setup.student.tokenizer, row)
        except Mismatched as difference:
            if setting == "completions":
                raise
            self.client.log(f"{difference}; it is sent messages, not token ids")
            return False
        return known or setting == "completions"

    def prefix(
        self, row: Row, turns: Sequence[Message], context: Sequence[int], partial: Sequence[int]
    ) -> Prefix:
        """Return a row's conversation, whose prompt has the ids `context`, and a partial response.

        `turns` are the conversation, in which texts may be quoted; its tools are the row's.
        """
        tokenizer, ids, text = self.setup.student.tokenizer, None, None
        if self.shares_tokens:
            ids = [*context, *partial]
            text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        return Prefix(plain(turns), decode(tokenizer, partial), ids, text, tools=row.tools)

    @cached_property
    def scores(self) -> ScoreFeatures:
        """How the server scores tokens, found and checked at the first use."""
        row = self._example()
        features = score_features(self.client, row)
        check_tokens(self.client, self.setup.student.tokenizer, row)
        check_scores(self.client, features, [row])
        return features

    def _example(self) -> ScoreRow:
        """Return a prompt of the run, and the beginning of its problem as the response."""
        setup = self.setup
        at = int(setup.encoded.kept[0])
        text = setup.rows[at].prompt[-1]["content"]
        ids = setup.student.tokenizer(text, add_special_tokens=False)["input_ids"]
        prompt = setup.encoded.teacher_prompts[at].tolist()
        return ScoreRow(prompt, list(ids)[:EXAMPLE_TOKENS])  # pyright: ignore[reportArgumentType]


class Connections:
    """The connections of a run to its served teachers, by route."""

    def __init__(self, session: Session):
        setup = session.setup
        self.each = [
            Connection(setup, teacher, session.folder.path, session.log) for teacher in setup.served
        ]

    def stats(self) -> dict[str, float]:
        """Return the counters of all teachers, summed, as metrics."""
        total: dict[str, float] = {}
        for connection in self.each:
            for name, value in connection.client.stats().items():
                total[f"served/{name}"] = total.get(f"served/{name}", 0.0) + value
        return total

    def close(self) -> None:
        """Close all clients."""
        for connection in self.each:
            connection.client.close()


class ServedSpeaker:
    """Continuations by served teachers, each for the rows routed to it; see `Speaker`."""

    def __init__(self, session: Session, method: MethodConfig, how: Continue):
        self.session, self.setup, self.how = session, session.setup, how
        self.prompt = method.teacher.prompt
        self.connections = connections(session)
        for connection in self.connections.each:
            _ = connection.texts  # a server that cannot do it is refused before the first step

    def __call__(
        self, prompts: Prompts, asks: Sequence[Ask | None], policies: Policies
    ) -> list[list[str]]:
        """Return the continuations of each prefix."""
        texts: list[list[str]] = [[] for _ in asks]
        for route, connection in enumerate(self.connections.each):
            mine = [
                i
                for i, ask in enumerate(asks)
                if ask is not None and int(prompts.teacher[ask.row]) == route
            ]
            found = continuations(
                connection.client,
                connection.texts,
                [self._prefix(connection, prompts, asks[i]) for i in mine],
                self.how.number,
                max_tokens=self.how.max_tokens,
                temperature=self.how.temperature,
                top_p=self.how.top_p,
                seed=seed_for(self.setup.config.run.seed, "audit"),
            )
            for i, each in zip(mine, found, strict=True):
                texts[i] = each
        return texts

    def _prefix(self, connection: Connection, prompts: Prompts, ask: Ask | None) -> Prefix:
        assert ask is not None
        row = self.setup.rows[int(prompts.row[ask.row])]
        turns = row.prompt if self.prompt is None else with_privileged(row, self.prompt)
        context = prompts.teacher_tokens[ask.row][: int(prompts.teacher_length[ask.row])]
        prefix = connection.prefix(row, turns, context.tolist(), ask.prefix)
        return dataclasses.replace(prefix, seed=int(prompts.sample_id[ask.row]))


class Listener:
    """Sets `early`: the student's scores, and the log-probabilities that served teachers return."""

    gives: ClassVar[frozenset[str]] = frozenset({"rollout.early"})

    def __init__(self, session: Session, method: MethodConfig):
        self.session, self.setup, self.score = session, session.setup, method.score
        self.connections = connections(session)
        self.top = min(self._top(connection) for connection in self.connections.each)
        self.of_student = jax.jit(self._of_student, out_shardings=by_rows(session.setup.mesh))

    def _top(self, connection: Connection) -> int:
        """Return how many of the most probable tokens to ask a teacher for."""
        features, wanted = connection.scores, self.score.of_teacher(ScoreOptions()).k or 0
        if features.top >= wanted:
            return wanted
        if self.score.asks_own_ids:
            return 0  # only the overlap of the two top-K needs them
        raise UserError(
            f"{connection.client.label}: returns the {features.top} most probable tokens, "
            f"method.score needs {wanted}; expected score.support=student, a smaller k, or a "
            "server with a higher limit"
        )

    def _of_student(self, params: Params, rollout: Rollout) -> ModelScores:
        student = Resident(self.setup.student.model, params)
        # Conflicts are checked: a server scores at temperature 1.
        return self.score.score_own(student, rollout, 1.0, self.setup.mesh)

    def __call__(self, rollout: Rollout, policies: Policies) -> Rollout:
        """Return the rollout with `early` set."""
        student = self.of_student(policies.student, rollout)
        asked = self.score.ids_for_teacher(student)
        ids = None if asked is None else np.asarray(asked)
        own = jax.device_get(rollout)
        found = self._ask(own, ids)
        early = EarlyScores(
            self._answered(student, found, own.mask, ids), self._scores(own.mask, found, ids)
        )
        return dataclasses.replace(rollout, early=shard_rows(self.setup.mesh, early))

    def _ask(self, own: Rollout, ids: np.ndarray | None) -> Mapping[int, RowScores]:
        """Return the scores of each row with a response."""
        prompts, found = own.prompts, {}
        for route, connection in enumerate(self.connections.each):
            real = own.mask.any(axis=1) & (np.asarray(prompts.teacher) == route)
            mine = np.flatnonzero(real).tolist()
            rows = [
                ScoreRow(
                    prompts.teacher_tokens[i][: int(prompts.teacher_length[i])].tolist(),
                    own.tokens[i][own.mask[i]].tolist(),
                    None if ids is None else ids[i][own.mask[i]],
                )
                for i in mine
            ]
            scores = score(connection.client, connection.scores, rows, top=self.top)
            found |= dict(zip(mine, scores, strict=True))
        return found

    def _scores(
        self, mask: np.ndarray, found: Mapping[int, RowScores], ids: np.ndarray | None
    ) -> ModelScores:
        """Return the teachers' scores as arrays; entropies are unknown."""
        top = self.top
        logprob = np.zeros(mask.shape, np.float32)
        at_ids = None if ids is None else np.full(ids.shape, -np.inf, np.float32)
        top_ids = np.full((*mask.shape, top), -1, np.int32)
        top_logprob = np.full((*mask.shape, top), -np.inf, np.float32)
        for i, row in found.items():
            logprob[i, mask[i]] = row.logprob
            top_ids[i, mask[i]], top_logprob[i, mask[i]] = row.top_ids, row.top_logprob
            if at_ids is not None and row.at_ids is not None:
                at_ids[i, mask[i]] = row.at_ids
        stats = TokenStats(logprob, np.full(mask.shape, np.nan, np.float32))
        if not top:
            return ModelScores(stats, at_ids=at_ids)
        return ModelScores(stats, top_ids, top_logprob, at_ids)

    def _answered(
        self,
        student: ModelScores,
        found: Mapping[int, RowScores],
        mask: np.ndarray,
        ids: np.ndarray | None,
    ) -> ModelScores:
        """Return the student's scores without the token ids that a teacher did not answer.

        They are missing, which is not probability 0: the support is smaller there.
        """
        if ids is None:
            return student
        kept = ids.copy()
        for i, row in found.items():
            if row.missing is not None:
                kept[i, mask[i]] = np.where(row.missing, -1, ids[i][mask[i]])
        return dataclasses.replace(student, top_ids=kept)


def check_served(session: Session, methods: Sequence[MethodConfig]) -> None:
    """Find what the served teachers support, before any work that a refusal would waste.

    Raises UserError for one that cannot be reached, or cannot do what a method asks for.
    """
    for method in methods:
        if not (session.setup.served and method.teacher.resident):
            continue
        for connection in connections(session).each:
            if method.refine.asks_teacher:
                _ = connection.texts
            if method.score.scores_teacher:
                _ = connection.scores


def plain(turns: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the messages of a conversation as an API takes them, which has no reasoning."""
    return [
        {key: value for key, value in turn.items() if key != "reasoning_content"} for turn in turns
    ]


def connections(session: Session) -> Connections:
    """Return the session's connections, made at the first use and closed with it."""
    if session.connections is None:
        session.connections = Connections(session)
    return session.connections
