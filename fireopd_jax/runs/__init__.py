"""What a run leaves behind: its folder, checkpoints, metrics, completions and report."""
