"""The name under which scripts outside the repository know the small pipelines."""

from benchmarks.networks.pipelines import *  # noqa: F403
