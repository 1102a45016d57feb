"""The whole configuration of a run: its sections, presets, and the checks between them."""
