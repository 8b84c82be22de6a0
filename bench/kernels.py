"""Time the CPU kernels against what this machine can do: read bandwidth and peak multiply-adds.

    python bench/kernels.py                         # Q4_K Q6_K Q8_0 BF16, linears and expert layers
    python bench/kernels.py --types Q4_K --rows 1,8,512 --layers none --isa avx2
    python bench/kernels.py --types Q4_K --rows 1,8,64,512 --isa all      # a table for each
    python bench/kernels.py --types none --layers deepseek3:Q4_K:Q6_K --tokens 1,4,8

Limits are measured in the same run, the bandwidth around each line. Outputs are checked against gguf's decoder before anything is
timed. From 32 on, rows and tokens count as a prompt's, which AMX multiplies in bf16 tiles; fewer are
generated tokens. "bound" is the shortest time the machine's limits allow, bytes / bandwidth or
multiply-adds / peak, whichever is longer ("by" says which), and "share" what it is of the best time.
One multiply-add is two floating-point operations. Weights rotate through more memory than the
caches hold.
Each expert layer gives a plot of its time over 1 to 16 tokens against the time that reading the
distinct experts takes, beside the result file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from bench import fixed_cost, plots
from bench.errors import BenchError
from bench.kernel_cases import SHAPES, Bench
from bench.record import ResultFile
from kt_async.errors import KtError
from kt_async.ffi.host import ISA_NAMES, isa_number, query_host
from kt_async.ffi.pool import Pool

_ALL = (
    "Q4_K Q5_K Q6_K Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 IQ4_NL IQ4_XS MXFP4 BF16 F16 F32 "
    "Q2_K Q3_K IQ1_S IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S"
)
_MOST_CONCURRENT = 16  # tokens of a curve: what a decode step of many clients has


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser.add_argument("--isa", default="auto", choices=("auto", "all", *ISA_NAMES))
    parser.add_argument("--threads", type=int, default=0, help="0: one per physical core")
    parser.add_argument("--types", default="Q4_K,Q6_K,Q8_0,BF16", help="comma-separated, or all")
    parser.add_argument("--rows", type=numbers, default=[1, 2, 4, 8, 64, 512], metavar="M,..")
    parser.add_argument(
        "--tokens", type=numbers, default=[1, 2, 3, 4, 6, 8, 12, 16, 128, 512], metavar="T,.."
    )
    parser.add_argument(
        "--layers", default="qwen3:Q4_K:Q6_K,qwen3:Q8_0:Q8_0", help="shape:up:down,.. or none"
    )
    parser.add_argument(
        "--megabytes",
        type=int,
        default=max(96, 2 * query_host().l3_bytes >> 20),
        help="weights of one linear product, of two in turn; default 96 or twice the L3 cache",
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON lines; default results/kernels-*.jsonl")
    return parser.parse_args(argv)


def _known(what: str, names: Iterable[str], name: str) -> str:
    """The name. Raises KtError with all there are when it is not one of them."""
    if name not in names:
        raise KtError(f"{what} '{name}' is unknown; there are {', '.join(names)}.")
    return name


def wanted_types(text: str) -> list[str]:
    """Types of --types. Raises KtError for an unknown one."""
    names = {"all": _ALL, "none": ""}.get(text, text.replace(",", " ")).split()
    return [_known("type", _ALL.split(), name) for name in names]


def wanted_layers(text: str) -> list[tuple[str, str, str]]:
    """(shape, type of gate and up, type of down) of --layers. Raises KtError."""
    layers = []
    for layer in [] if text == "none" else text.split(","):
        if layer.count(":") != 2:
            raise KtError(f"a layer is SHAPE:UP:DOWN, not '{layer}'.")
        shape, up, down = layer.split(":")
        types = [_known("type", _ALL.split(), name) for name in (up, down)]
        layers.append((_known("shape", SHAPES, shape), types[0], types[1]))
    return layers


def run(args: argparse.Namespace, isa: str, output: ResultFile) -> Bench:
    """All measurements with one instruction set, printed."""
    types, layers = wanted_types(args.types), wanted_layers(args.layers)
    with Pool(args.threads, isa=isa_number(isa)) as pool:
        bench = Bench(args, pool, output)
        print(query_host().cpu_name, "|", pool.describe(), flush=True)
        for line in fixed_cost.measure(pool, output):
            print(line, flush=True)
        for name in types:
            bench.linear(name)
        for layer in layers:
            bench.layer(*layer)
        table = bench.finish()
        limits = bench.limits
        peaks = {"integer": limits.integer, "bf16": limits.bf16, "f32": limits.f32}
        text = ", ".join(
            f"{n} {v / 1e9:.0f} GMAC/s ({v / 5e11:.1f} T{'OP' if n == 'integer' else 'FLOP'}/s)"
            for n, v in peaks.items()
            if v
        )
        print(f"limits: read {limits.read / 1e9:.1f} GB/s, {text}")
        print(table, flush=True)
    return bench


def draw(bench: Bench, output: ResultFile, suffix: str) -> None:
    """A plot for every layer that has at least two points."""
    for curve in bench.curves:
        points = [i for i, tokens in enumerate(curve.tokens) if tokens <= _MOST_CONCURRENT]
        if len(points) < 2:
            continue
        name = f"{output.path.stem}-{curve.title}{suffix}".replace(" ", "-").replace("/", "-")
        path = output.path.with_name(f"{name}.png")
        plots.draw_layer(
            path,
            f"{curve.title}, {query_host().cpu_name}, {max(curve.reads) / 1e9:.0f} GB/s",
            [curve.tokens[i] for i in points],
            [curve.seconds[i] for i in points],
            [curve.bytes[i] / curve.reads[i] for i in points],
        )
        print(f"plot: {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print; 1 and one sentence when a type, shape or product is wrong."""
    args = parse(argv)
    output = ResultFile(args.output or ResultFile.default_path("kernels"))
    isas = query_host().isas if args.isa == "all" else [args.isa]
    try:
        for isa in isas:
            bench = run(args, isa, output)
            try:
                draw(bench, output, f"-{isa}" if args.isa == "all" else "")
            except BenchError as error:  # no matplotlib: the figures are still there
                print(error, file=sys.stderr)
    except KtError as error:
        print(f"bench/kernels.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
