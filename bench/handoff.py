"""Cost of handing a layer's rows to the CPU and back inside a CUDA graph, with no work on either side.

    python bench/handoff.py --rows 1 8

A graph of 48 layers that do nothing but hand over is replayed; the CPU answers at once. Each
interval between two requests, as the CPU sees them, is the whole cost of one layer: answer, wait
kernel, next layer's signal kernel, flag. All mechanisms are timed in turn in the same run, and a
pair of host functions a layer, as KTransformers uses one to submit and one to await. More rows are
more bytes over the bus. Exit code 1: the fastest one takes longer than asked for the first --rows.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `kt_async`, when run as a script

import torch

from kt_async.engine.cuda.handoff import MECHANISMS, Channel, Launch
from kt_async.engine.cuda.kernels import kernels_for, launcher
from kt_async.engine.cuda.probe import Replay, probe
from kt_async.errors import EngineError, KtError

_ASKED_P50_US, _ASKED_P99_US = 10.0, 25.0
_TIMEOUT_NS = 1_000_000_000


def intervals_us(
    launch: Launch, mechanism: str, shape: tuple[int, int, int, int], replays: int, twice: bool
) -> npt.NDArray[np.float64]:
    """Microseconds [replays, layers - 1] between the requests of neighbouring layers."""
    channel = Channel.open(mechanism, None, shape)
    try:
        replay = Replay.capture(channel, launch, shape[0], shape[1], twice=twice)
        times = np.zeros((replays, shape[0]), np.int64)
        for _ in range(20):
            replay.run(_TIMEOUT_NS)
        for row in times:
            replay.run(_TIMEOUT_NS, row.ctypes.data)
        channel.check()
    finally:
        channel.native.close()
    return np.diff(times, axis=1) / 1e3


def main() -> int:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--top_k", type=int, default=8)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--replays", type=int, default=400)
    args = parser.parse_args()
    launch = launcher(kernels_for({12}, None))
    print(f"{torch.cuda.get_device_name()}, {args.layers} layers, {args.replays} replays")
    fastest: list[tuple[float, float]] = []  # one for each number of rows that works
    for rows in args.rows:
        shape = (args.layers, rows, args.hidden, args.top_k)
        found_here: list[tuple[float, float]] = []
        for name, mechanism in [*((m, m) for m in MECHANISMS), ("pair", "host_call")]:
            try:
                begin = time.monotonic()
                problem = probe(launch, mechanism)
                probe_ms = (time.monotonic() - begin) * 1e3
                if problem is not None:
                    raise EngineError(problem)
                found = intervals_us(launch, mechanism, shape, args.replays, name == "pair")
            except KtError as error:
                print(f"{rows:3d} rows, {name:10}: does not work here ({error})")
                continue
            p50, p99 = (float(v) for v in np.percentile(found, [50, 99]))
            found_here.append((p50, p99))
            print(
                f"{rows:3d} rows, {name:10}: {p50:6.1f} us a layer (p99 {p99:6.1f}), "
                f"{found.sum(axis=1).mean() / 1e3:.2f} ms for {args.layers - 1}; "
                f"probe took {probe_ms:.1f} ms",
                flush=True,
            )
        fastest += found_here[:1]
    met = bool(fastest) and fastest[0][0] <= _ASKED_P50_US and fastest[0][1] <= _ASKED_P99_US
    print(
        f"asked of {args.rows[0]} rows: {_ASKED_P50_US:g} us (p99 {_ASKED_P99_US:g}): "
        f"{'met' if met else 'missed'}"
    )
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
