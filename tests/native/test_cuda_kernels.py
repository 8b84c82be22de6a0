"""The CUDA kernels over packed weights, run on the CPU a warp at a time (emulated_cuda.h)."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.cuda_tools import (
    Shape,
    check_experts,
    check_linear,
    check_prompt_experts,
    draw_ids,
    make_weights,
    reference,
)
from kt_async.engine.cuda import gemv as cuda_gemv
from kt_async.ffi.cuda import KernelArgument
from kt_async.ffi.pool import Pool
from kt_async.weights.gguf_header import TYPE_IDS

HERE = Path(__file__).parent
# One of each way to read weights; tests/gpu/test_kernels.py has all types.
TYPES = ("Q5_1", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL", "MXFP4")
WHOLE_TILES = {"Q4_K", "Q6_K"}  # columns in 256


class Emulated:
    """Launches the kernels on the CPU."""

    def __init__(self, library: Path) -> None:
        self._launch = ctypes.CDLL(str(library)).launch

    def launch(
        self,
        name: str,
        grid: tuple[int, int],
        arguments: Sequence[KernelArgument],
        block: int = 256,
        shared_bytes: int = 0,
    ) -> None:
        assert shared_bytes <= 96 << 10  # what every GPU since sm_80 has
        pointers = (ctypes.c_void_p * len(arguments))(
            *[ctypes.cast(ctypes.pointer(a), ctypes.c_void_p) for a in arguments]
        )
        assert self._launch(name.encode(), *grid, block, pointers) == 1, name


@pytest.fixture(scope="module")
def ops(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    library = tmp_path_factory.mktemp("cuda") / "run_cuda.so"
    cases = " ".join(f"X({TYPE_IDS[name]})" for name in TYPES)
    options = ["-O1", "-std=c++17", "-ffp-contract=off", "-fPIC", "-shared", "-w"]
    source = str(HERE / "run_cuda.cpp")
    command = [compiler, *options, f"-DKT_TYPES(X)={cases}", source, "-o", str(library)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if "_Float16" in made.stderr:
        pytest.skip("this g++ has no _Float16")
    assert made.returncode == 0, made.stderr[:3000]
    return Emulated(library)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(1) as made:
        yield made


@pytest.mark.parametrize("name", TYPES)
def test_linear(ops: Emulated, pool: Pool, name: str) -> None:
    rng = np.random.default_rng(1)
    torch.manual_seed(1)
    for cols in (768,) if name in WHOLE_TILES else (32, 672):
        weights = make_weights(pool, name, 36, cols, 1, rng, "cpu")
        for count in (1, 3, 11):
            check_linear(ops, weights, torch.randn((count, cols)))


@pytest.mark.parametrize("name", TYPES)
def test_dequantize(ops: Emulated, pool: Pool, name: str) -> None:
    rng = np.random.default_rng(2)
    cols = 512 if name in WHOLE_TILES else 160
    weights = make_weights(pool, name, 32, cols, 2, rng, "cpu")
    out = torch.empty((2, 32, cols), dtype=torch.bfloat16)
    cuda_gemv.dequantize(ops, weights.matrix, out)
    for expert in range(2):
        exact = reference(weights, expert, slice(0, 32))
        error = (out[expert].double() - exact).abs().max()
        assert float(error) <= float(exact.abs().max()) * 2**-8


@pytest.mark.parametrize(
    ("names", "tokens"),
    [(("Q4_K", "Q6_K"), 1), (("Q4_K", "Q6_K"), 9), (("MXFP4", "Q8_0"), 1), (("MXFP4", "Q8_0"), 3)],
)
def test_experts(ops: Emulated, pool: Pool, names: tuple[str, str], tokens: int) -> None:
    rng = np.random.default_rng(3)
    torch.manual_seed(3)
    shape = Shape(512, 256, 4, 2)
    sizes = (
        (names[0], shape.width, shape.hidden),
        (names[0], shape.width, shape.hidden),
        (names[1], shape.hidden, shape.width),
    )
    layer = [make_weights(pool, *size, shape.experts, rng, "cpu") for size in sizes]
    ids = draw_ids(tokens, shape, rng, "cpu")
    ids[:, 0], ids[:, 1] = 1, torch.where(ids[:, 1] == 1, 2, ids[:, 1])  # more than a pass takes
    x = torch.randn((tokens, shape.hidden))
    check_experts(ops, (layer[0], layer[1], layer[2]), x, ids)


def test_every_band_is_done_whatever_the_shape(ops: Emulated, pool: Pool) -> None:
    rng = np.random.default_rng(4)
    for rows, cols in ((16, 4096), (600, 256), (40, 1024)):
        weights = make_weights(pool, "Q4_K", rows, cols, 1, rng, "cpu")
        check_linear(ops, weights, torch.randn((1, cols)))


@pytest.mark.parametrize(
    ("names", "tokens"),
    [
        (("Q4_K", "Q4_K", "Q6_K"), 1),
        (("Q6_K", "Q6_K", "Q4_K"), 70),  # one expert gets more rows than a block takes
        (("Q5_1", "Q5_1", "Q8_0"), 9),
        (("MXFP4", "IQ4_NL", "Q8_0"), 5),
    ],
)
def test_prompt_experts(
    ops: Emulated, pool: Pool, names: tuple[str, str, str], tokens: int
) -> None:
    rng = np.random.default_rng(5)
    torch.manual_seed(5)
    # Of the types without whole tiles the last tile has one block: 9 of 32 columns.
    width = 256 if set(names) & WHOLE_TILES else 288
    shape = Shape(width, width, 4, 2)
    gate, up, down = (
        make_weights(pool, name, rows, cols, shape.experts, rng, "cpu")
        for name, rows, cols in zip(
            names,
            (shape.width, shape.width, shape.hidden),
            (shape.hidden, shape.hidden, shape.width),
            strict=True,
        )
    )
    ids = draw_ids(tokens, shape, rng, "cpu")
    ids[:, 0], ids[:, 1] = 1, torch.where(ids[:, 1] == 1, 3, ids[:, 1])  # expert 0 may have none
    ids[0, 1] = -1
    x = torch.randn((tokens, shape.hidden)).bfloat16()
    check_prompt_experts(ops, (gate, up, down), x, ids)
