"""Rows of text to batches of prompts: sources, built-in tasks, and the pipeline."""
