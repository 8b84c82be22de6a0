"""Time repacking and starting: GB/s per core, and the peak memory of a server that loads a file.

    python bench/loading.py                                   # packing alone, type by type
    python bench/loading.py model.gguf --threads 1,2,0        # and whole starts, on the CPU

Packing is from memory to fresh memory, first touch included, as at a start from a warm page cache;
"copy" is a plain copy of the same bytes by one thread of numpy, for scale. A start's seconds are the
server's own (its "loaded" line), its peak is VmHWM once it answers. The limit of the peak is 1.15
times the file and 700 MB; the KV cache, which is not part of loading, is held to 4096 tokens.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from bench import process, record, stats
from bench.errors import BenchError
from bench.record import ResultFile
from kt_async.errors import KtError
from kt_async.ffi.host import query_host
from kt_async.ffi.matrix import Matrix, type_info
from kt_async.ffi.pool import Pool
from kt_async.model.synthetic import random_blocks
from kt_async.weights.gguf_header import TYPE_IDS

_TYPES = "Q4_K,Q5_K,Q6_K,Q8_0,Q4_0,IQ4_XS,MXFP4,BF16,Q2_K"
_COLS, _ROWS = 2048, 768
_PACK_BYTES = 192 << 20
_LOADED = re.compile(r"loaded .* in ([0-9.]+) s")
_START_S = 900.0


def pack_rate(pool: Pool, name: str, repeats: int) -> tuple[float, int]:
    """Bytes per second at which tensors of a type are packed (best of some), and their bytes."""
    info = type_info(TYPE_IDS[name])
    expert_bytes = info.num_bytes(_ROWS * _COLS)
    experts = max(1, _PACK_BYTES // expert_bytes)
    tile = random_blocks(name, (4 << 20) // info.block_bytes | 1, 0.05, np.random.default_rng(0))
    data = np.resize(tile.reshape(-1), experts * expert_bytes)
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        matrix = Matrix(pool, TYPE_IDS[name], data, _ROWS, _COLS, experts)
        best = min(best, time.perf_counter() - begin)
        matrix.close()
    return data.nbytes / best, data.nbytes


def copy_rate() -> float:
    """Bytes per second of a copy into fresh memory by one thread."""
    source = np.ones(_PACK_BYTES, np.uint8)
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        source.copy()
        best = min(best, time.perf_counter() - begin)
    return source.nbytes / best


def start(path: Path, threads: int) -> dict[str, float]:
    """Load the file in a server of its own: seconds of loading, seconds to ready, peak bytes.

    Raises BenchError when it does not start.
    """
    port = process.free_port()
    command = [sys.executable, "-m", "kt_async", "--gguf_path", str(path), "--device", "cpu"]
    command += ["--port", str(port), "--cpu_infer", str(threads)]
    command += ["--max_batch_size", "1", "--cache_lens", "4096", "--log_level", "info"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("KT_ASYNC_")}
    env["PYTHONPATH"] = os.pathsep.join([str(record.ROOT), *filter(None, [env.get("PYTHONPATH")])])
    with process.Server(command, port, env=env) as server:
        ready = server.wait_ready(_START_S)
        peak = process.peak_rss_bytes(server.pid)
        found = _LOADED.search(server.tail(200))
    if found is None or peak is None:
        raise BenchError("the server did not say how long loading took")
    return {"load_s": float(found[1]), "ready_s": ready, "peak_bytes": float(peak)}


def packing_table(args: argparse.Namespace, threads: Sequence[int], output: ResultFile) -> str:
    """Packing of each type by each number of threads."""
    copied = copy_rate()
    rows = [["copy", "1", stats.number(copied / 1e9), stats.number(copied / 1e9)]]
    for name in args.types.split(","):
        if name not in TYPE_IDS:
            raise BenchError(f"type '{name}' is unknown")
        for count in threads:
            with Pool(count) as pool:
                rate, num_bytes = pack_rate(pool, name, args.repeats)
            rows.append(
                [name, str(count), stats.number(rate / 1e9), stats.number(rate / count / 1e9)]
            )
            output.append(
                "load.pack",
                {"type": name, "threads": count, "bytes": num_bytes, "bytes_per_s": rate},
            )
    return stats.table(["packing", "threads", "GB/s", "GB/s per core"], rows)


def start_table(path: Path, threads: Sequence[int], output: ResultFile) -> str:
    """Whole starts with each number of threads."""
    size = path.stat().st_size
    allowed = 1.15 * size + 700e6
    rows = []
    for count in threads:
        figures = start(path, count)
        rate = size / max(figures["load_s"], 1e-3)
        output.append(
            "load.start", {"file_bytes": size, "threads": count, "peak_allowed": allowed, **figures}
        )
        verdict = "ok" if figures["peak_bytes"] <= allowed else "ABOVE"
        rows.append(
            [
                path.name,
                str(count),
                stats.number(figures["load_s"]),
                stats.number(figures["ready_s"]),
                stats.number(rate / 1e9),
                stats.number(rate / count / 1e9),
                stats.number(figures["peak_bytes"] / 1e9),
                f"{stats.number(allowed / 1e9)} {verdict}",
            ]
        )
    header = ["start", "threads", "loaded s", "ready s", "GB/s", "per core", "peak GB", "allowed"]
    return stats.table(header, rows)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("file", nargs="?", type=Path, help="GGUF file to start a server with")
    parser.add_argument("--threads", default="1,0", help="0: one per physical core")
    parser.add_argument("--types", default=_TYPES, help="types to pack, or none")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON lines; default results/loading-*.jsonl")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print; 1 and one sentence when something cannot be measured."""
    args = parse(argv)
    output = ResultFile(args.output or ResultFile.default_path("loading"))
    try:
        cores = query_host().num_cores
        threads = sorted({int(part) or cores for part in args.threads.split(",")})
        if args.types != "none":
            print(packing_table(args, threads, output), flush=True)
        if args.file is not None:
            if not args.file.is_file():
                raise BenchError(f"{args.file} is not a file")
            print(start_table(args.file, threads, output))
    except (KtError, BenchError, ValueError) as error:
        print(f"bench/loading.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
