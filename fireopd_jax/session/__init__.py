"""An open run: its data, tokenizers, models and teachers, ready to answer, grade and score."""
