"""Log-probabilities in the two shapes that OpenAI has for them. Pure functions."""

from __future__ import annotations

from typing import Any

from kt_async.api.choice import LoggedToken
from kt_async.api.state import TokenizerLike

# JSON has no infinity; OpenAI writes this for a token that could not be chosen.
_LEAST = -9999.0


def token_text(token: int, tokenizer: TokenizerLike) -> str:
    """Return a token's text; `bytes:\\xe2\\x82` when it is no whole text by itself."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    return logprob if logprob > _LEAST else _LEAST  # also for NaN


def _chat_entry(token: int, logprob: float, tokenizer: TokenizerLike) -> dict[str, Any]:
    return {
        "token": token_text(token, tokenizer),
        "logprob": _finite(logprob),
        "bytes": list(tokenizer.token_bytes(token)),
    }


def chat_logprobs(items: list[LoggedToken], tokenizer: TokenizerLike) -> dict[str, Any]:
    """Return the `logprobs` object of a chat choice."""
    content = []
    for item in items:
        if item.entry is None:
            continue
        entry = _chat_entry(item.token, item.entry.logprob, tokenizer)
        entry["top_logprobs"] = [_chat_entry(t, p, tokenizer) for t, p in item.entry.top]
        content.append(entry)
    return {"content": content, "refusal": None}


def text_logprobs(items: list[LoggedToken], tokenizer: TokenizerLike) -> dict[str, Any]:
    """Return the `logprobs` object of a text completion, prompt tokens included with echo.

    As at OpenAI the first prompt token has none, and the chosen token is always among the
    alternatives.
    """
    out: dict[str, list[Any]] = {
        "tokens": [],
        "token_logprobs": [],
        "top_logprobs": [],
        "text_offset": [],
    }
    for item in items:
        text = token_text(item.token, tokenizer)
        out["tokens"].append(text)
        out["text_offset"].append(item.offset)
        if item.entry is None:
            out["token_logprobs"].append(None)
            out["top_logprobs"].append(None)
            continue
        top: dict[str, float] = {}
        for token, logprob in item.entry.top:
            top.setdefault(token_text(token, tokenizer), _finite(logprob))
        top.setdefault(text, _finite(item.entry.logprob))
        out["token_logprobs"].append(_finite(item.entry.logprob))
        out["top_logprobs"].append(top)
    return out
