"""Train a student: the state, one update, the jitted programs, the loop."""
