"""From prompts to responses: sampling from logits, KV caches, and continuous batching."""
