"""Tidy a captured graph. Results stay bitwise equal."""
