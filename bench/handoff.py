"""Cost of handing a layer's rows to the CPU and back inside a CUDA graph, with no work on the CPU.

    python bench/handoff.py --rows 1 4 8

A graph of 48 layers holds what the engine puts around the CPU's experts: the router, which hands its
rows over, and the kernel that waits for the answer, adds it and does the next norm. The CPU answers
at once. Each interval between two requests, as the CPU sees them, is the whole time of a layer; the
cost is what that is longer than the same layers without a CPU, timed by the GPU. All mechanisms are
timed in turn in the same run, and a pair of host functions a layer, as KTransformers uses one to
submit and one to await. Exit code 1: the fastest one costs more than asked for some of --rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `kt_async`, when run as a script

import torch

from kt_async.engine.cuda.experts import Names, VramExperts
from kt_async.engine.cuda.handoff import MECHANISMS, Channel, HandoffExperts
from kt_async.engine.cuda.kernels import kernels_for, launcher, no_old_graphs
from kt_async.engine.cuda.kv import KvPages
from kt_async.engine.cuda.ops import CudaOps
from kt_async.engine.cuda.probe import Replay, probe
from kt_async.engine.cuda.values import Rows
from kt_async.errors import EngineError, KtError
from kt_async.ffi.cuda import Kernels
from kt_async.model.ops import Routing

_ASKED_P50_US, _ASKED_P99_US = 10.0, 25.0
_TIMEOUT_NS = 1_000_000_000
_WARM_UP = 20
_EPS = 1e-6
_PAIR = "pair"


def no_experts(
    ops: CudaOps,
    x: Rows,
    residual: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    names: Names,
) -> Rows:
    """Experts that are nobody's: a layer without them."""
    del ops, ids, weights, names
    return Rows(residual, x.width)


@dataclass(frozen=True, slots=True)
class Layers:
    """Layers of a model of which only router, experts and norms are left."""

    kernels: Kernels
    num_layers: int
    rows: int
    hidden: int
    num_experts: int
    top_k: int
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def ops(self) -> CudaOps:
        """With weights of their own; the experts are nobody's."""
        made = torch.Generator().manual_seed(1)
        router = torch.randn((self.num_experts, self.hidden), generator=made) * self.hidden**-0.5
        self.weights.update(norm=torch.ones(self.hidden).cuda(), router=router.cuda())
        return CudaOps(self.kernels, self.weights, KvPages([]), 32, no_experts, few=True)

    def forward(self, ops: CudaOps, x: torch.Tensor, between: Callable[[int], None]) -> Rows:
        """The normed output. between: called after each layer's request."""
        routing = Routing(self.top_k, "softmax", norm_topk=True)
        value = Rows(x, self.hidden)
        normed = ops.rms_norm(value, "norm", _EPS)
        for layer in range(self.num_layers):

            def beside(residual: Rows, layer: int = layer) -> Rows:
                between(layer)
                return residual

            names = {"gate": str(layer), "up": "", "down": ""}
            value = ops.experts(normed, value, routing, router="router", beside=beside, **names)
            normed = ops.rms_norm(value, "norm", _EPS)
            ops.settle(normed)
        return normed

    def alone_us(self, replays: int) -> float:
        """Microseconds of a layer that hands nothing over."""
        ops, stream, graph = self.ops(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        x = torch.ones((self.rows, self.hidden), device="cuda")
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            self.forward(ops, x, lambda _: None)  # loads the kernels
            stream.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                self.forward(ops, x, lambda _: None)
            for repeat in range(_WARM_UP + replays):
                if repeat == _WARM_UP:
                    begin.record()
                graph.replay()
            end.record()
            end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3 / replays / self.num_layers

    def intervals_us(self, mechanism: str, replays: int) -> npt.NDArray[np.float64]:
        """Microseconds [replays, layers - 1] between the requests of neighbouring layers."""
        is_pair = mechanism == _PAIR
        shape = (self.num_layers, self.rows, self.hidden, self.top_k)
        channel = Channel.open("host_call" if is_pair else mechanism, None, shape)
        try:
            x = torch.ones((self.rows, self.hidden), device="cuda")
            replay = self.capture(channel, x, channel.wait_in_graph if is_pair else lambda _: None)
            times = np.zeros((replays, self.num_layers), np.int64)
            for _ in range(_WARM_UP):
                replay.run(_TIMEOUT_NS)
            for row in times:
                replay.run(_TIMEOUT_NS, row.ctypes.data)
            channel.check()
        finally:
            channel.native.close()
        return np.diff(times, axis=1) / 1e3

    def capture(self, channel: Channel, x: torch.Tensor, between: Callable[[int], None]) -> Replay:
        """A graph that reads x and hands over in every layer; its `out` is the normed output."""
        layer_of = {str(layer): layer for layer in range(self.num_layers)}
        ops, experts = self.ops(), HandoffExperts(channel, layer_of, VramExperts({}))
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph(keep_graph=True)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            self.forward(ops, x, lambda _: None)  # without a CPU: loads the kernels
            experts.warm_up(ops, self.hidden)
            ops.experts_backend = experts
            with no_old_graphs(), torch.cuda.graph(graph, stream=stream):
                out = self.forward(ops, x, between)
            graph.instantiate()
        assert out.f32 is not None
        return Replay(channel, x, out.f32, tuple(self.weights.values()), graph, stream)


def costs(layers: Layers, replays: int) -> tuple[float, float]:
    """Prints a line for each mechanism; p50 and p99 of the first that works."""
    alone = layers.alone_us(replays)
    found: list[tuple[float, float]] = []
    for name in (*MECHANISMS, _PAIR):
        try:
            problem = probe(launcher(layers.kernels), "host_call" if name == _PAIR else name)
            if problem is not None:
                raise EngineError(problem)
            intervals = layers.intervals_us(name, replays)
        except KtError as error:
            print(f"{layers.rows:3d} rows, {name:10}: does not work here ({error})")
            continue
        p50, p99 = (float(v) for v in np.percentile(intervals, [50, 99]))
        found.append((p50 - alone, p99 - alone))
        print(
            f"{layers.rows:3d} rows, {name:10}: {p50 - alone:6.1f} us a layer "
            f"(p99 {p99 - alone:6.1f}); {p50:.1f} of router, norm and hand-over, {alone:.1f} of "
            f"router and norm",
            flush=True,
        )
    return found[0] if found else (float("inf"), float("inf"))


def main() -> int:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top_k", type=int, default=8)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--replays", type=int, default=400)
    args = parser.parse_args()
    kernels = kernels_for({12}, None)
    print(f"{torch.cuda.get_device_name()}, {args.layers} layers, {args.replays} replays")
    missed = []
    for rows in args.rows:
        layers = Layers(kernels, args.layers, rows, args.hidden, args.experts, args.top_k)
        p50, p99 = costs(layers, args.replays)
        if p50 > _ASKED_P50_US or p99 > _ASKED_P99_US:
            missed.append(rows)
    verdict = f"missed at {missed} rows" if missed else "met"
    print(f"asked: {_ASKED_P50_US:g} us (p99 {_ASKED_P99_US:g}): {verdict}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
