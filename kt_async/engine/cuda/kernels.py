"""Our CUDA kernels, compiled for the current GPU, and a way to put them onto the current stream."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from kt_async.engine.cuda.handoff import Launch
from kt_async.ffi.cuda import KernelArgument, Kernels, compile_kernels, kernel_source

_THREADS = 256


def kernels_for(types: set[int], cache_dir: Path | None) -> Kernels:
    """Our CUDA kernels for these ggml types, compiled for the current GPU."""
    torch.cuda.synchronize()  # a module is loaded into a context, which the first call makes
    major, minor = torch.cuda.get_device_capability()
    suffix = "a" if major >= 9 else ""
    source = kernel_source(sorted(types))
    return Kernels(compile_kernels(source, f"sm_{major}{minor}{suffix}", cache_dir))


def launcher(kernels: Kernels) -> Launch:
    """Puts our kernels onto the current stream."""

    def launch(name: str, grid: tuple[int, int], arguments: Sequence[KernelArgument]) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        kernels.launch(name, grid, _THREADS, stream, arguments)

    return launch


@contextmanager
def no_old_graphs() -> Iterator[None]:
    """Around captures: a graph of an engine before this one that is destroyed meanwhile ends them."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
