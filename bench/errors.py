"""The error of the benchmarks."""

from __future__ import annotations


class BenchError(Exception):
    """The server did not do what the benchmark needs; the sentence is for the terminal."""
