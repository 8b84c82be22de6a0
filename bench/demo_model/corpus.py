"""Turn generated conversations into token rows for training and for measuring.

A row holds whole conversations one after the other. Each token has a loss weight (1 inside
answers, PROMPT_WEIGHT elsewhere) and the number of its document, so that attention can be kept
inside one conversation.
"""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from bench.demo_model.conversations import Generator, Message
from bench.demo_model.train_tokenizer import END_OF_TEXT

PROMPT_WEIGHT = 0.1
DOCUMENT_SHARE = 0.02  # plain text without chat markup
THINK_SHARE = 0.02  # answers that begin after a forced reasoning tag (--force_think)


@dataclass(slots=True)
class Rows:
    """ids uint16, weight float16 and doc uint16, each [rows, length]; doc 0 is padding."""

    ids: np.ndarray
    weight: np.ndarray
    doc: np.ndarray


def render(messages: list[Message], think: bool = False) -> list[tuple[str, float]]:
    """ChatML pieces with their loss weight; an answer's piece ends with its end mark."""
    pieces: list[tuple[str, float]] = []
    for number, message in enumerate(messages):
        head = f"<|im_start|>{message['role']}\n"
        if message["role"] != "assistant":
            pieces.append((f"{head}{message['content']}<|im_end|>\n", PROMPT_WEIGHT))
            continue
        is_last = number == len(messages) - 1
        if think and is_last:
            pieces.append((f"{head}<think>\n", 0.0))
            pieces.append(("The answer is short.\n</think>\n\n", 1.0))
        else:
            pieces.append((head, 0.0))
        pieces.append((f"{message['content']}<|im_end|>", 1.0))
        pieces.append(("\n" if not is_last else f"\n{END_OF_TEXT}", 0.0))
    return pieces


def texts(seed: int, count: int) -> list[list[tuple[str, float]]]:
    """`count` documents as weighted pieces."""
    maker = Generator(seed)
    out = []
    for _ in range(count):
        draw = maker.rng.random()
        if draw < DOCUMENT_SHARE:
            out.append([(maker.document() + END_OF_TEXT, 1.0)])
        else:
            messages = maker.conversation()
            out.append(render(messages, think=draw < DOCUMENT_SHARE + THINK_SHARE))
    return out


def plain(seed: int, count: int) -> list[str]:
    """The text that the tokenizer is trained on."""
    return [text for document in texts(seed, count) for text, _ in document]


def pack(tokenizer_json: str, seed: int, count: int, length: int) -> Rows:
    """Tokenise `count` documents and pack them first-fit into rows of `length` tokens."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    documents = texts(seed, count)
    flat = [text for document in documents for text, _ in document]
    encoded = iter(tokenizer.encode_batch(flat, add_special_tokens=False))
    rows: list[tuple[list[int], list[float], list[int]]] = []
    still_open: list[int] = []  # rows that may still take a document
    for document in documents:
        ids: list[int] = []
        weight: list[float] = []
        for _, value in document:
            piece = next(encoded).ids
            ids += piece
            weight += [value] * len(piece)
        ids, weight = ids[:length], weight[:length]
        place = next((r for r in still_open if len(rows[r][0]) + len(ids) <= length), -1)
        if place < 0:
            rows.append(([], [], []))
            place = len(rows) - 1
            still_open.append(place)
        row = rows[place]
        row[2].extend([row[2][-1] + 1 if row[2] else 1] * len(ids))
        row[0].extend(ids)
        row[1].extend(weight)
        still_open = [r for r in still_open[-16:] if len(rows[r][0]) < length - 24]
    out = Rows(
        np.zeros((len(rows), length), np.uint16),
        np.zeros((len(rows), length), np.float16),
        np.zeros((len(rows), length), np.uint16),
    )
    for r, (ids, weight, doc) in enumerate(rows):
        out.ids[r, : len(ids)], out.weight[r, : len(ids)], out.doc[r, : len(ids)] = ids, weight, doc
    return out


def build(tokenizer: Tokenizer, seed: int, count: int, length: int, workers: int) -> Rows:
    """`pack` in several processes; the result depends on seed and count only."""
    share = 10_000
    jobs = [
        (tokenizer.to_str(), seed + n, min(share, count - n * share), length)
        for n in range((count + share - 1) // share)
    ]
    if workers <= 1:
        parts = [pack(*job) for job in jobs]
    else:
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            parts = pool.starmap(pack, jobs, chunksize=1)
    return Rows(
        np.concatenate([p.ids for p in parts]),
        np.concatenate([p.weight for p in parts]),
        np.concatenate([p.doc for p in parts]),
    )
