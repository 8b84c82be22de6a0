"""Model families: which forward serves which GGUF architecture."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, TypeVar

from kt_async.model import qwen_moe

_Result = TypeVar("_Result")

# Adding a family: one file with forward(ops, spec), one line here, its keys in model.spec.
# A forward yields after every layer, so that a step may pause there, and returns the logits.
LAYERWISE: dict[str, Callable[[Any, Any], Generator[None, None, Any]]] = {
    "qwen2moe": qwen_moe.forward,
    "qwen3moe": qwen_moe.forward,
}


def run_to_end(steps: Generator[None, None, _Result]) -> _Result:
    """What a generator returns, without a pause."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: _Result = end.value
            return result


def _whole(forward: Callable[[Any, Any], Generator[None, None, Any]]) -> Callable[[Any, Any], Any]:
    return lambda ops, spec: run_to_end(forward(ops, spec))


FORWARDS = {name: _whole(forward) for name, forward in LAYERWISE.items()}
