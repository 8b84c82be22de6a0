"""What the machine's files say about quota and nodes, in a mount namespace with files of our own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUOTA = """
from kt_async.ffi.host import query_host
from kt_async.ffi.pool import Pool
with Pool() as default, Pool(2) as asked:
    print(query_host().cpu_quota, default.describe().split()[0], asked.describe().split()[0])
"""
NODES = """
import numpy as np
from kt_async.ffi.host import query_host
from kt_async.ffi.pool import Pool
from tests.native.test_expert_set import EXPERTS, SHAPES, TOP_K, ExpertSet, inputs, layer_bytes
from kt_async.ffi import structs
results, described = [], []
for threads in (1, 2):
    with Pool(threads) as pool:
        described.append(pool.describe())
        experts = ExpertSet(pool, 9, TOP_K)
        raws = layer_bytes()
        experts.add_layer(*(
            structs.tensor_at(kind, (EXPERTS, rows, cols), raw.nbytes, raw.ctypes.data)
            for (kind, rows, cols), raw in zip(SHAPES, raws, strict=True)
        ))
        experts.finish()
        x, ids, weights = inputs(5)
        out = np.empty_like(x)
        experts.run(0, x, ids, weights, out)
        results.append((out, [len(experts.parts(0, which)) for which in range(3)]))
        experts.close()
print(query_host().num_nodes)
print(results[0][1], results[1][1], np.array_equal(results[0][0], results[1][0]))
print(described[1])
"""


def run_with(folder: Path, place: str, code: str) -> str:
    """Output of a Python program that sees `folder` at `place`. Skips where that is not allowed."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    mount = f"mount --bind {folder} {place}"
    allowed = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False
    )
    if allowed.returncode != 0:
        pytest.skip("needs the right to make a mount namespace")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$0" -c "$1"', sys.executable, code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("cpu_max", "quota", "threads"),
    [("150000 100000", "1.5", "1"), ("20000 100000", "0.2", "1"), ("max 100000", "None", None)],
)
def test_the_cgroup_quota_caps_the_default(
    cpu_max: str, quota: str, threads: str | None, tmp_path: Path
) -> None:
    """Rounded down, at least one; a number that is asked for stands."""
    (tmp_path / "cpu.max").write_text(cpu_max + "\n")
    found = run_with(tmp_path, "/sys/fs/cgroup", QUOTA).split()
    assert found[0] == quota
    assert found[1] == threads or threads is None
    assert found[2] == "2"


def test_two_nodes_in_sysfs_split_the_bands(tmp_path: Path) -> None:
    """Workers of both nodes, a part of every tensor on each, the same result."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("needs two CPUs")
    half = len(cpus) // 2
    for node, members in enumerate((cpus[:half], cpus[half:])):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(",".join(map(str, members)) + "\n")
    (tmp_path / "online").write_text("0-1\n")
    lines = run_with(tmp_path, "/sys/devices/system/node", NODES).splitlines()
    assert lines[0] == "2"
    assert lines[1] == "[1, 1, 1] [2, 2, 2] True"
    assert lines[2].startswith("2 threads on 2 nodes")
    assert "node 0: workers 0-0" in lines[2]
    assert "node 1: workers 1-1" in lines[2]
