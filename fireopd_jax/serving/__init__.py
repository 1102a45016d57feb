"""A model behind an OpenAI-compatible HTTP API: its texts, and its scores of given tokens."""
