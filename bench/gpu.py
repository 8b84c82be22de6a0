"""Time the GPU engine without HTTP: decode at several batch sizes, prefill, start-up.

    python bench/gpu.py /data/q3.gguf --experts cpu --clients 1 4 8 16 --prompts 512 2048
    python bench/gpu.py qwen3-30b-a3b --quant Q8_0 --experts vram     # no file: random weights

Prints one line per measurement with the bound that the experts' bytes set (CPU experts: read
bandwidth measured in the same run) and appends nothing: pipe it where it should go.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `kt_async`, when run as a script

from bench.interleave import measure_interleave
from bench.synthetic import SHAPES
from kt_async.engine.cuda.build import CudaOptions, load_cuda_runner
from kt_async.engine.cuda.runner import CudaLimits, CudaRunner
from kt_async.engine.types import GenerationRequest, SamplingParams
from kt_async.ffi import structs
from kt_async.ffi.pool import Pool
from kt_async.ffi.scheduler import Scheduler
from kt_async.model.dummy import dummy_from_spec
from kt_async.model.spec import ModelSpec, spec_from_gguf
from kt_async.model.synthetic import QUANTS
from kt_async.weights.source import ModelFiles, open_model

_PROMPT = 64
_PAGE = 32
_GREEDY = SamplingParams(temperature=0.0)
_SAMPLED = SamplingParams(temperature=0.7, top_k=20, top_p=0.95)  # as many models recommend


class Engine:
    """Scheduler and runner, stepped by hand."""

    def __init__(self, files: ModelFiles, spec: ModelSpec, pool: Pool, args: Any) -> None:
        pages = args.cache_tokens // _PAGE
        most = max([*args.clients, *(clients + 1 for clients in args.interleave)])
        self.scheduler = Scheduler(
            structs.sized(
                structs.SchedConfig,
                max_batch_size=most,
                chunk_size=args.chunk_size,
                page_size=_PAGE,
                num_pages=pages,
                max_len=min(spec.max_context, args.cache_tokens),
                max_queue=64,
                max_samples=most + 8,
                watermark_pages=-1,
                lane_tokens=args.lane_tokens,
            )
        )
        limits = CudaLimits(_PAGE, pages, spec.vocab_size, pages)
        options = CudaOptions(
            args.experts == "vram", show_progress=False, prompt_experts=args.prompt_experts
        )
        layout = self.scheduler.layout
        self.runner: CudaRunner = load_cuda_runner(files, spec, pool, layout, limits, options)
        self.block = self.runner.block.array
        self.next_id = 1
        self.phases: list[tuple[int, int, int]] = []  # ns of plan, run, commit by step

    def submit(self, prompt: list[int], tokens: int, sampling: SamplingParams = _GREEDY) -> int:
        request = GenerationRequest("bench", prompt, tokens, sampling)
        assert self.scheduler.submit(self.next_id, request, time.monotonic_ns())
        self.next_id += 1
        return self.next_id - 1

    def step(self) -> tuple[float, int, int]:
        """(seconds, tokens in the step, rows); zeros when idle."""
        begin = time.monotonic_ns()
        if not self.scheduler.plan(begin, self.block.ctypes.data):
            return 0.0, 0, 0
        planned = time.monotonic_ns()
        plan = self.scheduler.plan_struct
        self.runner.run(plan, self.scheduler.layout, self.block)
        ran = time.monotonic_ns()
        self.scheduler.commit(ran, self.runner.result.tokens.ctypes.data, plan.num_samples)
        self.scheduler.drain()
        end = time.monotonic_ns()
        self.phases.append((planned - begin, ran - planned, end - ran))
        return (end - begin) * 1e-9, plan.num_tokens, plan.num_rows

    def drain(self) -> list[tuple[float, int, int]]:
        steps = []
        while (step := self.step())[1]:
            steps.append(step)
        return steps


def prompt(length: int, vocab: int, seed: int) -> list[int]:
    """Random ids."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, vocab, length)]


def measure_decode(
    engine: Engine,
    spec: ModelSpec,
    clients: int,
    tokens: int,
    sampling: SamplingParams = _GREEDY,
) -> float:
    """Tokens per second of all clients, from the median decode step."""
    for i in range(clients):
        engine.submit(prompt(_PROMPT, spec.vocab_size, engine.next_id * 31 + i), tokens, sampling)
    before = engine.runner.stats()
    engine.phases.clear()
    steps = [s for s in engine.drain() if s[1] == s[2] == clients]
    after = engine.runner.stats()
    median = statistics.median(s[0] for s in steps)
    p99 = sorted(s[0] for s in steps)[int(len(steps) * 0.99)]
    expert_ms = (after["expert_ns"] - before["expert_ns"]) / max(1, len(steps)) * 1e-6
    kind = "" if sampling.temperature == 0.0 else "sampled, "
    print(
        f"decode {clients:2d} clients: {kind}{clients / median:8.1f} tokens/s, step {median * 1e3:6.2f} ms "
        f"(p99 {p99 * 1e3:.2f}), CPU experts {expert_ms:.2f} ms",
        flush=True,
    )
    print_host_time(engine, clients, median)
    return clients / median


def print_host_time(engine: Engine, clients: int, step_s: float) -> None:
    """What a step costs beside the GPU's own time, which a replay without a host gives."""
    plan, run, commit = (statistics.median(p) * 1e-3 for p in zip(*engine.phases, strict=True))
    gpu_s = engine.runner.graph_seconds(clients)
    if gpu_s is None:
        print(
            f"  host: plan {plan:.0f} us, run {run:.0f} us with the CPU's part, commit {commit:.0f} us"
        )
        return
    print(
        f"  host {(step_s - gpu_s) * 1e6:.0f} us a step beside {gpu_s * 1e6:.0f} us on the GPU: plan "
        f"{plan:.0f}, copies, launch and wake {run - gpu_s * 1e6:.0f}, commit and events {commit:.0f}",
        flush=True,
    )


def profile_decode(engine: Engine, spec: ModelSpec, clients: int) -> None:
    """Mean time and count per kernel over some decode steps."""
    from torch.profiler import ProfilerActivity, profile  # noqa: PLC0415 - only here

    for i in range(clients):
        engine.submit(prompt(_PROMPT, spec.vocab_size, engine.next_id * 17 + i), 12)
    engine.step()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        engine.drain()
    print(recorded.key_averages().table(sort_by="cuda_time_total", row_limit=24))


def measure_prefill(engine: Engine, spec: ModelSpec, length: int) -> None:
    """Tokens per second and time to the first token; the second of two runs."""
    seconds = 0.0
    for attempt in range(2):
        engine.submit(prompt(length, spec.vocab_size, 1000 + attempt + length), 1)
        seconds = sum(s[0] for s in engine.drain())
    print(
        f"prefill {length:5d} tokens: {length / seconds:8.0f} tokens/s, first token after "
        f"{seconds:.3f} s",
        flush=True,
    )


def main() -> int:
    """Exit code 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "gguf", help=f"model file, or a shape with random weights: {', '.join(SHAPES)}"
    )
    parser.add_argument("--quant", choices=QUANTS, default="Q4_K_M", help="types of a shape")
    parser.add_argument("--experts", choices=("cpu", "vram"), default="cpu")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--chunk_size", type=int, default=8192)
    parser.add_argument("--prompt_experts", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument(
        "--interleave",
        type=int,
        nargs="*",
        default=[],
        metavar="CLIENTS",
        help="time between tokens of so many clients while a long prompt prefills",
    )
    parser.add_argument("--interleave_prompt", type=int, default=8192)
    parser.add_argument("--lane_tokens", type=int, default=16, help="0 = no prefill lane")
    parser.add_argument("--sampled", action="store_true", help="also temperature 0.7, top 20, 0.95")
    parser.add_argument("--profile", action="store_true", help="print time by GPU kernel")
    parser.add_argument("--cache_tokens", type=int, default=65536)
    args = parser.parse_args()
    begin = time.monotonic()
    files = (
        dummy_from_spec(SHAPES[args.gguf], args.quant, Path(args.gguf))
        if args.gguf in SHAPES
        else open_model(Path(args.gguf))
    )
    spec = spec_from_gguf(files)
    pool = Pool(num_threads=args.threads)
    print(pool.describe())
    print(f"read bandwidth {pool.read_bandwidth(1 << 31) * 1e-9:.1f} GB/s", flush=True)
    engine = Engine(files, spec, pool, args)
    print(f"ready after {time.monotonic() - begin:.1f} s", flush=True)
    for clients in args.clients:
        measure_decode(engine, spec, clients, args.tokens)
        if args.sampled:
            measure_decode(engine, spec, clients, args.tokens, _SAMPLED)
        if args.profile:
            profile_decode(engine, spec, clients)
    for length in args.prompts:
        measure_prefill(engine, spec, length)
    for clients in args.interleave:

        def submit(length: int, tokens: int) -> int:
            ids = prompt(length, spec.vocab_size, engine.next_id * 13 + length)
            return engine.submit(ids, tokens)

        measure_interleave(engine.scheduler, engine.runner, submit, clients, args.interleave_prompt)
    return 0


if __name__ == "__main__":
    sys.exit(main())
