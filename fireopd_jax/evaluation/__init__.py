"""Evaluation: exact graders of final answers, and avg@k over held-out problems."""
