"""The commands that print something and exit: --cpu-info, --plan, --selfcheck."""

from __future__ import annotations

import asyncio
import importlib
import sys
import time
from collections.abc import Callable

import numpy as np
from gguf import GGMLQuantizationType

from kt_async.config import Config
from kt_async.engine.build import engine_info, gpu_plan
from kt_async.engine.memory import gib
from kt_async.engine.service import EngineService
from kt_async.engine.types import GenerationRequest, SamplingParams
from kt_async.errors import KtError
from kt_async.ffi import lib, matrix
from kt_async.ffi.host import isa_number, query_host
from kt_async.ffi.pool import Pool
from kt_async.serve import Prepared, load_engine, prepare
from kt_async.weights.placement import place
from kt_async.weights.plan import PlanHost, plan_text

_BANDWIDTH_BYTES = 1 << 28  # read buffer of the bandwidth probe
_CHECK_TOKENS = 16


def run(config: Config) -> int:
    """Run the command that config names; returns the exit code."""
    commands: dict[str, Callable[[Config], int]] = {
        "cpu_info": _cpu_info,
        "plan": _plan,
        "selfcheck": _selfcheck,
    }
    return commands[config.command](config)


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _cpu_info(config: Config) -> int:
    host = query_host()
    _print(f"cpu:        {host.cpu_name}")
    _print(f"kernels:    {host.best_isa} (usable: {', '.join(host.isas)})")
    _print(f"cores:      {host.num_cores} physical, {host.num_cpus} logical usable")
    _print(f"nodes:      {host.num_nodes}")
    quota = "none" if host.cpu_quota is None else f"{host.cpu_quota:g} CPUs"
    _print(f"quota:      {quota}")
    _print(f"memory:     {gib(host.available_bytes)} available of {gib(host.total_bytes)}")
    with Pool(num_threads=config.cpu_infer, isa=isa_number(config.isa), pin=config.pin) as pool:
        _print(f"pool:       {pool.describe()}")
        _print(f"bandwidth:  {pool.read_bandwidth(_BANDWIDTH_BYTES) * 1e-9:.1f} GB/s read")
    return 0


def _plan(config: Config) -> int:
    ready = prepare(config)
    on_gpu = ready.config.device != "cpu"
    # At once: it asks how much is free again, which what follows changes.
    memory = gpu_plan(ready.model, ready.config).describe() if on_gpu else ""
    host = query_host()
    with Pool(num_threads=ready.config.cpu_infer, isa=isa_number(ready.config.isa)) as pool:
        bandwidth = pool.read_bandwidth(_BANDWIDTH_BYTES)
    gpu_bytes, gpu_bandwidth = _gpu_memory(ready.config)
    machine = PlanHost(
        ram_bytes=host.available_bytes,
        cpu_bytes_per_s=bandwidth,
        gpu_bytes=gpu_bytes,
        gpu_bytes_per_s=gpu_bandwidth,
        has_amx="amx" in host.isas,
    )
    _print(plan_text(ready.model.spec, ready.model.files.tensors, ready.config, machine))
    if memory:
        _print(memory)
    ready.model.files.close()
    return 0


def _gpu_memory(config: Config) -> tuple[tuple[int, ...], float]:
    """Free bytes of each GPU, and bytes per second that a copy on the chosen one moves."""
    if config.device == "cpu":
        return (), 0.0
    import torch  # noqa: PLC0415 - seconds to import, and only a GPU needs it

    free = tuple(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
    source = torch.zeros(_BANDWIDTH_BYTES, dtype=torch.uint8, device=config.device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize(config.device)
        begin = time.monotonic()
        target.copy_(source)
        torch.cuda.synchronize(config.device)
        best = min(best, time.monotonic() - begin)
    return free, 2 * _BANDWIDTH_BYTES / best


def _selfcheck(config: Config) -> int:
    """Check each part on its own and then a generation; PASSED or FAILED per line."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("packages", _check_packages),
        ("native library", _check_library),
        ("kernels", _check_kernels),
        ("rules", lambda: _check_rules(config)),
        ("generation", lambda: _check_generation(config)),
    ]
    failed = 0
    for name, check in checks:
        begin = time.monotonic()
        try:
            outcome, detail = "PASSED", check()
        except (KtError, ImportError, OSError, AssertionError) as error:
            outcome, detail = "FAILED", f"{type(error).__name__}: {error}"
            failed += 1
        _print(f"{outcome}  {name:15} {detail} ({time.monotonic() - begin:.2f} s)")
    _print(f"{len(checks) - failed} passed, {failed} failed")
    return 1 if failed else 0


def _check_packages() -> str:
    names = ("aiohttp", "numpy", "orjson", "tokenizers", "msgspec", "jinja2", "yaml")
    versions = [getattr(importlib.import_module(name), "__version__", "?") for name in names]
    return ", ".join(f"{name} {v}" for name, v in zip(names, versions, strict=True))


def _check_library() -> str:
    return str(lib.load().kt_build_info().decode())


def _check_kernels() -> str:
    """Every usable instruction set multiplies a Q8_0 matrix as the scalar kernels do."""
    rng = np.random.default_rng(0)
    rows, cols = 48, 256
    blocks = np.zeros((rows, cols // 32, 34), np.uint8)
    blocks[..., :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    blocks[..., 2:] = rng.integers(0, 256, blocks[..., 2:].shape, np.uint8)
    x = rng.standard_normal((3, cols), np.float32)
    results = {}
    for isa in query_host().isas:
        with (
            Pool(num_threads=1, isa=isa_number(isa)) as pool,
            matrix.Matrix(pool, GGMLQuantizationType.Q8_0, blocks, rows, cols) as weights,
        ):
            results[isa] = weights.multiply(x)
    worst = max(float(np.abs(r - results["scalar"]).max()) for r in results.values())
    limit = 1e-3 * float(np.abs(results["scalar"]).max())
    if worst > limit:
        raise AssertionError(f"results differ by {worst:g}, allowed are {limit:g}")
    return f"{', '.join(results)} agree"


def _check_rules(config: Config) -> str:
    ready = prepare(config)
    placement = place(ready.model.spec, rules_path=config.optimize_config_path)
    ready.model.files.close()
    return f"{len(placement.modules)} modules placed by {placement.source}"


def _check_generation(config: Config) -> str:
    ready = prepare(config)
    name = str(ready.model.files.path)
    text, seconds = asyncio.run(_generate(ready))
    if len(text) != _CHECK_TOKENS:
        raise AssertionError(f"{len(text)} tokens instead of {_CHECK_TOKENS}")
    return f"{len(text) / seconds:.0f} tokens/s from {name}"


async def _generate(ready: Prepared) -> tuple[list[int], float]:
    """Greedy tokens through scheduler, runner and engine thread."""
    service = EngineService(*load_engine(ready), engine_info(ready.model, ready.config))
    service.start()
    begin = time.monotonic()
    prompt = ready.tokenizer.encode("Hello")
    request = GenerationRequest("selfcheck", prompt, _CHECK_TOKENS, SamplingParams(temperature=0.0))
    tokens: list[int] = []
    async for output in service.submit(request):
        if output.error:
            raise AssertionError(output.error)
        tokens.extend(output.tokens)
    seconds = time.monotonic() - begin
    service.close()
    ready.model.files.close()
    return tokens, seconds
