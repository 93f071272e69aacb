"""Networks and pipelines that tests and benchmarks share."""
