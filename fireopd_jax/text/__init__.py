"""Text to token ids and back: the tokenizer and its chat template."""
