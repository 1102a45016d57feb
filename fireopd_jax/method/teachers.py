"""Whose distribution the student learns, and the prompt after which it is computed.

frozen teachers of the configuration | the student's own parameters | none, for controls
"""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from fireopd_jax.config import Section, config
from fireopd_jax.text.templates import Leak, check_template

Policy = Literal["start", "ema", "current"]
"""Parameters of the student at its start, their moving average, or those of this step."""


@config
class Teacher(Section):
    """What all teachers share: an optional prompt with privileged information."""

    prompt: str | None = None
    """Prompt after which the teacher scores. null: the row's own prompt. `reference`: the problem
    and its privileged solution (`data.privileged_column`); or a text with `{problem}` and
    `{reference}`, which takes the place of the last user message."""
    max_prompt_tokens: PositiveInt | None = None
    """Longest prompt of the teacher; rows above it are not trained on. By default the longest of
    the data set. Only with `prompt`."""
    leak: Leak | None = Leak()
    """Count responses that speak of the privileged solution; null does not look for them."""

    own: ClassVar[bool] = False
    """Whether the student's own parameters are the teacher's."""
    resident: ClassVar[bool] = True
    """Whether the teachers of the section `teachers` are used."""

    def __post_init__(self) -> None:
        """Raise ValueError for a prompt that is neither a known name nor a template."""
        if self.prompt is not None:
            check_template(self.prompt, "teacher", ("problem", "reference"))

    @property
    def privileged(self) -> bool:
        """Whether the teacher's prompt contains the row's privileged solution."""
        return self.prompt is not None

    @property
    def at_start(self) -> bool:
        """Whether the student's parameters at its start are the teacher's."""
        return False

    @property
    def moving(self) -> float | None:
        """Decay of the moving average of the student's parameters, None without one."""
        return None

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """Yield the keys that need a prompt."""
        if self.prompt is None:
            yield "max_prompt_tokens", "without prompt"


@config
class Frozen(Teacher):
    """The teachers of the section `teachers`, each for the rows that are routed to it."""

    kind: Literal["frozen"] = "frozen"


@config
class OwnTeacher(Teacher):
    """The student itself, after a prompt with privileged information (OPSD, arXiv 2601.18734)."""

    kind: Literal["self"] = "self"
    params: Policy = "start"
    """The student at its start (of adapters: the model without them), an exponential moving average
    of its parameters (`ema`), or its parameters of this step, which the authors found unstable."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of the moving average per update."""

    own: ClassVar[bool] = True
    resident: ClassVar[bool] = False

    @property
    def at_start(self) -> bool:
        """Whether the student's parameters at its start are the teacher's."""
        return self.params == "start"

    @property
    def moving(self) -> float | None:
        """Decay of the moving average of the student's parameters, None without one."""
        return self.decay if self.params == "ema" else None

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """Yield `decay` without a moving average, and the keys that need a prompt."""
        yield from super().without_effect()
        if self.params != "ema":
            yield "decay", f"with params: {self.params}"


@config
class NoTeacher(Section):
    """No teacher: a control that learns from its own samples only."""

    kind: Literal["none"] = "none"

    own: ClassVar[bool] = False
    resident: ClassVar[bool] = False
    privileged: ClassVar[bool] = False
    prompt: ClassVar[None] = None
    max_prompt_tokens: ClassVar[None] = None
    leak: ClassVar[None] = None
    at_start: ClassVar[bool] = False
    moving: ClassVar[None] = None


Teachers = Annotated[Frozen | OwnTeacher | NoTeacher, Field(discriminator="kind")]
