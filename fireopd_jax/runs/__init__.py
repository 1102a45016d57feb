"""The outputs of a run: folder, checkpoints, metrics, completions and report."""
