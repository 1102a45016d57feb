"""Fields of the requests: OpenAI's names, and those of vLLM where OpenAI has none.

    JSON object -> parse -> a class of fields, or ApiError that names the field

A field of OpenAI's that this server does not implement is accepted with the value that turns it off
(`IDLE`), and an error with any other.
"""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import Field, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from fireopd_jax.config import UnitInterval, config, nearest
from fireopd_jax.rollout.requests import STOP_SLOTS
from fireopd_jax.runtime.limits import parse_json
from fireopd_jax.serving.errors import ApiError, bad_field
from fireopd_jax.serving.scorer import LARGEST_K

Class = TypeVar("Class")
Texts = str | list[str]
Ids = list[NonNegativeInt]
TopK = Annotated[int, Field(ge=0, le=LARGEST_K)]
"""Number of most probable tokens whose log-probabilities are returned."""
IDLE: Mapping[str, tuple[Any, ...]] = {
    "stream": (False,),
    "stream_options": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "logit_bias": ({},),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "store": (False,),
    "modalities": (["text"],),
}
"""Fields without effect here, and the values with which they have none elsewhere."""
EXPECTED = {
    "prompt": "expected a text, a list of token ids, or a list of either",
    "stop": "expected a text or a list of texts",
    "prompt_logprob_token_ids": "expected a list of equally long lists of token ids",
}
"""What fields of several types accept."""
IGNORED = ("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key")
"""Fields that change no answer."""


@config
class Sampling:
    """Fields of every request that samples."""

    model: str | None = None
    n: PositiveInt = 1
    temperature: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    top_p: UnitInterval = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0
    """0 and -1 are off."""
    min_p: UnitInterval = 0.0
    seed: int | None = None
    """A request with the same seed and prompt has the same responses."""
    stop: Texts | None = None
    """Texts that end a response; they are not part of it."""
    stop_token_ids: Annotated[Ids, Field(max_length=STOP_SLOTS)] = Field(default_factory=list)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: NonNegativeInt = 0
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    """Name tokens `token_id:17` in log-probabilities, where different ids may have equal texts."""

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop texts."""
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if not all(texts):
            raise bad_field("stop", "expected texts that are not empty")
        return tuple(texts)


@config
class CompletionFields(Sampling):
    """Body of `POST /v1/completions`."""

    prompt: str | Ids | list[str] | list[Ids]
    max_tokens: NonNegativeInt = 16
    logprobs: TopK | None = None
    echo: bool = False
    add_special_tokens: bool = True
    prompt_logprobs: TopK | None = None
    prompt_logprob_token_ids: Annotated[list[list[int]], Field(min_length=1)] | None = None
    """Ids to score, int[rows, K], padded with -1: row j at source row `prompt_logprob_start` + j,
    whose distribution predicts the prompt's token `prompt_logprob_start` + j + 1."""
    prompt_logprob_start: NonNegativeInt = 0


@config
class Conversation:
    """Fields of a conversation."""

    messages: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    """By default true, except with `continue_final_message`."""
    continue_final_message: bool = False
    """The last message is the beginning of the response."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)


@config
class ChatFields(Conversation, Sampling):
    """Body of `POST /v1/chat/completions`."""

    max_tokens: PositiveInt | None = None
    """By default what the context has room for."""
    max_completion_tokens: PositiveInt | None = None
    """OpenAI's newer name of `max_tokens`."""
    logprobs: bool = False
    top_logprobs: TopK = 0


@config
class TokenizeFields(Conversation):
    """Body of `POST /tokenize`: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


@config
class DetokenizeFields:
    """Body of `POST /detokenize`."""

    model: str | None = None
    tokens: Ids


def parse(cls: type[Class], body: bytes) -> Class:
    """Return the fields of a request's body; null is the same as absent.

    Raises ApiError for JSON that is none, an unknown field or a wrong value.
    """
    try:
        found = parse_json(body)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ApiError(400, "the body is not a JSON object")
    fields = {name: value for name, value in found.items() if value is not None}
    known = cls.__pydantic_fields__  # pyright: ignore[reportAttributeAccessIssue]
    for name in [name for name in fields if name not in known]:
        value = fields.pop(name)
        if name in IDLE:
            if value not in IDLE[name]:
                raise bad_field(name, f"not supported by this server (it is {value!r})")
        elif name not in IGNORED:
            near = nearest(name, [*known, *IDLE])
            raise bad_field(name, f"unknown field{near}", "unknown_field")
    try:
        return TypeAdapter(cls).validate_python(fields)
    except ValidationError as error:
        first = error.errors()[0]
    name = str(first["loc"][0])
    message = EXPECTED.get(name) or first["msg"][0].lower() + first["msg"][1:]
    if first["type"] == "missing":
        raise bad_field(name, "this field is required")
    value = fields.get(name)
    shown = "" if value is None else f" (it is {_short(value)})"
    raise bad_field(name, message + shown)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
