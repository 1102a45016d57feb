"""The device mesh, and how arrays are laid out over its axes."""
