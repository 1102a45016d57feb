"""Array operations: fused statistics of the language-model head, attention, order statistics."""
