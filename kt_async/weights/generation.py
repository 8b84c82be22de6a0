"""The sampling settings a model recommends, used where neither request nor operator says.

From generation_config.json of --model_path, else from the GGUF (general.sampling.*). Values out of
range are left out: a recommendation is no reason to refuse a model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

# Setting -> (name in generation_config.json, name in the GGUF, largest value).
_KEYS: Final = {
    "temperature": ("temperature", "general.sampling.temp", 2.0),
    "top_p": ("top_p", "general.sampling.top_p", 1.0),
    "top_k": ("top_k", "general.sampling.top_k", 2.0**31 - 1),
}


def recommended_sampling(model_path: Path | None, metadata: Mapping[str, Any]) -> dict[str, float]:
    """temperature, top_p and top_k as far as the model names them."""
    foreign = _read(model_path / "generation_config.json") if model_path else {}
    found: dict[str, float] = {}
    for name, (json_key, gguf_key, limit) in _KEYS.items():
        value = foreign.get(json_key, metadata.get(gguf_key))
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if 0 <= value <= limit:
            found[name] = value
    if foreign.get("do_sample") is False:
        found["temperature"] = 0.0
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
