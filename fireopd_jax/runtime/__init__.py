"""Settings of the process: XLA flags and the compilation cache."""
