"""Decoder language models that return hidden states and a head, never logits."""
