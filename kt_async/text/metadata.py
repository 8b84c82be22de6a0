"""Typed access to GGUF metadata: a value of another type is the file's fault, in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from kt_async.errors import ConfigError

T = TypeVar("T")


class Metadata:
    """The tokenizer.ggml.* keys of one file. Every getter raises ConfigError for a wrong type."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = values
        self.source = source

    def _get(self, name: str, kind: type[T], what: str) -> T | None:
        key = f"tokenizer.ggml.{name}"
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(f"{self.source}: {key} is not {what}.")
        return value

    def text(self, name: str) -> str:
        """Return a string, "" when the key is missing."""
        return self._get(name, str, "a string") or ""

    def flag(self, name: str, default: bool) -> bool:
        """Return a boolean."""
        value = self._get(name, bool, "a boolean")
        return default if value is None else value

    def strings(self, name: str) -> list[str] | None:
        """Return a list of strings, None when the key is missing."""
        value: list[str] | None = self._get(name, list, "a list of strings")
        return value

    def numbers(self, name: str, count: int) -> npt.NDArray[Any] | None:
        """Return `count` numbers, None when the key is missing."""
        value: npt.NDArray[Any] | None = self._get(name, np.ndarray, "an array of numbers")
        if value is not None and len(value) != count:
            raise ConfigError(
                f"{self.source}: tokenizer.ggml.{name} has {len(value)} values, "
                f"but the vocabulary has {count} tokens."
            )
        return value

    def raw(self, name: str) -> bytes:
        """Return bytes, b"" when the key is missing."""
        value: npt.NDArray[Any] | None = self._get(name, np.ndarray, "an array of bytes")
        return b"" if value is None else value.tobytes()

    def token_id(self, name: str, limit: int) -> int | None:
        """Return a token id below `limit`, None when the key is missing."""
        value = self._get(f"{name}_token_id", int, "a token id")
        if value is not None and not 0 <= value < limit:
            raise ConfigError(
                f"{self.source}: tokenizer.ggml.{name}_token_id is {value}, "
                f"but the vocabulary has {limit} tokens."
            )
        return value
