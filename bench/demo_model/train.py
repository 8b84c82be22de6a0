"""Train the demo model: generate text, train the tokenizer, train, measure, save.

    python -m bench.demo_model.train --out DIR            # one GPU, a few minutes
    python -m bench.demo_model.train --out DIR --tiny     # a minute on a CPU, to see that it runs

A run that was interrupted goes on from DIR/checkpoint.pt. Seeds are fixed, so the text, the
tokenizer and the order of the batches are the same on every machine.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from bench.demo_model import corpus, measure
from bench.demo_model.model import DemoConfig, DemoModel, to_hf_names
from bench.demo_model.train_tokenizer import IM_END
from bench.demo_model.train_tokenizer import train as train_tokenizer

log = logging.getLogger("demo_model")

TOKENIZER_SEED, TRAIN_SEED, HELD_OUT_SEED = 7, 1_000, 9_000_000
PIECE_BYTES = 15 * 2**20  # weights are saved in files of at most this size


def parse_args() -> argparse.Namespace:
    """The command line; defaults are those of the shipped model."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="folder for checkpoint and results")
    p.add_argument("--documents", type=int, default=1_800_000, help="conversations to generate")
    p.add_argument("--steps", type=int, default=5_000)
    p.add_argument("--rows", type=int, default=64, help="rows of a batch")
    p.add_argument("--length", type=int, default=1024, help="tokens of a row")
    p.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate")
    p.add_argument("--balance", type=float, default=0.01, help="weight of the load-balance loss")
    p.add_argument("--time_limit", type=float, default=400, help="seconds of training; the rate "
                   "falls to zero by then even when steps are left")  # fmt: skip
    p.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    p.add_argument("--tiny", action="store_true", help="small run for a CPU")
    args = p.parse_args()
    if args.tiny:
        args.documents, args.steps, args.rows, args.length = 6_000, 60, 8, 256
    return args


def rate(progress: float) -> float:
    """Learning-rate factor: 2 % warm-up, flat to 60 %, then linear to zero."""
    if progress < 0.02:
        return progress / 0.02
    return 1.0 if progress < 0.6 else max(0.0, (1.0 - progress) / 0.4)


def make_optimizer(model: DemoModel, lr: float, device: str) -> torch.optim.AdamW:
    """AdamW with decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=device == "cuda")


def step_loss(
    model: torch.nn.Module, batch: tuple[Tensor, Tensor, Tensor], balance: float
) -> tuple[Tensor, Tensor]:
    """Training loss of one batch, and the plain loss on answers for the log."""
    ids, weight, doc = batch
    mask = measure.document_mask(doc)
    logits, uneven, _ = model(ids, mask)
    weight = weight[:, 1:] * ((doc[:, 1:] == doc[:, :-1]) & (doc[:, 1:] > 0))
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    loss = loss.view(weight.shape)
    answer = (weight > 0.5).float()
    plain = (loss * answer).sum() / answer.sum()
    return (loss * weight).sum() / weight.sum() + balance * uneven, plain.detach()


def run(args: argparse.Namespace, model: DemoModel, rows: corpus.Rows, device: str) -> float:
    """The training loop; returns the seconds it took (all runs together when resumed)."""
    optimizer = make_optimizer(model, args.lr, device)
    checkpoint = args.out / "checkpoint.pt"
    step, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["seconds"]
        log.info("going on from step %d", step)
    compiled = torch.compile(model) if device == "cuda" else model
    began, saved = time.monotonic(), time.monotonic()
    per_epoch = len(rows.ids) // args.rows
    while step < args.steps:
        seconds = spent + time.monotonic() - began
        progress = max(step / args.steps, seconds / args.time_limit)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate(progress)
        epoch, at = divmod(step, per_epoch)
        order = np.random.default_rng(epoch).permutation(len(rows.ids))
        pick = order[at * args.rows : (at + 1) * args.rows]
        batch = next(iter(measure.batches(
            corpus.Rows(rows.ids[pick], rows.weight[pick], rows.doc[pick]), args.rows, device
        )))  # fmt: skip
        with torch.autocast(device, torch.bfloat16):
            loss, plain = step_loss(compiled, batch, args.balance)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % max(1, args.steps // 50) == 0:
            log.info("step %d  loss %.4f  answers %.4f  rate %.2e  %.0f s", step, loss.item(),
                     plain.item(), optimizer.param_groups[0]["lr"], seconds)  # fmt: skip
        if time.monotonic() - saved > 60:
            saved = time.monotonic()
            save_checkpoint(checkpoint, model, optimizer, step, spent + saved - began)
    total = spent + time.monotonic() - began
    save_checkpoint(checkpoint, model, optimizer, args.steps, total)
    return total


def save_checkpoint(
    path: Path, model: DemoModel, optimizer: torch.optim.Optimizer, step: int, seconds: float
) -> None:
    """Write everything that going on needs, whole or not at all."""
    state = {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
        "seconds": seconds,
    }  # fmt: skip
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


@torch.no_grad()
def evaluate(
    model: DemoModel, rows: corpus.Rows, tokenizer: Tokenizer, device: str, few: bool
) -> dict[str, Any]:
    """Held-out loss, routing and held-out questions (a `few` of them) of the float32 model."""
    model.eval()
    loss, count = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    routing = measure.Routing()
    for ids, weight, doc in measure.batches(rows, 8, device):
        logits, _, routes = model(ids, measure.document_mask(doc))
        part_loss, part_count = measure.perplexity(logits, ids, doc, weight)
        loss, count = loss + part_loss.cpu(), count + part_count.cpu()
        routing.add(routes, doc)
    items = measure.load_questions()[: 3 if few else None]
    prompts = [
        tokenizer.encode(measure.prompt_text([{"role": "user", "content": item["ask"]}]),
                         add_special_tokens=False).ids
        for item in items
    ]  # fmt: skip
    end = tokenizer.token_to_id(IM_END)
    answers = measure.greedy(lambda x: model(x)[0], prompts, end, 140, device)
    results = []
    for item, ids_out in zip(items, answers, strict=True):
        text = tokenizer.decode(ids_out)
        results.append({**item, "answer": text, "right": measure.is_right(text, item["key"])})
    score = {
        name: f"{sum(r['right'] for r in results if r['set'] == name)} of "
        f"{sum(r['set'] == name for r in results)}"
        for name in ("test", "dev")
    }
    return {
        "held_out": measure.summary(loss, count),
        "routing": routing.table(model.c.top_k),
        "score": score,
        "answers": results,
    }


def save_weights(model: DemoModel, out: Path) -> None:
    """float16 weights under Hugging Face names, in pieces weights-N.npz of at most PIECE_BYTES."""
    piece: dict[str, np.ndarray] = {}
    size, number = 0, 0
    for name, value in to_hf_names(model).items():
        array = value.cpu().numpy().astype(np.float16)
        if size + array.nbytes > PIECE_BYTES:
            np.savez(out / f"weights-{number}.npz", **piece)
            piece, size, number = {}, 0, number + 1
        piece[name] = array
        size += array.nbytes
    np.savez(out / f"weights-{number}.npz", **piece)


def main() -> None:
    """Run all stages and write the results into --out."""
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    began = time.monotonic()
    config = DemoConfig()
    tokenizer = train_tokenizer(corpus.plain(TOKENIZER_SEED, 20_000), config.vocab_size)
    tokenizer.save(str(args.out / "tokenizer.json"))
    log.info("tokenizer after %.0f s", time.monotonic() - began)
    rows = corpus.build(tokenizer, TRAIN_SEED, args.documents, args.length, args.workers)
    held_out = corpus.build(tokenizer, HELD_OUT_SEED, 50 if args.tiny else 2_000, args.length, 1)
    prepared = time.monotonic() - began
    log.info("%.1f M tokens after %.0f s", (rows.doc > 0).sum() / 1e6, prepared)
    model = DemoModel(config).to(device)
    trained = run(args, model, rows, device)
    model.half().float()  # what is saved and shipped
    torch.set_float32_matmul_precision("highest")
    save_weights(model, args.out)
    results = evaluate(model, held_out, tokenizer, device, args.tiny)
    results |= {
        "config": config.as_dict(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "documents": args.documents,
        "tokens": int((rows.doc > 0).sum()),
        "steps": args.steps,
        "prepare_seconds": round(prepared, 1),
        "train_seconds": round(trained, 1),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    text = json.dumps(results, indent=1, ensure_ascii=False)
    (args.out / "results.json").write_text(text + "\n", encoding="utf-8")
    short = {k: v for k, v in results.items() if k != "answers"}
    log.info("%s", json.dumps(short, indent=1))
    for item in results["answers"]:
        if not item["right"] and item["set"] == "dev":
            log.info("wrong (%s): %s -> %s", item["set"], item["ask"], item["answer"])


if __name__ == "__main__":
    main()
