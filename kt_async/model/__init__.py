"""Model families: which forward serves which GGUF architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kt_async.model import qwen_moe

# Adding a family: one file with forward(ops, spec), one line here, its keys in model.spec.
FORWARDS: dict[str, Callable[[Any, Any], Any]] = {
    "qwen2moe": qwen_moe.forward,
    "qwen3moe": qwen_moe.forward,
}
