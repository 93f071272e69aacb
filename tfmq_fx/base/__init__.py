"""Helpers that know nothing of graphs: arithmetic, files, threads and processes, progress, errors."""
