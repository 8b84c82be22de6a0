"""The memory bound of decode: bytes of weights a step must read, from the model file itself.

Every step reads the dense weights once and each expert that any row chose once. With uniformly
random routing, n rows choose E * (1 - (1 - K / E)^n) of E experts at top_k K; a trained router
repeats itself, reads less, and may exceed this bound a little. KV and activations are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.errors import BenchError
from kt_async.errors import KtError
from kt_async.model.spec import spec_from_gguf
from kt_async.weights.source import open_model


def distinct_experts(num_experts: int, top_k: int, rows: int) -> float:
    """Expected number of experts that `rows` rows choose together."""
    return num_experts * (1 - (1 - top_k / num_experts) ** rows)


def step_bytes(
    tensors: Iterable[tuple[str, int]], num_experts: int, top_k: int, rows: int
) -> float:
    """Bytes of weights read by one step of `rows` rows; tensors: (GGUF name, bytes).

    The embedding table is looked up, not read, unless it is the output matrix as well.
    """
    sizes = dict(tensors)
    if "output.weight" in sizes:
        sizes.pop("token_embd.weight", None)
    experts = sum(size for name, size in sizes.items() if "_exps." in name)
    dense = sum(sizes.values()) - experts
    share = distinct_experts(num_experts, top_k, rows) / num_experts if num_experts else 0.0
    return dense + experts * share


def step_bytes_of_file(path: Path, rows: Sequence[int]) -> dict[int, float]:
    """Rows -> bytes of one step of the model. Raises BenchError when it cannot be read."""
    try:
        files = open_model(path)
        spec = spec_from_gguf(files)
    except KtError as error:
        raise BenchError(str(error)) from None
    tensors = [(name, info.num_bytes) for name, info in files.tensors.items()]
    files.close()
    return {count: step_bytes(tensors, spec.num_experts, spec.top_k, count) for count in rows}


def tokens_per_s(rows: int, num_bytes: float, bandwidth_gb_s: float) -> float:
    """Decode speed of all rows together when nothing but reading the weights takes time."""
    return rows * bandwidth_gb_s * 1e9 / num_bytes
