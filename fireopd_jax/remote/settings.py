"""Configuration of a served teacher: `teachers.NAME.served`."""

import dataclasses
import ipaddress
from collections.abc import Iterator
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from fireopd_jax.config import LOCAL, Section, config

RESERVED = (
    "model", "messages", "prompt", "n", "seed", "max_tokens", "max_completion_tokens",
    "temperature", "top_p", "echo", "logprobs", "prompt_logprobs", "prompt_logprob_token_ids",
    "prompt_logprob_start", "return_tokens_as_token_ids", "continue_final_message",
    "add_generation_prompt", "add_special_tokens", "stream",
)  # fmt: skip
"""Fields of a request that `extra_body` may not set."""


@config
class ServedConfig(Section):
    """A teacher behind an OpenAI-compatible HTTP API.

    Its key is taken from the environment and is never written anywhere.
    """

    url: str
    """Base URL of the API, usually ending in /v1: `http://localhost:8000/v1`. No credentials."""
    model: str
    """Name of the model on the server."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the API key. Servers on this machine need none."""
    continuation: Literal["auto", "prefill", "instruction", "completions"] = "auto"
    """Form of requests for the continuation of a partial response: `completions` sends the whole
    prompt as token ids, or as text where the server takes no ids; `prefill` ends a chat with the
    partial message (`continue_final_message`); `instruction` asks for it in words. `auto` takes
    what the server supports: token ids, else prefill, text, instruction; ids and text only where
    its tokenizer is known to be the student's."""
    samples_per_request: Literal["auto"] | PositiveInt = "auto"
    """Most samples in one request (`n`); `auto` asks the server whether it returns several."""
    instruction: str = (
        "Your last message breaks off. Continue it exactly from the character where it ends. "
        "Write only what comes next: no comment, and nothing that is already there."
    )
    """Text of the request for a continuation in the form `instruction`."""
    top_logprobs: Annotated[int, Field(ge=0, le=1000)] = 20
    """Most probable tokens to ask for at each position where the server does not score given token
    ids; fewer if the server refuses that many."""
    extra_body: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further fields of every request, such as `{top_k: 20}`. Not for keys: it is written down."""
    concurrency: Annotated[int, Field(ge=1, le=1024)] = 8
    """Most requests at a time."""
    timeout_s: PositiveFloat = 60.0
    """Seconds without an answer after which a request is sent again."""
    retries: NonNegativeInt = 6
    """Times that a request is sent again after a rate limit (429), a server error (5xx), a lost
    connection, a time-out or a malformed answer."""
    backoff_s: PositiveFloat = 1.0
    """Wait before the first repetition, in seconds; doubled each time, up to a minute. A longer
    Retry-After of the server is respected."""
    cache: Literal["all", "texts", "none"] = "all"
    """Answers to keep on disk, so that a resumed or repeated run does not pay for them again."""
    cache_file: Annotated[str | None, LOCAL] = None
    """File of the answers; null: one in the run's folder. Several runs may share a file: then an
    equal request of another run costs nothing, and budgets count what the file was paid with."""
    max_tokens_budget: PositiveInt | None = None
    """Most tokens, prompts and completions together, that this teacher may cost; what its cache
    was paid with counts. The run stops before a request that could exceed it."""
    max_cost: PositiveFloat | None = None
    """Most money, in the currency of the prices, like `max_tokens_budget`."""
    price_per_million_input: NonNegativeFloat = 0.0
    """Price of a million tokens of prompts."""
    price_per_million_output: NonNegativeFloat = 0.0
    """Price of a million tokens of completions."""
    tolerance: PositiveFloat = 0.1
    """Largest difference in nats between two scorings of the same tokens at the start."""

    def __post_init__(self) -> None:
        """Raise on a key, on a URL that is none, on a budget without prices, on a taken field."""
        # The message is the section's, not the key's: the value of a key would be shown.
        if not self.api_key_env.isidentifier():
            raise ValueError(
                "api_key_env: expected the name of an environment variable (OPENAI_API_KEY), "
                "not the key itself"
            )
        parts = urlsplit(self.url)
        if parts.username or parts.password or "@" in parts.netloc or parts.query:
            raise ValueError(
                "url has credentials or a query: expected http://HOST:PORT/v1, and the key in the "
                f"environment variable {self.api_key_env} (api_key_env)"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"url is {self.url!r}: expected http://HOST:PORT/v1 or https://HOST/v1"
            )
        priced = self.price_per_million_input or self.price_per_million_output
        if self.max_cost is not None and not priced:
            raise ValueError(
                "max_cost needs price_per_million_input or price_per_million_output above 0"
            )
        budget = self.max_tokens_budget is not None or self.max_cost is not None
        if budget and self.cache == "none":
            raise ValueError(
                "a budget counts what the cache was paid with, and cache=none keeps nothing: "
                "expected cache=all or texts"
            )
        if taken := [name for name in RESERVED if name in self.extra_body]:
            raise ValueError(f"extra_body: {taken[0]!r} is set by fireopd and cannot be given")

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """Yield the instruction where another form of continuation is fixed."""
        if self.continuation in ("prefill", "completions"):
            yield "instruction", f"with continuation={self.continuation}"
        if self.cache == "none":
            yield "cache_file", "with cache=none"
        if not self.retries:
            yield "backoff_s", "with retries=0"

    @property
    def base(self) -> str:
        """The URL without a slash at its end."""
        return self.url.rstrip("/")

    @property
    def root(self) -> str:
        """The URL of the server itself, where paths such as /tokenize are."""
        return self.base.removesuffix("/v1")

    @property
    def is_local(self) -> bool:
        """Whether the server is on this machine, by its name or address."""
        host = urlsplit(self.url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost" or host.endswith(".localhost")

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """Return the price of tokens of prompts and completions."""
        return 1e-6 * (
            tokens_in * self.price_per_million_input + tokens_out * self.price_per_million_output
        )
