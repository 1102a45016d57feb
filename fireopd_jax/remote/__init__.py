"""Teachers behind an OpenAI-compatible HTTP API: requests, texts, log-probabilities, checks."""
