"""On-policy distillation of language models, native to JAX.

The names below are imported when they are first used, so that `import fireopd_jax` loads no JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fireopd_jax.config import UserError
    from fireopd_jax.evaluation.graders import grade
    from fireopd_jax.method.batch import assemble, coefficients, total_loss
    from fireopd_jax.method.filtering import KeepAll, TeacherQuantile
    from fireopd_jax.method.fire import fire_weights
    from fireopd_jax.method.losses.sampled_token import SampledReverseKL, sampled_reverse_kl
    from fireopd_jax.method.losses.supervised import NegativeLogLikelihood
    from fireopd_jax.method.reweighting import ConfidenceConfusion, Uniform
    from fireopd_jax.models.decoder import DecoderConfig
    from fireopd_jax.models.language_model import LanguageModel
    from fireopd_jax.ops.blocks import Blocks
    from fireopd_jax.ops.head import head_gather, head_stats, head_topk
    from fireopd_jax.ops.logits import HeadSharding
    from fireopd_jax.recipe.schema import Config, load_config
    from fireopd_jax.rollout.engine import generate
    from fireopd_jax.rollout.sampling import Sampling
    from fireopd_jax.training.run import train
    from fireopd_jax.types import Batch, Prompts, Rollout, Scores, TokenStats

_HOME = {
    "method.batch": ("assemble", "coefficients", "total_loss"),
    "config": ("UserError",),
    "evaluation.graders": ("grade",),
    "method.filtering": ("KeepAll", "TeacherQuantile"),
    "method.fire": ("fire_weights",),
    "method.losses.sampled_token": ("SampledReverseKL", "sampled_reverse_kl"),
    "method.losses.supervised": ("NegativeLogLikelihood",),
    "models.decoder": ("DecoderConfig",),
    "models.language_model": ("LanguageModel",),
    "ops.blocks": ("Blocks",),
    "ops.head": ("head_gather", "head_stats", "head_topk"),
    "ops.logits": ("HeadSharding",),
    "recipe.schema": ("Config", "load_config"),
    "method.reweighting": ("ConfidenceConfusion", "Uniform"),
    "rollout.engine": ("generate",),
    "rollout.sampling": ("Sampling",),
    "training.run": ("train",),
    "types": ("Batch", "Prompts", "Rollout", "Scores", "TokenStats"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Batch",
    "Blocks",
    "ConfidenceConfusion",
    "Config",
    "DecoderConfig",
    "HeadSharding",
    "KeepAll",
    "LanguageModel",
    "NegativeLogLikelihood",
    "Prompts",
    "Rollout",
    "SampledReverseKL",
    "Sampling",
    "Scores",
    "TeacherQuantile",
    "TokenStats",
    "Uniform",
    "UserError",
    "assemble",
    "coefficients",
    "fire_weights",
    "generate",
    "grade",
    "head_gather",
    "head_stats",
    "head_topk",
    "load_config",
    "sampled_reverse_kl",
    "total_loss",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name from where it lives."""
    if name not in _MODULE:
        raise AttributeError(f"module 'fireopd_jax' has no attribute {name!r}")
    return getattr(import_module(f"fireopd_jax.{_MODULE[name]}"), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
