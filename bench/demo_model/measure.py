"""Measure a demo model: held-out loss, routing, and the held-out questions.

Everything here takes a function from ids to logits, so that the training model, transformers'
Qwen3MoE on dequantised weights, and anything else are judged by the same code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from bench.demo_model.corpus import Rows

HERE = Path(__file__).parent
Forward = Callable[[Tensor], Tensor]  # ids [B, L] -> logits [B, L, V], plain causal
FLAG = re.compile(r"--([A-Za-z][A-Za-z_0-9-]*)")


def load_questions() -> list[dict[str, Any]]:
    """held_out.yaml with the key phrases of each entry: `ask`, `set`, `key`, `about`."""
    talk = _yaml("talk.yaml")
    flags = {item["flag"]: item for item in _yaml("flags.yaml")}
    keys = {
        "fact": {item["id"]: item["key"] for item in _yaml("facts.yaml")},
        "talk": {item["id"]: item["key"] for item in talk["small_talk"]},
        "zh": {item["id"]: item["key"] for item in talk["chinese"]},
    }
    keys["talk"]["unknown"] = ["tiny demo model"]
    out = []
    for item in _yaml("held_out.yaml"):
        kind = next(k for k in ("fact", "talk", "zh", "flag") if k in item)
        if kind == "flag":
            key = flag_key(flags[item["flag"]], item["kind"])
        else:
            key = keys[kind][item[kind]]
        out.append({"ask": item["ask"], "set": item["set"], "key": key, "about": item[kind]})
    return out


def flag_key(flag: dict[str, Any], kind: str) -> list[str]:
    """What an answer about a flag must contain: its name, and its default or its purpose."""
    if kind == "goal":
        return ["--" + flag["flag"] + "|--no-" + flag["flag"]]
    key = [str(flag.get("value", ""))] if kind == "default" else flag["key"]
    return ["--" + flag["flag"], *key]


def is_right(answer: str, key: list[str]) -> bool:
    """Every line of `key` has one of its alternatives in the answer (case does not count)."""
    text = answer.lower().replace("`", "")
    return all(any(option.lower() in text for option in line.split("|")) for line in key)


def wrong_flags(answer: str, known: Iterable[str]) -> list[str]:
    """Flags named in an answer that kt_async does not have."""
    names = {name.lower() for name in known} | {"help", "version"}
    found = [name.replace("-", "_").lower() for name in FLAG.findall(answer)]
    return [name for name in found if name.removeprefix("no_") not in names]


def prompt_text(messages: list[dict[str, str]]) -> str:
    """ChatML with the answer's head, as the chat template renders it."""
    body = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return body + "<|im_start|>assistant\n"


@torch.no_grad()
def greedy(
    forward: Forward, prompts: list[list[int]], end: int, limit: int, device: str
) -> list[list[int]]:
    """Greedy answers to a batch of prompts; recomputes the whole text for each token."""
    rows = [list(p) for p in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    for _ in range(limit):
        longest = -(-max(len(rows[r]) for r in alive) // 32) * 32
        ids = torch.zeros((len(alive), longest), dtype=torch.long)
        for n, r in enumerate(alive):
            ids[n, : len(rows[r])] = torch.tensor(rows[r])
        last = torch.tensor([len(rows[r]) - 1 for r in alive])
        logits = forward(ids.to(device))[torch.arange(len(alive)), last.to(device)]
        for r, token in zip(list(alive), logits.argmax(-1).tolist(), strict=True):
            if token == end:
                alive.remove(r)
            else:
                rows[r].append(token)
                answers[r].append(token)
        if not alive:
            break
    return answers


def perplexity(logits: Tensor, ids: Tensor, doc: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of loss, count) for answer tokens and for all tokens, [2] each, of one batch of rows."""
    same = (doc[:, 1:] == doc[:, :-1]) & (doc[:, 1:] > 0)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten().long(),
                           reduction="none").view(same.shape)  # fmt: skip
    answer = same & (weight[:, 1:] > 0.5)
    return (
        torch.stack([(loss * answer).sum(), (loss * same).sum()]).double(),
        torch.stack([answer.sum(), same.sum()]).double(),
    )


class Routing:
    """Counts which experts are chosen, and how many of a token's experts the next one repeats."""

    def __init__(self) -> None:
        self.tokens = 0.0
        self.pairs = 0.0
        self.chosen: Tensor | None = None
        self.repeated: Tensor | None = None

    def add(self, routes: Tensor, doc: Tensor) -> None:
        """routes [layers, B, L, E] of 0 and 1; doc [B, L], 0 = padding."""
        real = (doc > 0).float()
        same = ((doc[:, 1:] == doc[:, :-1]) & (doc[:, 1:] > 0)).float()
        chosen = (routes * real[None, :, :, None]).sum((1, 2)).double().cpu()
        both = (routes[:, :, 1:] * routes[:, :, :-1]).sum(-1) * same
        repeated = both.sum((1, 2)).double().cpu()
        self.chosen = chosen if self.chosen is None else self.chosen + chosen
        self.repeated = repeated if self.repeated is None else self.repeated + repeated
        self.tokens += float(real.sum())
        self.pairs += float(same.sum())

    def table(self, top_k: int) -> list[dict[str, float]]:
        """Per layer: least and largest share of tokens of an expert, and next-token repeat."""
        assert self.chosen is not None and self.repeated is not None
        share = self.chosen / self.tokens
        repeat = self.repeated / self.pairs / top_k
        return [
            {"min_share": float(s.min()), "max_share": float(s.max()), "repeat": float(r)}
            for s, r in zip(share, repeat, strict=True)
        ]


def summary(loss: Tensor, count: Tensor) -> dict[str, float]:
    """Mean loss and perplexity of answer tokens and of all tokens."""
    mean = (loss / count).tolist()
    return {
        "answer_loss": mean[0], "answer_ppl": math.exp(mean[0]),
        "all_loss": mean[1], "all_ppl": math.exp(mean[1]),
    }  # fmt: skip


def batches(rows: Rows, size: int, device: str) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    """(ids, weight, doc) of `size` rows at a time."""
    for at in range(0, len(rows.ids), size):
        part = slice(at, at + size)
        yield (
            torch.from_numpy(rows.ids[part].astype("int64")).to(device),
            torch.from_numpy(rows.weight[part].astype("float32")).to(device),
            torch.from_numpy(rows.doc[part].astype("int64")).to(device),
        )


def document_mask(doc: Tensor) -> Tensor:
    """bool [B, 1, L, L]: a token looks at itself and at earlier tokens of its document."""
    length = doc.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=doc.device).tril()
    return ((doc[:, :, None] == doc[:, None, :]) & causal)[:, None]


def _yaml(name: str) -> Any:
    return yaml.safe_load((HERE / name).read_text(encoding="utf-8"))
