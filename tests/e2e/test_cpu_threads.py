"""Threads of a real server: as many as asked for, all asleep while nobody asks anything."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from bench.process import cpu_seconds, peak_rss_bytes
from kt_async.demo import PACKAGED
from kt_async.ffi.host import query_host
from tests.e2e.conftest import Server

pytestmark = pytest.mark.e2e


def ask(server: Server) -> str:
    body = {"model": "demo", "prompt": "Hello", "max_tokens": 20, "temperature": 0}
    status, answer, _ = server.post("/v1/completions", body)
    assert status == 200, answer
    return str(answer["choices"][0]["text"])


def test_cpu_infer_sets_the_number_of_threads(make_server: Callable[..., Server]) -> None:
    """The text does not depend on it."""
    if query_host().num_cores < 2:
        pytest.skip("needs two cores")
    texts = []
    for count, words in ((1, "1 thread on 1 node"), (2, "2 threads on ")):
        running = make_server("--device", "cpu", "--cpu_infer", str(count))
        assert words in running.log.read_text()
        texts.append(ask(running))
    assert texts[0] == texts[1]


def test_an_idle_server_sleeps(server: Server) -> None:
    """Also after work: workers stop spinning, the engine waits without polling."""
    ask(server)
    shares = []
    for _ in range(10):  # a quiet half second; a busy machine's timers may take more
        before, begin = cpu_seconds(server.process.pid), time.monotonic()
        time.sleep(0.5)
        shares.append((cpu_seconds(server.process.pid) - before) / (time.monotonic() - begin))
        if shares[-1] <= 0.02:  # the clock has ticks of 10 ms: one of them is allowed
            return
    pytest.fail(f"share of a core used while idle: {shares}")


def test_loading_keeps_within_the_file_and_a_margin(server: Server) -> None:
    peak = peak_rss_bytes(server.process.pid)
    assert peak is not None
    assert peak <= 1.15 * PACKAGED.stat().st_size + 700e6
