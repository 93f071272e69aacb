"""Networks and pipelines shared by tests and benchmarks."""
