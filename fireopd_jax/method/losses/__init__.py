"""Per-token losses, not yet weighted: student statistics with a gradient, batch -> f32[B, T]."""
