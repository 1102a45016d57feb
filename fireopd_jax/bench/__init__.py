"""Measurements of the package's own parts, each against the plain way to do the same."""
