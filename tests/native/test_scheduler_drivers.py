"""The C++ drivers of the scheduler under sanitizers, for a few seconds; `make fuzz` runs longer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def build(name: str) -> Path:
    """Compile with `make`, as a developer would; skips where the tools are missing."""
    if not (shutil.which("make") and shutil.which("c++")):
        pytest.skip("needs make and a C++ compiler")
    folder = ROOT / "tests/native/drivers"
    target = f"../../../build/drivers/{name}"
    done = subprocess.run(
        ["make", "--no-print-directory", target],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if "cannot find" in done.stderr and "san" in done.stderr:
        pytest.skip("the compiler has no sanitizer libraries")
    assert done.returncode == 0, done.stderr
    return folder / target


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.parametrize(("name", "count"), [("sched_random", "300000"), ("sched_threads", "3000")])
def test_driver_is_clean(name, count):
    done = subprocess.run(
        [build(name), count], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("ok\n")
    assert not done.stderr
