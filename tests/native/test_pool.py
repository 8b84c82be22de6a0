"""The worker pool: creation, refusals, bandwidth, sleep when idle, thread clean-up."""

from __future__ import annotations

import ctypes
import os
import re
import threading
import time
from pathlib import Path

import pytest

from kt_async.errors import NativeError
from kt_async.ffi import structs
from kt_async.ffi.host import ISA_NAMES, query_host
from kt_async.ffi.lib import check, load
from kt_async.ffi.pool import Pool


def _num_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_default_is_one_thread_per_core() -> None:
    host = query_host()
    expected = host.num_cores
    if host.cpu_quota is not None:
        expected = max(1, min(expected, int(host.cpu_quota)))
    with Pool() as pool:
        assert pool.describe().startswith(f"{expected} thread")
        assert host.best_isa in pool.describe()


def test_the_callers_core_has_no_worker() -> None:
    with Pool() as pool:
        core = pool.caller_cpu()
        assert core in os.sched_getaffinity(0)
        tasks = [int(task.name) for task in Path("/proc/self/task").iterdir()]
        if len(os.sched_getaffinity(0)) > 1:
            assert {core} not in [os.sched_getaffinity(task) for task in tasks]
    with Pool(pin=False) as pool:
        assert pool.caller_cpu() == -1


@pytest.mark.parametrize("name", query_host().isas)
def test_isa_can_be_forced(name: str) -> None:
    with Pool(1, isa=ISA_NAMES.index(name)) as pool:
        assert f", {name}," in pool.describe()


def test_unknown_isa_is_refused() -> None:
    with pytest.raises(NativeError, match="isa 17 is not one of"):
        Pool(1, isa=17)


def test_missing_isa_is_unsupported() -> None:
    missing = [i for i, name in enumerate(ISA_NAMES) if name not in query_host().isas]
    if not missing:
        pytest.skip("this machine has every instruction set")
    with pytest.raises(NativeError, match="not available here") as error:
        Pool(1, isa=missing[0])
    assert error.value.status == structs.KT_ERR_UNSUPPORTED


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_threads", -1), ("num_threads", 5000), ("spin_us", -2), ("pin", 2), ("fake_nodes", -1)],
)
def test_bad_configuration_names_the_field(field: str, value: int) -> None:
    config = structs.sized(structs.PoolConfig, num_threads=1, isa=-1, spin_us=-1)
    setattr(config, field, value)
    with pytest.raises(NativeError, match=f"kt_pool_config.{field} is {value}"):
        check(load().kt_pool_create(ctypes.byref(config), ctypes.byref(ctypes.c_void_p())))


@pytest.mark.parametrize(("threads", "nodes"), [(1, 1), (2, 2), (5, 2), (3, 8)])
def test_fake_nodes_share_the_workers(threads: int, nodes: int) -> None:
    with Pool(threads, fake_nodes=nodes) as pool:
        assert f"on {min(threads, nodes)} node" in pool.describe()
        assert pool.read_bandwidth(1 << 22, passes=2) > 0


def test_describe_truncates() -> None:
    with Pool(2) as pool:
        text = ctypes.create_string_buffer(8)
        check(load().kt_pool_describe(pool.handle, text, len(text)))
        assert text.value.decode() == pool.describe()[:7]


def test_small_read_buffer_is_refused() -> None:
    with Pool(2) as pool, pytest.raises(NativeError, match="num_bytes is 100"):
        pool.read_bandwidth(100)


def test_idle_pool_uses_no_cpu() -> None:
    with Pool(2) as pool:
        pool.read_bandwidth(1 << 22, passes=1)
        time.sleep(0.05)  # spinning ends well within
        before = time.process_time()
        time.sleep(0.4)
        assert time.process_time() - before < 0.02


def test_destroy_joins_the_threads() -> None:
    before = _num_threads()
    for _ in range(20):
        with Pool(4) as pool:
            assert _num_threads() == before + 3
            pool.read_bandwidth(1 << 20, passes=1)
    assert _num_threads() == before
    check(load().kt_pool_destroy(None))


def test_two_callers_take_turns() -> None:
    with Pool(3) as pool:
        rates: list[float] = []

        def call() -> None:
            rates.extend(pool.read_bandwidth(1 << 20, passes=20) for _ in range(5))

        threads = [threading.Thread(target=call) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(rates) == 15
        assert all(rate > 0 for rate in rates)


def test_a_caller_on_a_workers_core_moves_away() -> None:
    """A pinned worker cannot; on one core both wait for each other at every barrier."""
    libc = ctypes.CDLL(None)
    everywhere = os.sched_getaffinity(0)
    with Pool(2) as pool:
        own = pool.caller_cpu()
        others = {int(cpu) for cpu in re.findall(r"any (\d+)", pool.describe())}
        if own < 0 or not others or not others | {own} <= everywhere:
            pytest.skip("needs two cores to pin to")
        stayed = 0
        for _ in range(20):
            os.sched_setaffinity(0, others)
            os.sched_setaffinity(0, everywhere)  # still there, and free to go
            pool.read_bandwidth(1 << 16, passes=1)
            stayed += libc.sched_getcpu() in others
            assert os.sched_getaffinity(0) == everywhere
    assert stayed <= 5  # the system may put it back at any moment; without the move about 15
