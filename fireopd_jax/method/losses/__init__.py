"""Unweighted per-token losses: student statistics with a gradient, batch -> f32[B, T]."""
