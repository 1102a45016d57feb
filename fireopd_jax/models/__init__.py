"""Decoder language models: hidden states and a head matrix, never logits of whole sequences."""
