"""Process-wide settings: XLA flags, the compilation cache, and signals."""
