"""The model that is served: requests to token ids, limits, and the jobs of its worker.

    fields -> prompts -> Generation and Scoring jobs -> Answered

Everything here runs in the server's event loop, so that one thread uses the tokenizer; the worker
thread only decodes.
"""

import asyncio
import dataclasses
import functools
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fireopd_jax.config import nearest
from fireopd_jax.rollout.requests import Knobs
from fireopd_jax.serving.errors import ApiError, bad_field
from fireopd_jax.serving.fields import Conversation, Sampling
from fireopd_jax.serving.worker import Generation, Job, SampleIds, Scoring, Worker
from fireopd_jax.session.specs import ModelSpec
from fireopd_jax.text.chat import Message, decode, prompt_ids

Gone = Callable[[], Awaitable[bool]]
"""Whether the client has closed the connection."""
POLL_S = 0.5
"""Seconds between two looks for a closed connection."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as token ids, and its text."""

    ids: np.ndarray
    text: str

    def __len__(self) -> int:
        return len(self.ids)


@dataclasses.dataclass(frozen=True)
class Service:
    """A model with its tokenizer, worker and limits."""

    name: str
    spec: ModelSpec
    worker: Worker
    context: int
    """Largest number of tokens of a prompt and its response."""
    template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of the chat template; those of a request come on top."""
    key: str | None = None
    """What clients must send as `Authorization: Bearer KEY`, if anything."""
    sample_ids: SampleIds = dataclasses.field(default_factory=SampleIds)
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def check_model(self, name: str | None) -> None:
        """Raise ApiError unless a request is for this model."""
        if name not in (None, self.name):
            close = nearest(name, [self.name])
            raise ApiError(
                404,
                f"model: there is no {name!r}{close}; this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )

    # -- prompts

    def prompt(self, content: str | Sequence[int], special: bool) -> Prompt:
        """Return a prompt given as a text or as token ids; a text may get special tokens.

        Raises ApiError for an empty prompt, or ids outside the vocabulary.
        """
        if isinstance(content, str):
            ids, text = self.text_ids(content, special), content
        else:
            ids, text = content, decode(self.spec.tokenizer, self.known("prompt", content))
        if not ids:
            raise bad_field("prompt", "it is empty; expected at least one token")
        return Prompt(np.asarray(ids, np.int32), text)

    def text_ids(self, text: str, special: bool) -> list[int]:
        """Return the token ids of a plain text, with those that the tokenizer adds if `special`."""
        ids = self.spec.tokenizer(text, add_special_tokens=special)["input_ids"]
        return list(ids)  # pyright: ignore[reportArgumentType]

    def known(self, field: str, ids: Sequence[int]) -> Sequence[int]:
        """Return the ids; raise ApiError for one outside the vocabulary."""
        size = self.spec.model.size
        for each in ids:
            if not 0 <= each < size:
                raise bad_field(field, f"token id {each}; expected ids from 0 to {size - 1}")
        return ids

    def conversation(self, fields: Conversation) -> list[int]:
        """Return the token ids of a conversation in the model's chat template."""
        messages = [message(each) for each in fields.messages or []]
        if not messages:
            raise bad_field("messages", "expected at least one message")
        begun = None
        header = fields.add_generation_prompt
        if fields.continue_final_message:
            if header:
                raise bad_field(
                    "continue_final_message",
                    "continues the last message; it conflicts with add_generation_prompt=true",
                )
            if messages[-1]["role"] != "assistant":
                raise bad_field(
                    "continue_final_message",
                    f"the last message is of {messages[-1]['role']!r}; expected the assistant's",
                )
            begun, header = [messages.pop()["content"]], True
            if not messages:
                raise bad_field("messages", "expected a message before the assistant's")
        (ids,) = prompt_ids(
            self.spec.tokenizer,
            [messages],
            {**self.template_kwargs, **fields.chat_template_kwargs},
            begun=begun,
            add_generation_prompt=True if header is None else header,
            model=self.spec.name,
        )
        return ids

    def room(self, prompt: int, wanted: int | None) -> int:
        """Return the largest number of response tokens; raise ApiError if they do not fit."""
        left = self.context - prompt
        if left < (1 if wanted is None else wanted):
            asked = "" if wanted is None else f" and max_tokens is {wanted}"
            raise ApiError(
                400,
                f"the prompt has {prompt} tokens{asked}; this server's context is {self.context} "
                "tokens, prompt and response together (fireopd serve --max-tokens)",
                param="max_tokens" if prompt < self.context else "prompt",
                code="context_length_exceeded",
            )
        return left if wanted is None else wanted

    # -- jobs

    def generation(self, prompt: Sequence[int], fields: Sampling, room: int) -> Generation:
        """Return the job of sampling `fields.n` responses of up to `room` tokens."""
        own = () if fields.ignore_eos else self.spec.stop
        stop = tuple(dict.fromkeys([*own, *self.known("stop_token_ids", fields.stop_token_ids)]))
        knobs = Knobs(
            temperature=fields.temperature,
            top_p=fields.top_p,
            top_k=max(fields.top_k, 0),
            min_p=fields.min_p,
            min_tokens=fields.min_tokens,
            max_tokens=room,
            stop=stop,
            stop_strings=fields.stop_strings,
        )
        ids = np.asarray(prompt, np.int32)
        return Generation(ids, knobs, self.sample_ids(ids, fields.n, fields.seed))

    async def run(
        self,
        generations: Sequence[Generation],
        scorings: Sequence[Scoring],
        gone: Gone,
        *,
        follow_up: bool = False,
    ) -> None:
        """Submit jobs and wait for their answers; give them up when the client has gone."""
        jobs: list[Job] = [*generations, *scorings]
        if not jobs:
            return
        self.worker.submit(generations, scorings, follow_up=follow_up)
        waiting: set[Any] = {
            asyncio.wrap_future(job.future)  # pyright: ignore[reportArgumentType]
            for job in jobs
        }
        for future in waiting:  # so that errors that nobody waits for any more are not logged
            future.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            while waiting:
                done, waiting = await asyncio.wait(
                    waiting, timeout=POLL_S, return_when=asyncio.FIRST_EXCEPTION
                )
                for future in done:
                    future.result()
                if waiting and await gone():
                    raise ApiError(499, "the client closed the connection")
        finally:
            for job in jobs:
                job.abandoned = True  # without effect on those that are done

    # -- text

    @functools.cached_property
    def token_text(self) -> Callable[[int], str]:
        """Function from a token id to its own text, special tokens included."""

        @functools.lru_cache(maxsize=1 << 16)
        def text(token: int) -> str:
            return self.decoded([token], skip_special=False)

        return text

    def decoded(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """Return the text of token ids."""
        text = self.spec.tokenizer.decode(
            list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def continued(self, before: Sequence[int], ids: Sequence[int], *, skip_special: bool) -> str:
        """Return the text that `ids` add to that of the tokens before them.

        Decoded alone, a first token may lose the space that it begins with.
        """
        tail = list(before[-8:])
        start = self.decoded(tail, skip_special=skip_special)
        whole = self.decoded([*tail, *ids], skip_special=skip_special)
        if start and whole.startswith(start):
            return whole[len(start) :]
        return self.decoded(ids, skip_special=skip_special)


def message(found: Mapping[str, Any]) -> Message:
    """Return a message with its content as text; raise ApiError for what is not text."""
    role, content = found.get("role"), found.get("content")
    if isinstance(content, list):
        parts = [part if isinstance(part, Mapping) else {} for part in content]
        if all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts):
            content = "".join(part["text"] for part in parts)
    if not isinstance(role, str) or not isinstance(content, str):
        raise bad_field(
            "messages", "expected {role, content} with texts, or content as parts of type text"
        )
    for name, value in found.items():
        if name not in ("role", "content") and value not in (None, [], {}):
            raise bad_field("messages", f"{name!r} of a message is not supported by this server")
    return {"role": role, "content": content}
