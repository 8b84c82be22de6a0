"""How `auto` settings become numbers, once the model file's header and the machine are known.

Called once by `__main__`, which passes the memory arithmetic of the engine in. No I/O. Each derived
value carries its reason (`Config.reasons`, shown by --print-config).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kt_async.config import ARCHITECTURES, Config
from kt_async.errors import ConfigError

_GPU_ONLY = ("gpu_memory_utilization", "gpu_expert_mem")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What `resolve` needs of a model: read from the file's header, no weights loaded."""

    name: str
    architecture: str  # GGUF name
    max_context: int  # tokens
    main_type: str = ""  # type of most weights, e.g. "Q4_K" or "F32"
    generation: Mapping[str, float] = field(default_factory=dict)  # what the model recommends


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What `resolve` needs of the machine."""

    num_cpus: int  # logical CPUs this process may use
    num_cores: int  # physical cores among them, within the cgroup quota
    num_gpus: int = 0  # usable ones
    gpu_chunk: int = 2048  # tokens of a step with a GPU, unless --chunk_size says otherwise


@dataclass(frozen=True, slots=True)
class KvSize:
    """A KV cache that fits: capacity in tokens, bytes, and how it was chosen."""

    tokens: int
    num_bytes: int
    reason: str
    host_bytes: int = 0  # RAM a GPU's cache may use as its second tier
    vram_layers: tuple[int, ...] = ()  # whose routed experts lie in VRAM
    expert_bytes: int = 0  # what those take
    expert_reason: str = ""


# Given a Config whose device, kv_dtype, page_size, max_batch_size and max_model_len are final
# (cache_lens 0 = choose), says how large the KV cache is. Raises ConfigError when it cannot fit.
SizeKv = Callable[[Config], KvSize]


def resolve(raw: Config, model: ModelFacts, host: HostFacts, size_kv: SizeKv) -> Config:
    """Choose every value that was left open. Raises ConfigError with all problems at once."""
    return _Resolver(raw, model, host).run(size_kv)


class _Resolver:
    """One pass over the open values, in order of dependence."""

    def __init__(self, raw: Config, model: ModelFacts, host: HostFacts) -> None:
        self.raw = raw
        self.model = model
        self.host = host
        self.new: dict[str, Any] = {}
        self.reasons: dict[str, str] = dict(raw.reasons)
        self.warnings: list[str] = list(raw.warnings)
        self.errors: list[str] = []

    def run(self, size_kv: SizeKv) -> Config:
        self.names()
        self.sampling()
        self.device()
        self.threads()
        self.lengths()
        if self.errors:
            raise ConfigError("\n".join(self.errors))
        self.cache(size_kv)
        return self.config()

    def config(self) -> Config:
        return dataclasses.replace(
            self.raw, **self.new, reasons=self.reasons, warnings=tuple(self.warnings)
        )

    def put(self, name: str, value: object, reason: str) -> None:
        self.new[name] = value
        self.reasons[name] = reason

    def names(self) -> None:
        wanted = ARCHITECTURES.get(self.raw.architectures)
        if wanted is not None and wanted != self.model.architecture:
            self.errors.append(
                f"--architectures {self.raw.architectures} needs a {wanted} model, but the file "
                f"holds {self.model.architecture}."
            )
        if not self.raw.model_name:
            self.put("model_name", self.model.name, "name in the model file")

    def sampling(self) -> None:
        for name in ("temperature", "top_p", "top_k"):
            value = self.model.generation.get(name)
            if value is not None and name not in self.raw.sources:
                kind = type(getattr(self.raw, name))
                self.put(name, kind(value), "recommended by the model")

    def device(self) -> None:
        wanted, gpus = self.raw.device, self.host.num_gpus
        if wanted == "auto":
            device = "cuda:0" if gpus else "cpu"
            self.put("device", device, "a usable GPU was found" if gpus else "no usable GPU")
        elif wanted != "cpu":
            index = int(wanted.partition(":")[2] or 0)
            if index >= gpus:
                self.errors.append(
                    f"--device {wanted} asks for GPU {index}, but this machine has {gpus} usable "
                    "GPUs; use --device cpu."
                )
            self.put("device", f"cuda:{index}", "given")
        on_gpu = self.new.get("device", wanted) != "cpu"
        if not on_gpu:
            given = [name for name in _GPU_ONLY if name in self.raw.sources]
            self.warnings += [f"--{name} has no effect without a GPU." for name in given]
        if on_gpu and "chunk_size" not in self.raw.sources:
            # Each chunk copies experts to the GPU anew: long ones share that cost.
            self.put("chunk_size", self.host.gpu_chunk, "memory of the GPU")
        valid = ("auto", "bf16", "fp8") if on_gpu else ("auto", "f32", "f16", "bf16")
        if self.raw.kv_dtype not in valid:
            self.errors.append(
                f"--kv_dtype {self.raw.kv_dtype} is not available on the "
                f"{'GPU' if on_gpu else 'CPU'}; valid there are {', '.join(valid)}."
            )
        if self.raw.kv_dtype == "auto":
            exact = self.model.main_type == "F32" and not on_gpu
            dtype = "bf16" if on_gpu else ("f32" if exact else "f16")
            self.put("kv_dtype", dtype, "GPU" if on_gpu else f"{self.model.main_type} on the CPU")

    def threads(self) -> None:
        cores, asked = max(1, self.host.num_cores), self.raw.cpu_infer
        if asked == 0:
            self.put("cpu_infer", cores, "physical cores this process may use")
        elif asked > max(cores, self.host.num_cpus):
            limit = max(cores, self.host.num_cpus)
            self.put("cpu_infer", limit, f"{asked} asked for, {limit} CPUs there")
            self.warnings.append(f"--cpu_infer {asked} lowered to the {limit} CPUs there are.")

    def lengths(self) -> None:
        """Rows of a step and the longest sequence the model allows."""
        if self.raw.backend_type == "ktransformers" and self.raw.max_batch_size != 1:
            self.put("max_batch_size", 1, "--backend_type ktransformers: one request at a time")
        asked, context, cache = self.raw.max_model_len, self.model.max_context, self.raw.cache_lens
        if asked > context:
            self.warnings.append(
                f"--max_model_len {asked} lowered to the model's context, {context}."
            )
        if asked and 0 < cache < asked:
            self.errors.append(f"--max_model_len {asked} is more than --cache_lens {cache}.")
        if not 0 < asked <= context:
            self.put("max_model_len", context, "the model's context")

    def cache(self, size_kv: SizeKv) -> None:
        """Size of the KV cache; a sequence cannot be longer than it, nor an answer than that."""
        size = size_kv(self.config())
        tokens, reason = size.tokens, f"{size.reason}; {gigabytes(size.num_bytes)}"
        on_gpu = self.config().device != "cpu"
        if on_gpu and "cpu_memory_size_GB" not in self.raw.sources:
            value = round(size.host_bytes * 1e-9, 3)
            self.put("cpu_memory_size_GB", value, "a quarter of the memory that experts leave free")
        if on_gpu:
            self.new["vram_layers"] = size.vram_layers
            # Rounded up, so that the same number given as a flag holds the same layers.
            value = math.ceil(size.expert_bytes * 1e-6) * 1e-3
            self.put("gpu_expert_mem", f"{value:.3f}", size.expert_reason)
        limit = 0 if on_gpu else self.raw.cpu_memory_size_GB * 1e9
        if 0 < limit < size.num_bytes:
            tokens = int(tokens * limit / size.num_bytes)
            reason = f"--cpu_memory_size_GB {self.raw.cpu_memory_size_GB:g}"
        page = self.raw.page_size
        tokens = max(1, tokens // page) * page
        if tokens != self.raw.cache_lens:
            self.put("cache_lens", tokens, reason)
        if self.config().max_model_len > tokens:
            self.put("max_model_len", tokens, "the whole KV cache (--cache_lens)")
        longest = self.config().max_model_len
        if not 0 < self.raw.max_new_tokens <= longest:
            self.put("max_new_tokens", longest, "what fits into max_model_len")


def gigabytes(num_bytes: float) -> str:
    """Bytes as a person reads them."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
