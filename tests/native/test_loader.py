"""What is checked before weights are loaded, and the memory that loading takes at its peak."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.synthetic import write_random_gguf
from kt_async.demo import DEMO_SPEC
from kt_async.errors import ConfigError
from kt_async.weights.loader import check_types
from kt_async.weights.source import TYPE_IDS, open_model
from kt_async.weights.writer import TensorData, write_gguf


def test_integer_tensor_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    values = np.zeros((4, 32), np.float32)
    tensors = [
        TensorData("good", TYPE_IDS["F32"], values.shape, [values.tobytes()]),
        TensorData("bad", TYPE_IDS["I32"], values.shape, [values.tobytes()]),
    ]
    write_gguf(path, {"general.architecture": "qwen3moe"}, tensors)
    files = open_model(path)
    check_types(files, ["good"])
    with pytest.raises(ConfigError, match=r"model\.gguf: tensor 'bad' has type I32"):
        check_types(files, ["good", "bad"])
    files.close()


# Prints how far resident memory rose above what it was before the weights, and the time of it.
_LOAD = """
import sys
from pathlib import Path
from kt_async.engine.runner import CpuLimits, CpuRunner
from kt_async.ffi.pool import Pool
from kt_async.model.spec import spec_from_gguf
from kt_async.weights.source import open_model

def kilobytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))

files = open_model(Path(sys.argv[1]))
spec = spec_from_gguf(files)
with Pool(2) as pool:
    before = kilobytes("VmRSS")
    runner = CpuRunner(files, spec, pool, CpuLimits(8, 2, 2, 32, 4, 1, 100))
    print(1024 * (kilobytes("VmHWM") - before))
    runner.close()
"""


def test_loading_drops_the_pages_that_it_has_packed(tmp_path: Path) -> None:
    """Without that the peak is twice the file. 64 MB: the largest tensor, buffers, torch."""
    spec = replace(
        DEMO_SPEC, hidden_size=1024, num_experts=64, moe_intermediate_size=512, num_layers=4
    )
    path = tmp_path / "model.gguf"
    size = write_random_gguf(path, spec, "Q4_K_M")
    assert size > 200e6
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(path)],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 1.15 * size + 64e6
