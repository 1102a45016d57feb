"""The matrix products that passes through a model cannot do without, counted.

lengths of rows -> Work (tokens, pairs, predictions) -> FLOPs of a model
"""

import dataclasses

import numpy as np

from fireopd_jax.models.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Work:
    """Tokens that pass through a model, whatever the program."""

    tokens: int
    """Tokens that pass through the layers."""
    pairs: int
    """Pairs of a token and one that it attends to, itself included."""
    predicted: int
    """Tokens whose logits are computed."""

    @classmethod
    def of(cls, prompt: np.ndarray, response: np.ndarray) -> "Work":
        """Return the work of one pass over rows of these lengths; a last token is not computed."""
        return cls._of(prompt.astype(np.int64) + response - 1, response)

    @classmethod
    def prefill(cls, prompt: np.ndarray) -> "Work":
        """Return the work of a pass over prompts of these lengths."""
        return cls._of(prompt.astype(np.int64), np.ones_like(prompt))

    @classmethod
    def _of(cls, length: np.ndarray, predicted: np.ndarray) -> "Work":
        pairs = (length * (length + 1) // 2).sum()
        return cls(int(length.sum()), int(pairs), int(predicted.sum()))

    def without(self, other: "Work") -> "Work":
        """Return the rest of the work after a part of it."""
        return Work(
            self.tokens - other.tokens,
            self.pairs - other.pairs,
            self.predicted - other.predicted,
        )

    def flops(self, model: LanguageModel) -> int:
        """Return the FLOPs of the products of a forward pass; a backward pass has twice as many.

        A token of a mixture passes through the experts that it is routed to.
        """
        c = model.config
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        inner = 3 * c.intermediate_size
        if c.moe is not None:
            inner = 3 * c.moe.moe_intermediate_size * c.moe.num_experts_per_tok
            inner += c.moe.num_experts  # the router
        layer = c.hidden_size * (2 * queries + 2 * keys + inner)
        of_layers = c.num_hidden_layers * (2 * layer * self.tokens + 4 * queries * self.pairs)
        return of_layers + 2 * c.hidden_size * model.vocab_size * self.predicted
