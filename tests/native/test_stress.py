"""The worker pool's C++ stress driver, under ThreadSanitizer where the compiler has it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    "tests/native/stress_pool.cpp",
    "native/src/host/workers.cpp",
    "native/src/host/topology.cpp",
    "native/src/host/features.cpp",
    "native/src/base/error.cpp",
]


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_stress_driver_is_clean(sanitizer: str, tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    binary = tmp_path / "stress"
    flags = ["-std=c++20", "-O1", "-g", f"-fsanitize={sanitizer}", "-pthread"]
    includes = ["-Inative/include", "-Inative/src"]
    build = subprocess.run(
        [compiler, *flags, *includes, *SOURCES, "-o", str(binary)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if "cannot find" in build.stderr and "san" in build.stderr:
        pytest.skip(f"the compiler lacks the {sanitizer} run-time library")
    assert build.returncode == 0, build.stderr
    result = subprocess.run([str(binary)], capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout == "ok\n"
