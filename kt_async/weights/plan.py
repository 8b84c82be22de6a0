"""--plan: what would lie where, and how fast decoding could be at best, as text.

Reads tensor sizes from the file header only. The bound is arithmetic: bytes that a step must read
divided by the bandwidth of the memory they lie in; nothing can be faster, real steps are slower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from kt_async.weights.placement import Placed, Placement, place

if TYPE_CHECKING:
    from kt_async.config import Config
    from kt_async.model.spec import ModelSpec

_GROUPS = {
    "experts": "routed experts",
    "embedding": "embedding",
    "attention": "attention",
    "shared": "shared experts",
    "dense": "dense MLP",
    "gate": "router",
    "head": "lm_head",
    "norm": "norms",
    "other": "other tensors",
}


class TensorLike(Protocol):
    """What a tensor of `weights.source` offers."""

    @property
    def num_bytes(self) -> int: ...
    @property
    def type_name(self) -> str: ...


@dataclass(frozen=True, slots=True)
class PlanHost:
    """The machine: free memory, and read bandwidth where it was measured (0 = not measured)."""

    ram_bytes: int
    cpu_bytes_per_s: float = 0.0
    gpu_bytes: tuple[int, ...] = ()
    gpu_bytes_per_s: float = 0.0
    has_amx: bool = True


@dataclass(slots=True)
class _Line:
    num_bytes: int = 0
    read_bytes: float = 0.0  # by a decode step of one request
    types: dict[str, int] | None = None


def plan_text(
    spec: ModelSpec, tensors: Mapping[str, TensorLike], config: Config, host: PlanHost
) -> str:
    """The page that --plan prints. config: resolved (device, cache_lens, max_batch_size set)."""
    placement = place(
        spec,
        rules_path=config.optimize_config_path,
        device=config.device,
        num_gpus=0 if config.device == "cpu" else len(host.gpu_bytes),
        amx=host.has_amx,
    )
    if config.device != "cpu":
        placement = _as_loaded(placement, config)
    table = _table(placement, spec, tensors)
    lines = [
        (
            f"{spec.name}: {spec.architecture}, {spec.num_layers} layers, "
            f"{spec.num_experts} experts of which {spec.top_k} run per token"
        ),
        f"placement: {placement.source}",
        "",
        f"{'part':<16}{'device':<9}{'types':<28}{'bytes':>12}{'read per token':>16}",
    ]
    for (group, device), line in table.items():
        types = _types(line.types or {})
        lines.append(
            f"{_GROUPS[group]:<16}{device:<9}{types:<28}{_size(line.num_bytes):>12}"
            f"{_size(line.read_bytes):>16}"
        )
    lines += ["", *_memory(table, host), *_bounds(table, spec, config, host)]
    lines += [f"warning: {text}" for text in placement.warnings]
    lines += [f"note: {text}" for text in placement.notes]
    return "\n".join(lines)


def _as_loaded(placement: Placement, config: Config) -> Placement:
    """What the GPU engine makes of it: the routed experts of some layers in RAM, all else in VRAM."""

    def device(placed: Placed) -> str:
        if placed.module.kind != "experts":
            return config.device
        layer = int(placed.module.tensors[0].split(".")[1])
        return config.device if layer in config.vram_layers else "cpu"

    modules = tuple(replace(placed, device=device(placed)) for placed in placement.modules)
    return replace(placement, modules=modules)


_Table = dict[tuple[str, str], _Line]


def _table(placement: Placement, spec: ModelSpec, tensors: Mapping[str, TensorLike]) -> _Table:
    table: _Table = {}
    seen: set[str] = set()
    tied = "output.weight" not in tensors
    for placed in placement.modules:
        group = _group(placed)
        names = [name for name in placed.module.tensors if name in tensors]
        if group == "head" and tied:
            _add_tied(table, placed, tensors["token_embd.weight"])
        for name in names:
            seen.add(name)
            read = _read_share(group, spec)
            _add(table, group, placed.device, tensors[name], read)
    for name in tensors.keys() - seen:
        _add(table, "other", "cpu", tensors[name], 0.0)
    order = list(_GROUPS)
    return dict(sorted(table.items(), key=lambda item: (order.index(item[0][0]), item[0][1])))


def _add(table: _Table, group: str, device: str, tensor: TensorLike, share: float) -> None:
    line = table.setdefault((group, device), _Line(types={}))
    line.num_bytes += tensor.num_bytes
    line.read_bytes += tensor.num_bytes * share
    assert line.types is not None
    line.types[tensor.type_name] = line.types.get(tensor.type_name, 0) + tensor.num_bytes


def _add_tied(table: _Table, placed: Placed, embedding: TensorLike) -> None:
    """A tied lm_head reads the embedding; it takes its own memory only on another device."""
    line = table.setdefault(("head", placed.device), _Line(types={}))
    line.read_bytes += embedding.num_bytes
    line.num_bytes += embedding.num_bytes if placed.device != "cpu" else 0
    line.types = {f"{embedding.type_name} (tied)": embedding.num_bytes}


def _group(placed: Placed) -> str:
    name, kind = placed.module.name, placed.module.kind
    if kind in {"experts", "embedding"}:
        return kind
    if name == "lm_head":
        return "head"
    if kind == "rms_norm":
        return "norm"
    if ".shared_expert" in name:
        return "shared"
    if name.endswith(".gate"):
        return "gate"
    return "attention" if ".self_attn" in name else "dense"


def _read_share(group: str, spec: ModelSpec) -> float:
    """Part of the bytes that one token reads."""
    if group == "experts":
        return spec.top_k / spec.num_experts
    return 1 / spec.vocab_size if group == "embedding" else 1.0


def _memory(table: _Table, host: PlanHost) -> list[str]:
    lines = []
    for device in sorted({device for _, device in table}):
        used = sum(line.num_bytes for (_, d), line in table.items() if d == device)
        free = host.ram_bytes if device == "cpu" else host.gpu_bytes[int(device.partition(":")[2])]
        verdict = "fits" if used <= free else "DOES NOT FIT"
        lines.append(f"{device}: {_size(used)} of weights, {_size(free)} free: {verdict}")
    return lines


def _bounds(table: _Table, spec: ModelSpec, config: Config, host: PlanHost) -> list[str]:
    lines = [""]
    for batch in dict.fromkeys((1, config.max_batch_size)):
        cpu, gpu = _step_bytes(table, spec, batch)
        text = f"a step of {batch} request{'s' * (batch > 1)} reads {_size(cpu)} of RAM"
        text += f" and {_size(gpu)} of GPU memory" if gpu else ""
        if host.cpu_bytes_per_s and (host.gpu_bytes_per_s or not gpu):
            cpu_s = cpu / host.cpu_bytes_per_s
            gpu_s = gpu / host.gpu_bytes_per_s if gpu else 0.0
            limit = "RAM" if cpu_s >= gpu_s else "GPU memory"
            text += (
                f": at most {batch / (cpu_s + gpu_s):.1f} tokens/s in all, limited by {limit} "
                f"bandwidth ({host.cpu_bytes_per_s / 1e9:.0f} GB/s measured)"
            )
        lines.append(text)
    if not host.cpu_bytes_per_s:
        lines.append("no speed bound: the memory bandwidth was not measured")
    return lines


def _step_bytes(table: _Table, spec: ModelSpec, batch: int) -> tuple[float, float]:
    """(RAM, GPU) bytes read by a decode step; experts used by several requests are read once.

    Routing is taken as independent and uniform: a request misses an expert with 1 - K/E.
    """
    cpu = gpu = 0.0
    for (group, device), line in table.items():
        num_bytes = line.read_bytes
        if group == "experts":
            num_bytes = line.num_bytes * (1 - (1 - spec.top_k / spec.num_experts) ** batch)
        elif group == "embedding":
            num_bytes *= batch
        if device == "cpu":
            cpu += num_bytes
        else:
            gpu += num_bytes
    return cpu, gpu


def _types(types: Mapping[str, int]) -> str:
    names = sorted(types, key=lambda name: -types[name])
    return " ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def _size(num_bytes: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.2f} {unit}"
    return f"{num_bytes:.0f} B"
