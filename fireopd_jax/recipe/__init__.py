"""The configuration of a run: its sections, layers, keys, and the checks between sections."""
