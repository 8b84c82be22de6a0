"""How much memory serving a model needs, as arithmetic; refuses what cannot fit before loading."""

from __future__ import annotations

from dataclasses import dataclass

from kt_async.errors import ConfigError
from kt_async.ffi import structs
from kt_async.model.spec import ModelSpec

# e4m3, on a GPU only: not a type of the native library.
KV_FP8 = -8
_KV_BYTES = {structs.KT_KV_F32: 4, structs.KT_KV_F16: 2, structs.KT_KV_BF16: 2, KV_FP8: 1}
# Allowance for interpreter, libraries, tokenizer, step buffers and one tensor being packed. Measured
# peaks beside weights and cache: 85 MiB with the demo model, 210 MiB with Qwen3-30B-A3B's shapes and
# 152k tokens; a real tokenizer's merges come on top. Documented limit: 1.15 x file + 700 MB in all.
PROCESS_BYTES = 400 << 20
# Share of the memory left after the weights that an automatic KV cache may take.
_AUTO_KV_SHARE = 0.5
AUTO_KV_TOKENS = 131_072


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by purpose; total_needed is compared with what the host has available."""

    weight_bytes: int
    kv_bytes: int
    num_pages: int
    process_bytes: int
    available_bytes: int
    kv_reason: str

    @property
    def total_needed(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.process_bytes

    def describe(self) -> str:
        """One line for the start-up log."""
        return (
            f"memory: weights {gib(self.weight_bytes)}, KV cache {gib(self.kv_bytes)} "
            f"({self.kv_reason}), process {gib(self.process_bytes)}; needs "
            f"{gib(self.total_needed)} of {gib(self.available_bytes)} available"
        )


def gib(num_bytes: int) -> str:
    """1.5 GiB or 12.0 MiB."""
    if num_bytes >= 1 << 30:
        return f"{num_bytes / (1 << 30):.2f} GiB"
    return f"{num_bytes / (1 << 20):.1f} MiB"


def kv_bytes_per_token(spec: ModelSpec, kv_type: int) -> int:
    """Keys and values of all layers for one position."""
    value_dim = spec.v_head_dim or spec.head_dim
    width = spec.num_kv_heads * (spec.head_dim + value_dim)
    return spec.num_layers * width * _KV_BYTES[kv_type]


def wanted_tokens(max_batch_size: int, max_model_len: int) -> int:
    """KV capacity worth having: every row at full length, capped, but never less than one row."""
    return min(max_batch_size * max_model_len, max(AUTO_KV_TOKENS, max_model_len))


def plan_cpu_memory(
    spec: ModelSpec,
    *,
    weight_bytes: int,
    available_bytes: int,
    kv_type: int,
    page_size: int,
    max_model_len: int,
    max_batch_size: int,
    cache_lens: int | None,
) -> MemoryPlan:
    """Size the KV cache (cache_lens tokens, None = automatic) and check that everything fits.

    Automatic: every row may reach max_model_len, capped by half of the memory that the weights
    leave and by 131072 tokens; never less than one sequence of max_model_len needs if that fits.
    Raises ConfigError with the numbers.
    """
    per_token = kv_bytes_per_token(spec, kv_type)
    left = available_bytes - weight_bytes - PROCESS_BYTES
    if left <= 0:
        raise ConfigError(
            f"the model needs {gib(weight_bytes)} for its weights and {gib(PROCESS_BYTES)} for "
            f"the process, but only {gib(available_bytes)} of memory is available"
        )
    if cache_lens is not None:
        tokens = cache_lens
        reason = f"{cache_lens} tokens from --cache_lens"
    else:
        wanted = wanted_tokens(max_batch_size, max_model_len)
        fits = int(left * _AUTO_KV_SHARE) // per_token
        tokens = max(min(wanted, fits), page_size)
        reason = f"{tokens} tokens chosen for {max_batch_size} rows and the free memory"
    num_pages = max(1, -(-tokens // page_size))
    kv_bytes = num_pages * page_size * per_token
    if kv_bytes > left:
        raise ConfigError(
            f"--cache_lens {tokens} needs {gib(kv_bytes)} of KV cache, but {gib(left)} is left of "
            f"{gib(available_bytes)} after weights ({gib(weight_bytes)}) and process; the largest "
            f"value that fits is {left // (per_token * page_size) * page_size}"
        )
    return MemoryPlan(weight_bytes, kv_bytes, num_pages, PROCESS_BYTES, available_bytes, reason)


def check_host_memory(expert_bytes: int, tier_bytes: int, available_bytes: int) -> None:
    """Check the RAM of a GPU engine: experts that stay there and evicted KV pages.

    Raises ConfigError with the numbers.
    """
    needed = expert_bytes + tier_bytes + PROCESS_BYTES
    if needed > available_bytes:
        tier = f", {gib(tier_bytes)} for KV pages (--cpu_memory_size_GB)" if tier_bytes else ""
        raise ConfigError(
            f"the model needs {gib(expert_bytes)} of RAM for the experts on the CPU{tier} and "
            f"{gib(PROCESS_BYTES)} for the process, but only {gib(available_bytes)} of memory is "
            "available"
        )
