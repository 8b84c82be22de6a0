"""bench/kernels.py on a layer of a few kilobytes: result lines, equal work in every run, the plot."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import orjson
import pytest

from bench import kernel_cases, kernel_limits, kernels, stats
from bench.kernel_cases import Shape

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernel_cases.SHAPES, "small", Shape(256, 256, 16, 4))


def arguments(output: Path, *more: str) -> list[str]:
    return [
        *("--types", "Q8_0", "--rows", "1,3", "--megabytes", "1", "--repeats", "2"),
        *("--layers", "small:Q4_K:Q8_0", "--tokens", "1,4,40", "--threads", "2"),
        *("--output", str(output), *more),
    ]


def test_lines_table_and_plot(
    small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    assert kernels.main(arguments(output)) == 0
    lines = [orjson.loads(line) for line in output.read_bytes().splitlines()]
    kinds = [line["kind"] for line in lines]
    assert kinds == ["kernel.fixed"] * 4 + ["kernel.linear"] * 2 + ["kernel.layer"] * 3
    layer = lines[-3]
    assert layer["bytes"] == 4 * (2 * 256 * 256 * 144 // 256 + 256 * 256 * 34 // 32)
    assert layer["share"] > 0
    assert all(line["seconds"] and min(line["seconds"]) > 0 for line in lines)
    printed = capsys.readouterr()
    assert "small Q4_K/Q8_0, 40 tokens" in printed.out
    drawn = list(tmp_path.glob("*.png"))
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert "no plots" in printed.err
    else:
        assert [path.name for path in drawn] == ["out-small-Q4_K-Q8_0.png"]
        assert drawn[0].read_bytes().startswith(b"\x89PNG")


def test_every_draw_chooses_as_many_experts(small: None, tmp_path: Path) -> None:
    class Routes(kernel_cases.Bench):
        def __init__(self) -> None:
            self._rng = np.random.default_rng(0)

    draws, distinct = Routes()._routes(3, kernel_cases.SHAPES["small"])
    assert 2 <= len(draws) <= 64
    assert {len(np.unique(ids)) for ids in draws} == {distinct}
    for ids in draws:
        assert ids.shape == (3, 4)
        assert all(len(set(row)) == 4 for row in ids.tolist())
    draws, distinct = Routes()._routes(1, kernel_cases.SHAPES["small"])
    assert distinct == 4
    assert sorted(np.concatenate(draws).ravel().tolist()) == list(range(16))


def test_wrong_types_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, text in (
        (["--types", "Q9_K"], "type 'Q9_K' is unknown; there are Q4_K, Q5_K,"),
        (["--types", "none", "--layers", "qwen4:Q4_K:Q4_K"], "shape 'qwen4' is unknown"),
        (["--types", "none", "--layers", "qwen3:Q4_K:Q4"], "type 'Q4' is unknown"),
        (["--types", "none", "--layers", "qwen3"], "a layer is SHAPE:UP:DOWN, not 'qwen3'"),
    ):
        assert kernels.main([*arguments(tmp_path / "x.jsonl"), *more]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"bench/kernels.py: {text}")
        assert error.count("\n") == 1


def test_median_of_the_runs_is_what_the_table_shows() -> None:
    limits = kernel_limits.Limits(read=1e9, integer=1e9, bf16=None, f32=1e9)
    work = kernel_limits.Work(500.0, 10.0, 1)
    row, record = kernel_limits.report("l", "Q4_K", [3e-6, 1e-6, 2e-6], limits, work)
    assert row[:3] == ["l", stats.number(1.0), stats.number(2.0)]
    assert record["bandwidth_share"] == pytest.approx(0.5)


def test_the_raw_row_bench_still_compiles() -> None:
    """It is built by hand only; this keeps it in step with kt.h."""
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("needs g++ for x86-64")
    script = (ROOT / "bench/raw_rows.sh").read_text()
    flags = re.findall(r"-m(?:avx|fma|f16c|amx)[\w-]*", script)
    assert "-mavx512vnni" in flags
    done = subprocess.run(
        [
            *(compiler, "-std=c++20", "-fsyntax-only", "-w", *flags),
            *("-Inative/include", "-Inative/src", "bench/raw_rows.cpp"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
