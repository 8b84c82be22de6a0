"""Checked access to foreign keys, for `model.spec` and `model.hf_config`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from kt_async.errors import ConfigError

MAX_SIZE = 1 << 24  # of any dimension
MAX_LAYERS = 1024
MAX_EXPERTS = 4096
MAX_CONTEXT = 1 << 30


class Fields:
    """Checked access to a mapping of foreign keys; every complaint names source and key."""

    def __init__(self, source: str, values: Mapping[str, Any], prefix: str = "") -> None:
        self.source = source
        self.values = values
        self.prefix = prefix

    def error(self, key: str, problem: str) -> ConfigError:
        return ConfigError(f"{self.source}: '{self.prefix}{key}' {problem}.")

    def has(self, key: str) -> bool:
        return self.values.get(self.prefix + key) is not None

    def count(self, key: str, default: int | None = None, *, low: int = 1, high: int = 0) -> int:
        """Return an integer within low..high. Per-layer lists must hold one value throughout."""
        value = self.values.get(self.prefix + key)
        if value is None:
            if default is None:
                raise self.error(key, "is missing")
            return default
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        high = high or MAX_SIZE
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"is {value}, expected a whole number from {low} to {high}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number."""
        value = self.values.get(self.prefix + key, default)
        if value is None and default is None:
            raise self.error(key, "is missing")
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, f"is {value}, expected a number")
        if not math.isfinite(value):
            raise self.error(key, f"is {value}, expected a finite number")
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        """Return a number above zero."""
        value = self.number(key, default)
        if value <= 0:
            raise self.error(key, f"is {value:g}, expected a number above 0")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(self.prefix + key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, f"is {value}, expected true or false")
        return default if value is None else value

    def text(self, key: str, default: str = "") -> str:
        value = self.values.get(self.prefix + key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, f"is {value}, expected a string")
        return default if value is None else value
