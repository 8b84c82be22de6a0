"""Time the CUDA kernels against what the GPU can do: copy bandwidth and the bf16 matrix rate.

    python bench/cuda_kernels.py                            # linears, experts, prompts' products
    python bench/cuda_kernels.py --parts linear --types Q4_K --rows 1,8 --megabytes 8

Limits are measured in the same run. Every timed output is checked: against gguf's decoder, and each
row against the same row alone, which must be equal to the last bit. Launches run back to back in a
CUDA graph, as a decode step runs them; weights rotate through more memory than the caches hold.
"copy" is the share of the bandwidth of a large copy (reads and writes counted), "same copy" that of
a copy which moves as many bytes as the kernel reads, also back to back in a graph.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from bench.cuda_tools import (
    Launcher,
    Shape,
    Weights,
    check_experts,
    check_linear,
    check_prompt_experts,
    compile_types,
    draw_ids,
    expect,
    group_pairs,
    make_weights,
    quantize,
    reference,
    sort_pairs,
    time_graph,
)
from kt_async.engine.cuda import gemv as cuda_gemv
from kt_async.engine.cuda.grouped import multiply_rows
from kt_async.errors import KtError
from kt_async.ffi.matrix import type_info
from kt_async.ffi.pool import Pool
from kt_async.weights.gguf_header import TYPE_IDS

_ROTATION = 400 << 20  # bytes of weights that launches of one kernel go through
_LAUNCHES = 40  # of a graph, at least
_COLS = 2048
_SHAPES = {"qwen3": Shape(2048, 768, 128, 8)}
_PROMPT = 2048  # rows


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    target.copy_(source)


def _negate(source: torch.Tensor, target: torch.Tensor) -> None:
    """Moves the same bytes: copy_ takes almost twice as long at some sizes and places."""
    torch.neg(source, out=target)


class Bench:
    """One run: the kernels and the limits."""

    def __init__(self, args: argparse.Namespace, pool: Pool) -> None:
        self.args, self.pool = args, pool
        self.rng = np.random.default_rng(args.seed)
        names = [*args.types, *(name for layer in args.layers for name in layer.split(":")[1:])]
        self.ops = Launcher(compile_types({TYPE_IDS[name] for name in names}))
        self.copy = max(self._copy_rate(n << 20) for n in (256, 512, 1024))
        print(f"{torch.cuda.get_device_name()}: copy {self.copy * 1e-9:.0f} GB/s", flush=True)

    def _copy_rate(self, num_bytes: int) -> float:
        """Bytes per second, read and written, of copies that move num_bytes each."""
        half = num_bytes // 2 // 16 * 16
        shape = (max(1, _ROTATION // half), 2, half // 4)
        places = torch.zeros(shape, dtype=torch.int32, device="cuda")
        seconds = []
        for copy in (_copy, _negate):
            runs = [partial(copy, place[1], place[0]) for place in places]
            seconds.append(time_graph(runs * max(1, _LAUNCHES // len(runs))))
        return 2 * half / min(seconds)

    def report(self, label: str, seconds: float, num_bytes: float) -> None:
        """Print a line."""
        rate, same = num_bytes / seconds, self._copy_rate(int(num_bytes))
        print(
            f"{label:42s} {seconds * 1e6:8.2f} us {rate * 1e-9:6.0f} GB/s, of copy "
            f"{rate / self.copy:4.0%}, of same copy {rate / same:4.0%}",
            flush=True,
        )

    def linear(self, name: str, megabytes: int) -> None:
        """Products with few rows."""
        info = type_info(TYPE_IDS[name])
        rows = (megabytes << 20) // info.num_bytes(_COLS) // 16 * 16
        weights = make_weights(self.pool, name, rows, _COLS, 1, self.rng)
        size = weights.matrix.data.numel()
        copies = weights.copies(max(1, _ROTATION // size))
        for count in self.args.rows:
            x = torch.randn((count, _COLS), device="cuda")
            check_linear(self.ops, weights, x)
            acts = quantize(x)
            runs = [
                partial(cuda_gemv.multiply, self.ops, acts.arg(), count, [m], [None], None)
                for m in copies
            ]
            seconds = time_graph(runs * max(1, _LAUNCHES // len(runs)))
            self.report(f"{name} [{rows}, {_COLS}] x {count} rows", seconds, size)

    def experts(self, shape_name: str, up_type: str, down_type: str) -> None:
        """Both halves of a routed-expert layer with uniformly random routing."""
        s = _SHAPES[shape_name]
        make = partial(make_weights, self.pool)
        gate = make(up_type, s.width, s.hidden, s.experts, self.rng)
        up = make(up_type, s.width, s.hidden, s.experts, self.rng)
        down = make(down_type, s.hidden, s.width, s.experts, self.rng)
        layers = list(zip(*(w.copies(2) for w in (gate, up, down)), strict=True))
        for tokens in self.args.tokens:
            x = torch.randn((tokens, s.hidden), device="cuda")
            draws = [draw_ids(tokens, s, self.rng) for _ in range(16)]
            check_experts(self.ops, (gate, up, down), x, draws[0])
            acts = quantize(x)
            pairs = [group_pairs(self.ops, ids, s.experts) for ids in draws]
            distinct = float(np.mean([len(ids.unique()) for ids in draws]))
            runs = [
                partial(cuda_gemv.gate_up, self.ops, acts.arg(), p, *layers[i % 2][:2])
                for i, p in enumerate(pairs)
            ]
            hidden = [run() for run in runs]
            label = f"{shape_name} {up_type}/{down_type} {tokens} tokens"
            each = [w.matrix.data.numel() / s.experts for w in (gate, up, down)]
            self.report(f"{label}, gate and up", time_graph(runs * 3), distinct * sum(each[:2]))
            second = [
                partial(cuda_gemv.down, self.ops, h, p, layers[i % 2][2])
                for i, (h, p) in enumerate(zip(hidden, pairs, strict=True))
            ]
            self.report(f"{label}, down", time_graph(second * 3), distinct * each[2])

    def prompt_experts(self, shape_name: str, up_type: str, down_type: str) -> None:
        """A routed-expert layer of a prompt, uniformly random routing; against both limits."""
        s = _SHAPES[shape_name]
        make = partial(make_weights, self.pool)
        layer = (
            make(up_type, s.width, s.hidden, s.experts, self.rng),
            make(up_type, s.width, s.hidden, s.experts, self.rng),
            make(down_type, s.hidden, s.width, s.experts, self.rng),
        )
        size = sum(w.matrix.data.numel() for w in layer)
        layers = list(zip(*(w.copies(2) for w in layer), strict=True))
        for tokens in self.args.prompts:
            x = torch.randn((tokens, s.hidden), device="cuda").bfloat16()
            ids = draw_ids(tokens, s, self.rng)
            check_prompt_experts(self.ops, layer, x, ids)
            by_expert = sort_pairs(ids, s.experts)
            runs = [
                partial(multiply_rows, self.ops, x, by_expert, s.top_k, matrices)
                for matrices in layers
            ]
            seconds = time_graph(runs * 5)
            flops = 6.0 * tokens * s.top_k * s.hidden * s.width
            read = size * len(ids.unique()) / s.experts
            print(
                f"{shape_name} {up_type}/{down_type} prompt of {tokens} tokens: "
                f"{seconds * 1e6:.0f} us, {flops / seconds * 1e-12:.0f} TFLOP/s, weights at "
                f"{read / seconds * 1e-9:.0f} GB/s, of copy {read / seconds / self.copy:.0%}",
                flush=True,
            )

    def prompt(self, name: str, rows: int, cols: int) -> None:
        """Dequantise, then multiply with many rows by cuBLAS; against cuBLAS alone."""
        weights = make_weights(self.pool, name, rows, cols, 1, self.rng)
        dense = torch.empty((rows, cols), dtype=torch.bfloat16, device="cuda")
        x = torch.randn((_PROMPT, cols), device="cuda").bfloat16()

        def dequantize() -> None:
            cuda_gemv.dequantize(self.ops, weights.matrix, dense)

        def multiply() -> torch.Tensor:
            return torch.nn.functional.linear(x, dense)

        dequantize()
        self._check_dense(weights, dense)
        alone = time_graph([multiply] * 20)
        seconds = time_graph([dequantize, multiply] * 20) * 2
        flops = 2.0 * _PROMPT * rows * cols
        print(
            f"{name} [{rows}, {cols}] x {_PROMPT} rows: {flops / seconds * 1e-12:.0f} TFLOP/s, "
            f"{alone / seconds:.0%} of cuBLAS alone ({flops / alone * 1e-12:.0f}); dequantising "
            f"{(seconds - alone) * 1e6:.1f} of {seconds * 1e6:.1f} us",
            flush=True,
        )

    def _check_dense(self, weights: Weights, dense: torch.Tensor) -> None:
        rows = slice(0, min(512, len(dense)))
        exact = reference(weights, 0, rows).float().bfloat16()
        if not torch.equal(dense[rows], exact):
            expect(f"{weights.type} dequantised", dense[rows], exact.double())


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    def names(text: str) -> list[str]:
        return text.split(",")

    parser.add_argument(
        "--parts", type=names, default=["linear", "experts", "prompt", "prompt_experts"]
    )
    parser.add_argument("--types", type=names, default=["Q4_K", "Q6_K", "Q8_0"])
    parser.add_argument("--rows", type=numbers, default=[1, 2, 4, 8, 16], metavar="M,..")
    parser.add_argument("--tokens", type=numbers, default=[1, 4, 8, 16], metavar="T,..")
    prompts = [64, 512, 2048, 8192]
    parser.add_argument("--prompts", type=numbers, default=prompts, metavar="T,..")
    parser.add_argument("--megabytes", type=numbers, default=[8, 64], metavar="MB,..")
    parser.add_argument("--layers", type=names, default=["qwen3:Q4_K:Q4_K", "qwen3:Q4_K:Q6_K"])
    parser.add_argument("--threads", type=int, default=0, help="0: one per physical core")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print; 1 and one sentence when a type, shape or product is wrong."""
    args = parse(argv)
    try:
        with Pool(args.threads) as pool:
            bench = Bench(args, pool)
            for name in args.types if "linear" in args.parts else []:
                for megabytes in args.megabytes:
                    bench.linear(name, megabytes)
            for layer in args.layers if "experts" in args.parts else []:
                bench.experts(*layer.split(":"))
            for layer in args.layers if "prompt_experts" in args.parts else []:
                bench.prompt_experts(*layer.split(":"))
            for name in args.types if "prompt" in args.parts else []:
                for rows, cols in ((4096, 2048), (2048, 4096), (8192, 8192)):
                    bench.prompt(name, rows, cols)
    except (KtError, KeyError, ValueError, TypeError) as error:
        print(f"bench/cuda_kernels.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
