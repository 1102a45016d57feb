"""Training of a student: the state, the update, the jitted programs, the loop."""
