"""Benchmarks of parts of the package, each against a plain implementation of the same."""
