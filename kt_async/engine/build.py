"""Put an engine together: model files and settings -> scheduler, runner and service.

Runs before serving; the order is check everything, say what is needed, then load.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kt_async.config import Config
from kt_async.engine.gpu_memory import (
    ExpertWish,
    GpuMemoryPlan,
    KvWish,
    gpu_budget,
    plan_gpu_memory,
)
from kt_async.engine.memory import (
    KV_FP8,
    check_host_memory,
    gib,
    kv_bytes_per_token,
    plan_cpu_memory,
)
from kt_async.engine.runner import CpuLimits, CpuRunner, Runner
from kt_async.engine.types import EngineInfo
from kt_async.errors import ConfigError
from kt_async.ffi import structs
from kt_async.ffi.host import HostInfo, isa_number
from kt_async.ffi.pool import Pool
from kt_async.ffi.scheduler import Scheduler
from kt_async.model.spec import ModelSpec
from kt_async.resolve import KvSize
from kt_async.weights.placement import place
from kt_async.weights.source import ModelFiles, TensorInfo

log = logging.getLogger(__name__)

_KV_TYPES = {
    "f32": structs.KT_KV_F32,
    "f16": structs.KT_KV_F16,
    "bf16": structs.KT_KV_BF16,
    "fp8": KV_FP8,
}
_POLICIES = {
    "FCFS": structs.KT_SCHED_FCFS,
    "FCFS-single-prefill": structs.KT_SCHED_FCFS_SINGLE_PREFILL,
}
# Most RAM that evicted KV pages of a GPU take without being asked to.
_MOST_TIER_BYTES = 16_000_000_000
# Fewer prompt tokens than these hold decode rows up for less time than copying all experts takes.
_LANE_TOKENS = 16
# Logit rows beyond one per sequence: how many prompt positions of an echo request one step scores.
_PROMPT_LOGIT_ROWS = 32


@dataclass(frozen=True, slots=True)
class Model:
    """An opened model file and what its header says."""

    files: ModelFiles
    spec: ModelSpec
    sample_vocab: int  # ids the sampler may return

    @property
    def main_type(self) -> str:
        """The type that holds most of the bytes."""
        sizes: Counter[str] = Counter()
        for info in self.files.tensors.values():
            sizes[info.type_name] += info.num_bytes
        return sizes.most_common(1)[0][0]


def size_kv(model: Model, host: HostInfo, config: Config) -> KvSize:
    """KV cache and place of the experts for `resolve`: checks that everything fits into memory."""
    if config.device != "cpu":
        return _size_gpu(model, host, config)
    plan = plan_cpu_memory(
        model.spec,
        weight_bytes=model.files.total_bytes,
        available_bytes=host.available_bytes,
        kv_type=_KV_TYPES[config.kv_dtype],
        page_size=config.page_size,
        max_model_len=config.max_model_len,
        max_batch_size=config.max_batch_size,
        cache_lens=config.cache_lens or None,
    )
    log.info("%s", plan.describe())
    return KvSize(plan.num_pages * config.page_size, plan.kv_bytes, plan.kv_reason)


def gpu_plan(model: Model, config: Config) -> GpuMemoryPlan:
    """How the GPU's memory is divided; asks the GPU how much is free. Raises ConfigError."""
    import torch  # noqa: PLC0415 - seconds to import, and only a GPU needs it

    from kt_async.engine.cuda.build import KERNEL_TYPES, dense_bytes  # noqa: PLC0415

    free_bytes, total_bytes = torch.cuda.mem_get_info(_gpu_index(config))
    wish = KvWish(
        config.page_size,
        config.max_model_len,
        config.max_batch_size,
        config.cache_lens or None,
        config.chunk_size,
        _KV_TYPES[config.kv_dtype],
    )
    return plan_gpu_memory(
        model.spec,
        wish,
        expert_wish(model, config, KERNEL_TYPES),
        dense_bytes=dense_bytes(model.files),
        budget=gpu_budget(free_bytes, total_bytes, config.gpu_memory_utilization),
    )


def _size_gpu(model: Model, host: HostInfo, config: Config) -> KvSize:
    plan = gpu_plan(model, config)
    log.info("%s", plan.describe())
    given = "cpu_memory_size_GB" in config.sources and config.prefix_cache
    check_host_memory(
        plan.host_bytes,
        round(config.cpu_memory_size_GB * 1e9) if given else 0,
        host.available_bytes,
    )
    tier = min(_MOST_TIER_BYTES, (host.available_bytes - plan.host_bytes) // 4)
    return KvSize(
        plan.num_pages * config.page_size,
        plan.kv_bytes,
        plan.kv_reason,
        tier,
        plan.vram_layers,
        plan.expert_bytes,
        plan.expert_reason,
    )


def expert_wish(model: Model, config: Config, kernel_types: frozenset[int]) -> ExpertWish:
    """Which layers' routed experts should lie in VRAM: a rule file decides, else --gpu_expert_mem.

    Raises ConfigError for a layer that must and whose type has no GPU kernel.
    """
    layer_bytes: dict[int, int] = {}
    unusable: dict[int, TensorInfo] = {}
    for name, info in model.files.tensors.items():
        if "_exps." in name:
            layer = int(name.split(".")[1])
            layer_bytes[layer] = layer_bytes.get(layer, 0) + info.num_bytes
            if info.type not in kernel_types:
                unusable[layer] = info
    layers, limit, origin = None, None, f"--gpu_expert_mem {config.gpu_expert_mem}"
    if config.optimize_config_path:
        layers, origin = rule_layers(model.spec, config), config.optimize_config_path
    elif config.gpu_expert_mem == "all":
        layers = frozenset(layer_bytes)
    elif config.gpu_expert_mem != "auto":
        limit = round(float(config.gpu_expert_mem) * 1e9)
    refused = sorted((layers or frozenset()) & unusable.keys())
    if refused:
        info = unusable[refused[0]]
        raise ConfigError(
            f"{origin} puts the routed experts on the GPU, but tensor {info.name} has type "
            f"{info.type_name}, for which there is no GPU kernel"
        )
    usable = frozenset(layer_bytes.keys() - unusable.keys())
    return ExpertWish(layer_bytes, usable, layers, limit, origin)


def rule_layers(spec: ModelSpec, config: Config) -> frozenset[int]:
    """Layers whose routed experts a rule file puts on a GPU."""
    placement = place(
        spec,
        rules_path=config.optimize_config_path,
        device=config.device,
        num_gpus=_gpu_index(config) + 1,
    )
    return frozenset(
        int(placed.module.tensors[0].split(".")[1])
        for placed in placement.modules
        if placed.module.kind == "experts" and placed.device != "cpu"
    )


def _gpu_index(config: Config) -> int:
    return int(config.device.partition(":")[2] or 0)


def num_host_pages(spec: ModelSpec, config: Config) -> int:
    """KV pages kept in RAM after the GPU evicted them; none without a GPU, whose KV is in RAM."""
    if config.device == "cpu" or not config.prefix_cache:
        return 0
    layer_bytes = kv_bytes_per_token(spec, _KV_TYPES[config.kv_dtype]) * config.page_size
    layer_bytes //= spec.num_layers
    # Each layer has one pinned tensor, and PyTorch rounds those up to a power of two: fill one that
    # stays within what was asked for.
    room = int(config.cpu_memory_size_GB * 1e9) // spec.num_layers
    return (1 << room.bit_length() >> 1) // layer_bytes


def make_scheduler(spec: ModelSpec, config: Config) -> Scheduler:
    """The native scheduler for a resolved config."""
    return Scheduler(
        structs.sized(
            structs.SchedConfig,
            flags=structs.KT_SCHED_PREFIX_CACHE if config.prefix_cache else 0,
            policy=_POLICIES[config.sched_strategy],
            max_batch_size=config.max_batch_size,
            chunk_size=max(config.chunk_size, config.max_batch_size),
            page_size=config.page_size,
            num_pages=config.num_pages,
            max_len=config.max_model_len,
            max_queue=config.max_queue,
            max_samples=config.max_batch_size + _PROMPT_LOGIT_ROWS,
            watermark_pages=-1,
            num_host_pages=num_host_pages(spec, config),
            queue_timeout_ns=round(config.queue_timeout_s * 1e9),
            target_itl_ns=round(config.target_itl_ms * 1e6),
            lane_tokens=_LANE_TOKENS if config.device != "cpu" and config.use_cuda_graph else 0,
        )
    )


def load_runner(model: Model, config: Config, scheduler: Scheduler) -> Runner:
    """Load the weights onto the configured device; takes as long as the disk needs."""
    pool = Pool(num_threads=config.cpu_infer, isa=isa_number(config.isa), pin=config.pin)
    log.info("%s", pool.describe())
    begin = time.monotonic()
    load = _cpu_runner if config.device == "cpu" else _gpu_runner
    runner = load(model, config, scheduler, pool)
    seconds = max(time.monotonic() - begin, 1e-3)
    size = model.files.total_bytes
    log.info("loaded %s in %.1f s (%.2f GB/s)", gib(size), seconds, size / seconds * 1e-9)
    return runner


def _gpu_runner(model: Model, config: Config, scheduler: Scheduler, pool: Pool) -> Runner:
    import torch  # noqa: PLC0415

    from kt_async.engine.cuda.build import CudaOptions, empty_caches, load_cuda_runner  # noqa: PLC0415
    from kt_async.engine.cuda.runner import CudaLimits  # noqa: PLC0415

    torch.cuda.set_device(_gpu_index(config))
    empty_caches()
    limits = CudaLimits(
        config.page_size,
        config.num_pages,
        model.sample_vocab,
        max_page_ids=config.num_pages,
        num_host_pages=num_host_pages(model.spec, config),
        kv_fp8=config.kv_dtype == "fp8",
    )
    options = CudaOptions(
        vram_layers=config.vram_layers,
        use_graphs=config.use_cuda_graph,
        cache_dir=Path.home() / ".cache" / "kt_async",
    )
    return load_cuda_runner(model.files, model.spec, pool, scheduler.layout, limits, options)


def _cpu_runner(model: Model, config: Config, scheduler: Scheduler, pool: Pool) -> Runner:
    layout = scheduler.layout
    limits = CpuLimits(
        max_tokens=layout.max_tokens,
        max_rows=layout.max_rows,
        max_samples=layout.max_samples,
        page_size=config.page_size,
        num_pages=config.num_pages,
        kv_type=_KV_TYPES[config.kv_dtype],
        sample_vocab=model.sample_vocab,
    )
    return CpuRunner(model.files, model.spec, pool, limits)


def engine_info(model: Model, config: Config) -> EngineInfo:
    """What /v1/models and /health say about the model."""
    spec = model.spec
    details: dict[str, Any] = {
        "architecture": spec.architecture,
        "quantization": model.main_type,
        "size_bytes": model.files.total_bytes,
        "num_layers": spec.num_layers,
        "num_experts": spec.num_experts,
        "experts_per_token": spec.top_k,
        "device": config.device,
        "kv_dtype": config.kv_dtype,
        "kv_cache_tokens": config.cache_lens,
    }
    return EngineInfo(
        model_name=config.model_name,
        architecture=spec.architecture,
        max_model_len=config.max_model_len,
        vocab_size=model.sample_vocab,
        created=int(time.time()),
        details=details,
    )
