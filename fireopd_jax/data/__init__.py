"""Sources of text rows, built-in tasks, and the pipeline that makes batches of prompts."""
