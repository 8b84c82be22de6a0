"""Measures at start what the cost model of engine/expert_split.py needs, in well under a second.

CPU and bus are timed while both work, because they share the memory; the gap between two layers is
timed in a short forward over made-up tokens, which also loads what the first prompt would wait for.
"""

from __future__ import annotations

import itertools
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from kt_async.engine.cuda.attention import Heads, make_prefill_planner, plan_made_up
from kt_async.engine.cuda.copies import ExpertCopies
from kt_async.engine.cuda.grouped import grouped_multiply
from kt_async.engine.cuda.ops import CudaOps
from kt_async.engine.cuda.stream import StreamedExperts
from kt_async.engine.cuda.values import Rows, StepTensors
from kt_async.engine.expert_split import LayerRates, SplitRates
from kt_async.model.spec import ModelSpec

log = logging.getLogger(__name__)

_CPU_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)  # rows per expert
_CPU_PAIRS = 1024  # rows times experts of one measurement, roughly
_CPU_RUNS = 3
_PAUSE_S = 5e-4  # as long as a layer's other work
_PAIRS_PER_ROW = 2  # a row's other experts are the GPU's
_COPIES = 2  # of a whole layer beside each measurement
_FEW_TOKENS = 64
_GAP_LAYERS = 4
_LENGTHS = (128, 256, 512, 1024, 2048)  # tokens


def measure_rates(
    experts: StreamedExperts,
    ops: CudaOps,
    spec: ModelSpec,
    forward: Callable[[CudaOps, ModelSpec], object],
    *,
    overlap: bool,
) -> SplitRates:
    """Rates of all layers, logged in one line. overlap: copies run in the background."""
    begin = time.monotonic()
    assert experts.copies is not None
    kinds = [experts.copies.kind(number) for number in range(experts.copies.num_layers)]
    found = {}
    for kind in dict.fromkeys(kinds):
        alike = [number for number, other in enumerate(kinds) if other == kind]
        found[kind] = _layer_rates(experts, experts.copies, alike)
    layers = [found[kind] for kind in kinds]
    few, many = _token_counts(experts)
    gpu = [_gpu_seconds(experts, ops, tokens) for tokens in (few, many)]
    rates = SplitRates(layers, _line(few, many, gpu), (0.0, 0.0), overlap)
    experts.rates = rates
    # Of few tokens the CPU gets all experts: the launches run beside them, as they will later.
    cases = ((few, experts.num_experts), (many, 1))
    gaps = [_gap_seconds(experts, ops, spec, forward, *case) for case in cases]
    host, copies = experts.cpu.host, experts.copies
    byte_s = layers[0].copy_s / copies.bytes_per_expert(0)
    rates = replace(rates, gap_s=_line(few, many, gaps), row_s=4 * host.x.shape[1] * byte_s)
    experts.rates = rates
    _load_variants(experts, ops, spec, forward, many)
    log.info("%s, measured in %.2f s", describe(rates, experts), time.monotonic() - begin)
    return rates


def describe(rates: SplitRates, experts: StreamedExperts) -> str:
    """One line: the rates of the first layer and from how many tokens on the GPU takes more."""
    first = rates.layers[0]
    assert experts.copies is not None
    size = experts.copies.bytes_per_expert(0)
    cpu = ", ".join(
        f"{seconds * 1e6:.0f} us at {rows}"
        for rows, seconds in zip(first.cpu_rows, first.cpu_s, strict=True)
        if rows in (1, 8, 64)
    )
    top_k, count = experts.cpu.host.ids.shape[1], experts.num_experts
    crossover = "never"
    for tokens in range(1, len(experts.cpu.host.ids) + 1):
        counts = np.full(count, max(1, round(tokens * top_k / count)), np.int64)
        counts[min(count, tokens * top_k) :] = 0
        if rates.choose(0, tokens, counts, 0).sum() > (counts > 0).sum() / 2:
            crossover = f"from {tokens} tokens on"
            break
    gap, gpu = rates.gap(512) * 1e3, (rates.gpu_s[0] + rates.gpu_s[1] * 512) * 1e3
    return (
        f"prompt experts: CPU {cpu} rows and {first.cpu_start_s * 1e6:.0f} us a layer, "
        f"copy {first.copy_s * 1e6:.0f} us "
        f"({size / first.copy_s * 1e-9:.1f} GB/s), a layer of 512 tokens {gpu:.2f} ms on the GPU "
        f"and {gap:.2f} ms between layers; the GPU takes most experts {crossover}"
    )


def _line(few: int, many: int, seconds: list[float]) -> tuple[float, float]:
    """Seconds as fixed + slope * tokens through two points; neither part below 0."""
    slope = max(0.0, (seconds[1] - seconds[0]) / max(1, many - few))
    return max(0.0, seconds[0] - slope * few), slope


def _token_counts(experts: StreamedExperts) -> tuple[int, int]:
    most = len(experts.cpu.host.ids)
    return min(_FEW_TOKENS, most), most


def _layer_rates(experts: StreamedExperts, copies: ExpertCopies, layers: list[int]) -> LayerRates:
    """Rates of layers of one kind; each run takes another one, whose weights no cache holds."""
    everyone, turn = np.arange(experts.num_experts), itertools.cycle(layers)
    rows: list[int] = []
    cpu: list[float] = []
    bus: list[float] = []
    start = 0.0
    for per_expert in (0, *_CPU_ROWS):
        used = 1 if per_expert == 0 else min(experts.num_experts, _CPU_PAIRS // per_expert)
        run = _cpu_run(experts, used, max(1, per_expert))
        if run is None:
            break
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(copies.stream)
        for _ in range(_COPIES):
            copies.start(layers[0], everyone)
        after.record(copies.stream)
        # The median: a run that was disturbed is no rate, nor is the luckiest one.
        seconds = statistics.median(_timed(run, next(turn)) for _ in range(_CPU_RUNS))
        if per_expert == 0:
            start = seconds
        else:
            rows.append(per_expert)
            cpu.append(max(seconds - start, 1e-9) / used)
        after.synchronize()
        bus.append(before.elapsed_time(after) * 1e-3 / (_COPIES * len(everyone)))
    # More rows never take less time: a measurement that says so was disturbed.
    steady = np.maximum.accumulate(cpu)
    return LayerRates(float(np.median(bus)), tuple(rows), tuple(steady.tolist()), start)


def _timed(run: Callable[[int], float], layer: int) -> float:
    """Seconds of a run after a pause like that between layers."""
    time.sleep(_PAUSE_S)
    return run(layer)


def _cpu_run(experts: StreamedExperts, used: int, per_expert: int) -> Callable[[int], float] | None:
    """Runs experts 0 .. used - 1 of a layer with so many rows each; None if they do not fit."""
    host = experts.cpu.host
    per_row = min(_PAIRS_PER_ROW, host.ids.shape[1], used)
    tokens = -(-used * per_expert // per_row)
    if tokens > len(host.ids) or used > experts.num_experts:
        return None
    x, weights = (t[:tokens].numpy() for t in (host.x, host.weights))
    x[:] = np.random.default_rng(1).standard_normal(x.shape, np.float32)
    weights[:] = 1.0 / weights.shape[1]
    ids = np.full(weights.shape, -1, np.int32)
    ids[:, :per_row] = np.arange(tokens * per_row).reshape(tokens, -1) % used
    is_prompt = np.ones(tokens, np.uint8)
    spared = experts.num_spared
    return lambda layer: experts.cpu.run(layer, ids, is_prompt, num_spared=spared)


def _gpu_seconds(experts: StreamedExperts, ops: CudaOps, tokens: int) -> float:
    """One layer's products on the GPU with every expert used alike."""
    assert experts.copies is not None
    top_k, hidden = experts.cpu.host.ids.shape[1], experts.cpu.host.x.shape[1]
    copied = experts.copies.start(0, np.arange(experts.num_experts))
    torch.cuda.current_stream().wait_event(copied)
    values = torch.zeros((tokens, hidden), dtype=torch.float32, device="cuda")
    ids = torch.arange(tokens * top_k, dtype=torch.int32, device="cuda") % experts.num_experts
    ids = ids.view(tokens, top_k)
    weights = torch.ones((tokens, top_k), dtype=torch.float32, device="cuda")
    matrices = experts.copies.matrices(0)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):  # the first run loads and warms
        before.record()
        grouped_multiply(ops, Rows(values, hidden), values, ids, weights, matrices)
        after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) * 1e-3


def _gap_seconds(
    experts: StreamedExperts,
    ops: CudaOps,
    spec: ModelSpec,
    forward: Callable[[CudaOps, ModelSpec], object],
    tokens: int,
    cpu_experts: int,
) -> float:
    """How long the CPU waits between two layers of a chunk while the GPU has no experts."""
    trace: list[tuple[float, float]] = []
    experts.probe = cpu_experts
    with _made_up_step(experts, ops, spec, tokens) as layers:
        for _ in range(2):  # the first run loads and warms
            with experts.step(tokens):
                experts.cpu.trace = trace = []
                forward(ops, replace(spec, num_layers=layers[:_GAP_LAYERS][-1] + 1))
                torch.cuda.current_stream().synchronize()
    experts.cpu.trace, experts.probe = None, 0
    gaps = [start - end for (_, end), (start, _) in itertools.pairwise(trace)]
    return float(np.median(gaps)) if gaps else 0.0


def _load_variants(
    experts: StreamedExperts,
    ops: CudaOps,
    spec: ModelSpec,
    forward: Callable[[CudaOps, ModelSpec], object],
    most: int,
) -> None:
    """Run two layers of prompts of many lengths, with all experts on the GPU.

    Libraries take other kernels for other numbers of rows, and a kernel is loaded when it is first
    launched: a decode step beside it was seen to take twice its time.
    """
    for tokens in (*(count for count in _LENGTHS if count < most), most):
        with _made_up_step(experts, ops, spec, tokens) as layers:
            experts.begin_step(tokens, use_cpu=False)
            forward(ops, replace(spec, num_layers=layers[:2][-1] + 1))
            torch.cuda.synchronize()


@contextmanager
def _made_up_step(
    experts: StreamedExperts, ops: CudaOps, spec: ModelSpec, tokens: int
) -> Iterator[list[int]]:
    """Inside, the ops run one prompt of made-up tokens; yields the experts' layers' numbers."""
    kept, cache = (ops.step, ops.experts_backend), ops.pages.layers[0]
    scale = spec.head_dim**-0.5
    heads = Heads(spec.num_heads, spec.num_kv_heads, spec.head_dim, scale, cache.dtype)
    planner = make_prefill_planner(heads, ops.page_size)
    scratch = (len(cache) - 1) * ops.page_size
    ops.step = StepTensors(
        tokens=torch.arange(tokens, dtype=torch.int32, device="cuda") % spec.vocab_size,
        positions=torch.zeros(tokens, dtype=torch.int32, device="cuda"),
        kv_slot=torch.full((tokens,), scratch, dtype=torch.int32, device="cuda"),
        logit_tokens=torch.zeros(1, dtype=torch.int64, device="cuda"),
        sampled=torch.zeros(1, dtype=torch.int32, device="cuda"),
        attend=plan_made_up(planner, cache, tokens),
    )
    ops.experts_backend = experts
    try:
        yield sorted(int(name.split(".")[1]) for name in experts.layer_of)
    finally:
        ops.step, ops.experts_backend = kept
