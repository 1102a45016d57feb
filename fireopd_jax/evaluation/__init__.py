"""Responses to marks: exact graders of final answers."""
