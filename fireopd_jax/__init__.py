"""On-policy distillation of language models, native to JAX."""
