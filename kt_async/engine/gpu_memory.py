"""How a GPU's memory is divided, as arithmetic, before anything is loaded. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from kt_async.engine.memory import AUTO_KV_TOKENS, gib, kv_bytes_per_token, wanted_tokens
from kt_async.errors import ConfigError
from kt_async.ffi import structs
from kt_async.model.spec import ModelSpec

# cuBLAS, loaded kernels, captured graphs and what torch's allocator cannot hand out again.
_BASE_BYTES = 512 << 20
# flashinfer's scratch: for graphs, where it decodes, and for prompts (twice while rates are measured).
_ATTENTION_BYTES = (128 + 2 * 16) << 20
_PROMPT_LOGIT_ROWS = 32
_CHUNKS = (8192, 4096, 2048)
_ACTIVATION_SHARE = 16  # of the GPU's memory, which a chunk's activations may take


@dataclass(frozen=True, slots=True)
class KvWish:
    """What the engine should hold; cache_lens None = choose."""

    page_size: int
    max_model_len: int
    max_batch_size: int
    cache_lens: int | None
    chunk_size: int = 256
    kv_type: int = structs.KT_KV_BF16


@dataclass(frozen=True, slots=True)
class ExpertWish:
    """Which layers' routed experts should lie in VRAM.

    layer_bytes: bytes by layer. usable: layers whose types the GPU can compute with. layers:
    exactly these (a rule file, or all), whatever it takes; else as many as fit, at most `limit`
    bytes when that is given. origin: who wants it, for messages.
    """

    layer_bytes: Mapping[int, int]
    usable: frozenset[int]
    layers: frozenset[int] | None = None
    limit: int | None = None
    origin: str = ""


@dataclass(frozen=True, slots=True)
class GpuMemoryPlan:
    """What lies in VRAM, in bytes; vram_layers: layers whose routed experts do."""

    dense_bytes: int
    expert_bytes: int  # in VRAM
    host_bytes: int  # experts that stay in RAM
    kv_bytes: int
    num_pages: int
    work_bytes: int
    budget_bytes: int
    vram_layers: tuple[int, ...]
    num_expert_layers: int
    kv_reason: str

    @property
    def total_needed(self) -> int:
        return self.dense_bytes + self.expert_bytes + self.kv_bytes + self.work_bytes

    @property
    def expert_reason(self) -> str:
        """Where the routed experts are, in words."""
        return f"{len(self.vram_layers)} of {self.num_expert_layers} layers"

    def describe(self) -> str:
        """One line for the start-up log."""
        return (
            f"GPU memory: dense weights {gib(self.dense_bytes)}, experts of {self.expert_reason} "
            f"{gib(self.expert_bytes)} ({gib(self.host_bytes)} on the CPU), KV cache "
            f"{gib(self.kv_bytes)} ({self.kv_reason}), graphs and work {gib(self.work_bytes)}; "
            f"needs {gib(self.total_needed)} of {gib(self.budget_bytes)}"
        )


def gpu_budget(free_bytes: int, total_bytes: int, utilization: float) -> int:
    """Bytes this process may take: what others use counts against the share. Raises ConfigError."""
    used = total_bytes - free_bytes
    budget = int(total_bytes * utilization) - used
    if budget <= 0:
        raise ConfigError(
            f"--gpu_memory_utilization {utilization:g} allows {gib(int(total_bytes * utilization))} "
            f"of the GPU's {gib(total_bytes)}, but {gib(used)} are in use already"
        )
    return budget


def buckets(max_rows: int) -> list[int]:
    """Row counts with a graph of their own: 1 2 3 4 6 8 12 16 24 32 ... up to max_rows."""
    sizes = [1, 2, 3]
    step = 4
    while sizes[-1] < max_rows:
        sizes.extend([step, step * 3 // 2])
        step *= 2
    return [*(s for s in sizes if s < max_rows), max_rows]


def work_bytes(spec: ModelSpec, kv: KvWish) -> int:
    """Memory of the steps themselves: logits, dequantised matrices, activations of a chunk."""
    # A buffer to sample from for steps and one for the lane, and each graph's logits.
    rows = 2 * (kv.max_batch_size + _PROMPT_LOGIT_ROWS) + sum(buckets(kv.max_batch_size))
    logits = 4 * rows * spec.vocab_size
    # Prompts multiply by bf16 copies of dense matrices; experts are read as they are.
    heads = spec.num_heads + 2 * spec.num_kv_heads  # their matrices side by side
    widest = max(heads * spec.head_dim, _dense_width(spec))
    dequantised = 2 * spec.hidden_size * widest
    activations = _activation_bytes(spec, kv.chunk_size)
    return _BASE_BYTES + _ATTENTION_BYTES + logits + dequantised + activations


def _dense_width(spec: ModelSpec) -> int:
    """Of the widest feed-forward part that every token goes through; 0: there is none."""
    return max(
        spec.shared_intermediate_size, spec.intermediate_size if spec.num_dense_layers else 0
    )


def _activation_bytes(spec: ModelSpec, chunk_size: int) -> int:
    """What a layer holds at once: f32 sums, their norms in f32 and bf16, and one of its parts."""
    hidden, heads = spec.hidden_size, spec.num_heads * spec.head_dim
    kept = (4 + 4 + 2) * hidden
    # Queries, keys and values in f32, queries and results in bf16, the product in both.
    attention = (4 + 2 + 2) * heads + 8 * spec.num_kv_heads * spec.head_dim + 6 * hidden
    # Each pair's hidden row and result in bf16, its place and weight; router logits, the sum.
    pair = 2 * (spec.moe_intermediate_size + hidden) + 5 * 4
    experts = spec.top_k * pair + 4 * spec.num_experts + 4 * hidden
    dense = (2 * 4 + 4 + 2) * _dense_width(spec) + 6 * hidden
    return chunk_size * (kept + max(attention, experts, dense))


def chunk_for(spec: ModelSpec, gpu_bytes: int) -> int:
    """Tokens of a step when nobody gave a number: the largest chunk with modest activations.

    Experts in host memory are copied anew for each chunk, so that 8,192 tokens at once take a
    little more than a third of the time of four times 2,048.
    """
    room = gpu_bytes // _ACTIVATION_SHARE
    fitting = (chunk for chunk in _CHUNKS if _activation_bytes(spec, chunk) <= room)
    return next(fitting, _CHUNKS[-1])


def plan_gpu_memory(
    spec: ModelSpec, kv: KvWish, wish: ExpertWish, *, dense_bytes: int, budget: int
) -> GpuMemoryPlan:
    """Divide a GPU: dense weights first, then one sequence's KV, layers of experts, more KV.

    budget: bytes that may be used. With experts on the CPU two of their layers have staging room in
    VRAM for long prompts. Raises ConfigError with the numbers.
    """
    per_page = kv_bytes_per_token(spec, kv.kv_type) * kv.page_size
    fewest = -(-min(kv.cache_lens or kv.max_model_len, AUTO_KV_TOKENS) // kv.page_size) * per_page
    fixed = dense_bytes + work_bytes(spec, kv)
    chosen = _choose_layers(wish, budget - fixed - fewest)
    experts = sum(wish.layer_bytes[layer] for layer in chosen)
    work = fixed - dense_bytes + _staging(wish, chosen)
    left = budget - dense_bytes - work - experts
    if left < per_page:
        held = f", experts of {len(chosen)} layers {gib(experts)}" if chosen else ""
        advice = f" put fewer experts there ({wish.origin})," if chosen and wish.origin else ""
        raise ConfigError(
            f"the GPU has {gib(budget)} to use, but dense weights take {gib(dense_bytes)}{held} and "
            f"work memory {gib(work)}; free some,{advice} raise --gpu_memory_utilization, or use "
            "--device cpu"
        )
    if kv.cache_lens is not None:
        tokens, reason = kv.cache_lens, f"{kv.cache_lens} tokens from --cache_lens"
    else:
        wanted = wanted_tokens(kv.max_batch_size, kv.max_model_len)
        tokens = max(kv.page_size, min(wanted, left // per_page * kv.page_size))
        reason = f"{tokens} tokens chosen for {kv.max_batch_size} rows and the free GPU memory"
    num_pages = max(1, -(-tokens // kv.page_size))
    if num_pages * per_page > left:
        raise ConfigError(
            f"--cache_lens {tokens} needs {gib(num_pages * per_page)} of GPU memory, but "
            f"{gib(left)} is left; the largest value that fits is {left // per_page * kv.page_size}"
        )
    return GpuMemoryPlan(
        dense_bytes=dense_bytes,
        expert_bytes=experts,
        host_bytes=sum(wish.layer_bytes.values()) - experts,
        kv_bytes=num_pages * per_page,
        num_pages=num_pages,
        work_bytes=work,
        budget_bytes=budget,
        vram_layers=tuple(sorted(chosen)),
        num_expert_layers=len(wish.layer_bytes),
        kv_reason=reason,
    )


def _staging(wish: ExpertWish, chosen: frozenset[int]) -> int:
    """Two layers' room for experts that are copied for a long prompt."""
    return 2 * max((size for n, size in wish.layer_bytes.items() if n not in chosen), default=0)


def _choose_layers(wish: ExpertWish, room: int) -> frozenset[int]:
    """Layers in VRAM; `room`: bytes for experts and staging together."""
    if wish.layers is not None:
        return wish.layers
    limit = sum(wish.layer_bytes.values()) if wish.limit is None else wish.limit
    asked = _first_layers(wish, limit)
    if asked and sum(wish.layer_bytes[n] for n in asked) + _staging(wish, asked) <= room:
        return asked
    fitting = _first_layers(wish, min(limit, room - _staging(wish, frozenset())))
    if wish.limit is not None and len(fitting) < len(asked):
        size = sum(wish.layer_bytes[n] for n in fitting)
        raise ConfigError(
            f"{wish.origin} asks for {len(asked)} layers of experts in GPU memory, but only "
            f"{len(fitting)} fit beside dense weights, KV cache and work memory; the largest "
            f"value that fits is {math.ceil(size * 1e-6) * 1e-3:.3f}"
        )
    return fitting


def _first_layers(wish: ExpertWish, limit: int) -> frozenset[int]:
    """As many usable layers as `limit` bytes hold, from the first on."""
    chosen: set[int] = set()
    for layer, size in sorted(wish.layer_bytes.items()):
        if layer in wish.usable and size <= limit:
            chosen.add(layer)
            limit -= size
    return frozenset(chosen)
