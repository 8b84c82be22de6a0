"""kt_host_query against what /proc and /sys say."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from kt_async.errors import NativeError
from kt_async.ffi import structs
from kt_async.ffi.host import ISA_NAMES, query_host
from kt_async.ffi.lib import check, load


def _cpu_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split(":", 1)[1].split())
    return set()


def test_counts_match_the_affinity_mask() -> None:
    host = query_host()
    assert host.num_cpus == len(os.sched_getaffinity(0))
    assert 1 <= host.num_cores <= host.num_cpus
    assert 1 <= host.num_nodes <= host.num_cores


def test_affinity_is_honoured() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        host = query_host()
    finally:
        os.sched_setaffinity(0, before)
    assert (host.num_cpus, host.num_cores, host.num_nodes) == (1, 1, 1)


def test_memory_is_within_the_machine() -> None:
    host = query_host()
    assert 0 < host.available_bytes <= host.total_bytes
    assert host.total_bytes == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_isas_agree_with_the_kernels_flags() -> None:
    flags = _cpu_flags()
    host = query_host()
    assert host.isas[0] == "scalar"
    assert host.isas == tuple(name for name in ISA_NAMES if name in host.isas)
    if not flags:
        pytest.skip("/proc/cpuinfo has no flags")
    assert ("avx2" in host.isas) == ({"avx2", "fma", "f16c"} <= flags)
    assert ("avx512" in host.isas) == ({"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags)
    assert ("amx" in host.isas) == ({"amx_tile", "amx_int8", "amx_bf16"} <= flags)


def test_wrong_struct_size_is_refused() -> None:
    info = structs.HostInfo()
    with pytest.raises(NativeError, match="struct_size is 0") as error:
        check(load().kt_host_query(ctypes.byref(info)))
    assert error.value.status == structs.KT_ERR_ABI
