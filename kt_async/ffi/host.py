"""The machine as the native library sees it: instruction sets, cores, nodes, memory."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from kt_async.ffi import structs
from kt_async.ffi.lib import check, load

ISA_NAMES = ("scalar", "avx2", "avx512", "avx512vnni", "amx")


@dataclass(frozen=True, slots=True)
class HostInfo:
    """CPU, memory and limits of this process. Source: kt_host_query."""

    isas: tuple[str, ...]  # usable instruction sets, weakest first
    num_cpus: int  # logical CPUs in the affinity mask
    num_cores: int  # physical cores among them
    num_nodes: int  # NUMA nodes among them
    cpu_quota: float | None  # CPUs the cgroup grants, None = no limit
    l1d_bytes: int
    l2_bytes: int
    l3_bytes: int
    total_bytes: int  # RAM
    available_bytes: int  # what may still be used, cgroup limit included
    cpu_name: str

    @property
    def best_isa(self) -> str:
        """The instruction set that `auto` picks."""
        return self.isas[-1]


def query_host() -> HostInfo:
    """Read the machine's description; a few milliseconds, for start-up."""
    info = structs.sized(structs.HostInfo)
    check(load().kt_host_query(ctypes.byref(info)))
    return HostInfo(
        isas=tuple(name for bit, name in enumerate(ISA_NAMES) if info.isa_mask >> bit & 1),
        num_cpus=info.num_cpus,
        num_cores=info.num_cores,
        num_nodes=info.num_nodes,
        cpu_quota=None if info.quota_millicpus < 0 else info.quota_millicpus / 1000,
        l1d_bytes=info.l1d_bytes,
        l2_bytes=info.l2_bytes,
        l3_bytes=info.l3_bytes,
        total_bytes=info.total_bytes,
        available_bytes=info.available_bytes,
        cpu_name=info.cpu_name.decode(errors="replace"),
    )


def isa_number(name: str) -> int:
    """KT_ISA_x of a name in ISA_NAMES, or of "auto"."""
    return structs.KT_ISA_AUTO if name == "auto" else ISA_NAMES.index(name)
