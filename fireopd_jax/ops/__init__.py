"""Fused statistics of the language-model head: the logits of a batch never exist."""
