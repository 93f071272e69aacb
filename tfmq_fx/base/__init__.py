"""Arithmetic, files, threads and processes, progress, errors: what knows nothing of graphs."""
