"""The GPU engine as the server builds it: memory plan, dummy weights, restart after a failure."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from kt_async import cli, serve  # noqa: E402
from kt_async.engine.build import engine_info, gpu_plan  # noqa: E402
from kt_async.engine.restart import watch  # noqa: E402
from kt_async.engine.service import EngineService  # noqa: E402
from kt_async.engine.types import GenerationRequest, SamplingParams  # noqa: E402
from kt_async.errors import ConfigError, NativeError  # noqa: E402
from kt_async.ffi import structs  # noqa: E402

pytestmark = pytest.mark.gpu

# Qwen3-30B-A3B with 3 of its 48 layers and a smaller vocabulary.
CONFIG = {
    "model_type": "qwen3_moe",
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_hidden_layers": 3,
    "hidden_size": 2048,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-6,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 8192,
    "rope_theta": 1e6,
}
LAYER_GB = 0.45  # of one layer's experts at most


def prepared(folder: Path, *flags: str) -> serve.Prepared:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    argv = ["--load_format", "dummy", "--model_path", str(folder), "--device", "cuda:0"]
    return serve.prepare(cli.parse([*argv, *flags], {}))


def start(ready: serve.Prepared) -> EngineService:
    service = EngineService(*serve.load_engine(ready), engine_info(ready.model, ready.config))
    service.start()
    return service


async def tokens_of(service: EngineService, length: int) -> list[int]:
    request = GenerationRequest("x", range(length), 8, SamplingParams(temperature=0.0))
    tokens: list[int] = []
    async for output in service.submit(request):
        if output.error:
            raise AssertionError(output.error)
        tokens.extend(output.tokens)
    return tokens


@pytest.mark.parametrize(
    ("experts", "chunk"), [("0", 2048), ("0", 8192), (str(2 * LAYER_GB), 2048), ("all", 8192)]
)
def test_the_plan_holds(tmp_path: Path, experts: str, chunk: int) -> None:
    """What a long prompt and decoding take in VRAM stays within what was announced."""
    ready = prepared(tmp_path, "--gpu_expert_mem", experts, "--chunk_size", str(chunk))
    planned = gpu_plan(ready.model, ready.config).total_needed
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()

    async def run() -> None:
        service = start(ready)
        for _ in range(2):
            assert len(await tokens_of(service, 8000)) == 8
        await asyncio.to_thread(service.close)

    asyncio.run(run())
    peak = torch.cuda.max_memory_reserved() - before
    layers = ready.config.vram_layers
    print(
        f"experts {experts}: layers {layers}, peak {peak / 2**20:.0f} MiB of "
        f"{planned / 2**20:.0f} MiB planned"
    )
    assert len(layers) == {"0": 0, "all": 3}.get(experts, 2)
    assert peak <= planned
    ready.model.files.close()


def test_what_cannot_fit_is_refused_before_loading(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the largest value that fits is"):
        prepared(tmp_path, "--cache_lens", "100000000")
    with pytest.raises(ConfigError, match="--gpu_memory_utilization"):
        prepared(tmp_path, "--gpu_memory_utilization", "0.02", "--gpu_expert_mem", "all")


def test_a_failed_engine_is_loaded_again(tmp_path: Path) -> None:
    ready = prepared(tmp_path, "--gpu_expert_mem", "0")

    def broken(*args: Any) -> None:
        raise NativeError(structs.KT_ERR_INTERNAL, "injected failure")

    async def run() -> None:
        service = start(ready)
        guard = asyncio.create_task(watch(service, "restart", lambda: serve.load_engine(ready)))
        before = await tokens_of(service, 300)
        memory = torch.cuda.memory_allocated()
        service._runner.run = broken  # type: ignore[union-attr, method-assign]
        with pytest.raises(AssertionError, match="injected failure"):
            await tokens_of(service, 300)
        assert not service.healthy
        async with asyncio.timeout(60):
            while not service.healthy:  # noqa: ASYNC110 - another thread changes it
                await asyncio.sleep(0.05)
        assert len(await tokens_of(service, 300)) == len(before) == 8
        assert torch.cuda.memory_allocated() <= 1.1 * memory
        guard.cancel()
        await asyncio.to_thread(service.close)

    asyncio.run(run())
    ready.model.files.close()
