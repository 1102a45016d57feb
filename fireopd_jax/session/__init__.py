"""The session of a run: its data, tokenizers and models, for sampling, grading and training."""
