"""The AMX kernels on a CPU without AMX: the same source over emulated tile instructions."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kt_async.ffi.host import query_host

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "native" / "src" / "kernels"
BASELINE = ["types", "types_iq", "pack", "matrix_scalar", "matrix_dispatch"]
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
VNNI = [
    *AVX2,
    *(f"-mavx512{part}" for part in ["f", "bw", "vl", "dq", "cd", "vnni", "bf16", "vbmi"]),
]
# The intrinsics headers of gcc 12 warn about themselves.
FLAGS = ["-std=c++20", "-O1", "-w", "-Inative/include", "-Inative/src", "-c"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_tiles_agree_with_vnni(tmp_path: Path) -> None:
    if "avx512vnni" not in query_host().isas:
        pytest.skip("needs AVX-512 VNNI")
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    jobs = [(KERNELS / f"{name}.cpp", []) for name in BASELINE]
    jobs += [(KERNELS / "matrix_avx2.cpp", AVX2), (KERNELS / "matrix_avx512.cpp", VNNI)]
    jobs += [(KERNELS / "matrix_avx512vnni.cpp", VNNI)]
    jobs += [(KERNELS / "matrix_amx.cpp", [*VNNI, "-include", "tests/native/emulated_tiles.h"])]
    jobs += [(ROOT / "tests" / "native" / "check_tiles.cpp", [])]

    def compile_one(job: tuple[Path, list[str]]) -> str:
        source, flags = job
        target = tmp_path / f"{source.stem}.o"
        run([compiler, *FLAGS, *flags, str(source), "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, jobs))
    binary = tmp_path / "check_tiles"
    run([compiler, *objects, "-o", str(binary)])
    assert run([str(binary)]) == "ok\n"


def run(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout
