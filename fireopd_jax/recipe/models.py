"""Configuration of the models of a run: student, teachers, base policy."""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from fireopd_jax.config import LOCAL, Section, config
from fireopd_jax.models.decoder import DecoderConfig
from fireopd_jax.models.lora import LoraConfig
from fireopd_jax.models.quantized import Quantize
from fireopd_jax.recipe.optim import SftConfig
from fireopd_jax.remote.settings import ServedConfig


@config
class ModelConfig(Section):
    """A model: loaded from `path`, or embedded: defined by `architecture`, with random parameters.

    Supervised training comes first if `sft` is set.
    """

    path: Annotated[str | None, LOCAL] = None
    """A Hugging Face folder, a name on its hub, or a model of a run: `runs/x/models/student`."""
    architecture: DecoderConfig = DecoderConfig()
    """Architecture of an embedded model, which starts from random parameters; with `path`, the
    architecture that the folder must have."""
    tokenizer: Annotated[str, LOCAL] = "builtin:bytes"
    """Tokenizer of an embedded model: `builtin:bytes`, or a Hugging Face folder."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute dtype of a model from `path`; by default that of the folder, on a CPU float32."""
    param_dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of parameters from `path`; by default float32 if trained, else `dtype`, or the
    folder's."""
    ignore_config_keys: tuple[str, ...] = ()
    """Keys of the folder's config.json to ignore, though they could change what the model computes:
    those that an error named."""
    chat_template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of this model's chat template, such as `{enable_thinking: false}`. `strftime_now`
    is the date that a template which reads the clock shows; by default the start of the run."""
    chat_template: Annotated[str | None, LOCAL] = None
    """Chat template of this model: a file (.jinja, or .json with `chat_template`), a model's folder
    that has one, the name of one of the tokenizer's several, or a built-in: `plain` (the BOS that
    the tokenizer adds, if any, and the prompt), `chatml`, `tulu`, `question`. null: the
    tokenizer's own."""
    sft: SftConfig | None = None
    """Supervised training before distillation; null is none."""

    @property
    def trained(self) -> bool:
        """Whether all parameters are trained at some point of the run."""
        return self.sft is not None

    @property
    def swaps_eos(self) -> bool:
        """Whether the model scores with its EOS swapped with the student's."""
        return False

    @property
    def offloaded(self) -> bool:
        """Whether the parameters are on the devices only while a program needs them."""
        return False

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """Yield keys that `path` overrides, or that need it: tokenizer and dtypes."""
        if self.path is not None:
            yield "tokenizer", "with path: the folder has its own tokenizer"
            for name in ("dtype", "param_dtype"):
                yield f"architecture.{name}", f"with path: expected {name}"
        else:
            for name in ("dtype", "param_dtype"):
                yield name, f"without path: expected architecture.{name}"
            yield "ignore_config_keys", "without path: there is no config.json"


@config
class StudentConfig(ModelConfig):
    """The model that is trained."""

    lora: LoraConfig | None = None
    """Train only low-rank adapters after `sft`; null trains all parameters."""

    @property
    def trained(self) -> bool:
        """Whether all parameters are trained at some point of the run."""
        return self.sft is not None or self.lora is None


@config
class TeacherConfig(ModelConfig):
    """A teacher: frozen while the student is trained."""

    served: ServedConfig | None = None
    """A teacher behind an OpenAI-compatible HTTP API instead of a model on this machine; its token
    ids must be the student's where a method needs log-probabilities."""
    quantize: Quantize | None = None
    """Store the kernels of its layers in eight bits, after `sft` if any; null keeps their dtype."""
    offload: bool = False
    """Keep the parameters in the host's memory, on the devices only while they score, write or are
    graded: room for rollouts and updates, for the time of a copy each step."""
    eos_alias: bool = False
    """For a teacher whose EOS token differs from the student's: its probability of its own EOS is
    used for the student's EOS, and vice versa."""

    @property
    def swaps_eos(self) -> bool:
        """Whether the teacher scores with its EOS swapped with the student's."""
        return self.eos_alias

    @property
    def offloaded(self) -> bool:
        """Whether the parameters are on the devices only while a program needs them."""
        return self.offload

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """Yield the keys of a model on this machine where the teacher is served."""
        if self.served is None:
            yield from super().without_effect()
            return
        for name in ("path", "architecture", "tokenizer", "dtype", "param_dtype", "sft",
                     "ignore_config_keys"):  # fmt: skip
            yield name, "with served"
        yield "quantize", "with served"
        yield "offload", "with served"
        yield "eos_alias", "with served"
