"""The exact divergence of two models from their final hidden states and heads."""

from jaxtyping import Float, Float32

from fireopd_jax.models.language_model import LanguageModel, Params
from fireopd_jax.ops.dispatch import PLAIN
from fireopd_jax.ops.divergence import head_divergence
from fireopd_jax.ops.formulas import Divergence
from fireopd_jax.ops.head import HeadOptions
from fireopd_jax.types import Array


def divergence_from(
    teacher: tuple[LanguageModel, Params],
    teacher_hidden: Float[Array, "B T E"],
    divergence: Divergence,
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    options: HeadOptions,
) -> Float32[Array, "B T"]:
    """Return the divergence of student and teacher at each position, in nats.

    The vocabulary is the part that both models have. `options` belong to the student's head; their
    temperature applies to the teacher, too. Differentiable in `hidden` and `head`.
    """
    (model, params), sharding = teacher, options.get("sharding")
    return head_divergence(
        divergence,
        hidden,
        head,
        teacher_hidden,
        model.head(params, None if sharding is None else sharding.mesh),
        logit_scale=options.get("logit_scale", 1.0),
        softcap=options.get("softcap"),
        teacher_softcap=model.config.final_logit_softcapping,
        valid=min(options.get("valid") or head.shape[0], model.size),
        sharding=sharding,
        # No kernel computes divergences: all implementations but the reference use chunks.
        implementation=PLAIN if options.get("implementation") == PLAIN else None,
        chunk=options.get("chunk"),
    )
