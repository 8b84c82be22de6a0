"""Types of command-line options that several benchmarks share."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """A whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def counts(text: str) -> list[int]:
    """Positive whole numbers separated by commas, sorted, each once."""
    return sorted({positive(part) for part in text.split(",")})
