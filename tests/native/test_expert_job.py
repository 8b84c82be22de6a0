"""Runs of an expert set that end without the thread that started them. Needs no GPU."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from kt_async.errors import NativeError
from kt_async.ffi import structs
from kt_async.ffi.handoff import ExpertSet
from kt_async.ffi.pool import Pool
from tests.native.test_expert_set import (
    EXPERTS,
    MAX_TOKENS,
    SHAPES,
    TOP_K,
    H,
    inputs,
    layer_bytes,
)

FAILED = structs.KT_EXPERT_JOB_FAILED
WAIT_S = 20


@pytest.fixture(params=[(1, 1), (2, 1), (3, 1), (2, 2), (4, 2)], ids=str)
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    threads, nodes = request.param
    with Pool(num_threads=threads, pin=False, fake_nodes=nodes) as made:
        yield made


@pytest.fixture
def experts(pool: Pool) -> Iterator[ExpertSet]:
    made = make_set(pool)
    yield made
    made.close()


def make_set(pool: Pool) -> ExpertSet:
    made = ExpertSet(pool, MAX_TOKENS, TOP_K)
    raws = layer_bytes()
    made.add_layer(
        *(
            structs.tensor_at(kind, (EXPERTS, rows, cols), raw.nbytes, raw.ctypes.data)
            for (kind, rows, cols), raw in zip(SHAPES, raws, strict=True)
        )
    )
    made.finish()
    return made


class Work:
    """Rows, flags and a job over them; its number is 7."""

    def __init__(self, tokens: int = MAX_TOKENS, **changes: Any) -> None:
        self.x, self.ids, self.weights = inputs(tokens)
        self.out = np.full((tokens, H), np.nan, np.float32)
        self.request, self.done = np.zeros(1, np.uint32), np.zeros(1, np.uint32)
        self.times = np.zeros(2, np.int64)
        fields: dict[str, Any] = {
            "num_tokens": tokens,
            "number": 7,
            "x": self.x.ctypes.data,
            "ids": self.ids.ctypes.data,
            "weights": self.weights.ctypes.data,
            "out": self.out.ctypes.data,
            "request": self.request.ctypes.data,
            "done": self.done.ctypes.data,
            "times_ns": self.times.ctypes.data,
            "timeout_ns": WAIT_S * 10**9,
        }
        self.job = structs.sized(structs.ExpertJob, **{**fields, **changes})


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(1e-3)


@pytest.mark.parametrize("spared", [0, 1, 2])
@pytest.mark.parametrize("tokens", [1, MAX_TOKENS])
def test_gives_what_a_run_gives(experts: ExpertSet, spared: int, tokens: int) -> None:
    work = Work(tokens, num_spared=spared)
    expected = np.empty_like(work.out)
    experts.run(0, work.x, work.ids, work.weights, expected)
    rows, work.x[:] = work.x.copy(), np.nan
    for number in (7, 8):
        work.job.number = number
        work.out[:] = np.nan
        experts.start(work.job)
        time.sleep(2e-3)
        assert work.done[0] != number  # it waits for its rows
        work.x[:] = rows
        before, work.request[0] = time.monotonic_ns(), number
        until(lambda: work.done[0] == work.job.number)
        np.testing.assert_array_equal(work.out, expected)  # not only after the join
        assert experts.join()
        assert before - 10**6 <= work.times[0] <= work.times[1] <= time.monotonic_ns()
        work.x[:] = np.nan
    experts.run(0, rows, work.ids, work.weights, work.out)
    np.testing.assert_array_equal(work.out, expected)


def test_ends_while_this_thread_keeps_the_interpreter(experts: ExpertSet) -> None:
    """As a launch behind the waiting kernel may: no other thread of ours runs until it is over."""
    keeps_the_lock = ctypes.PyDLL(None)
    keeps_the_lock.usleep.argtypes = (ctypes.c_uint,)
    work = Work()
    experts.start(work.job)
    work.request[0] = 7
    answered = False
    for _ in range(200):
        keeps_the_lock.usleep(10_000)
        answered = bool(work.done[0])
        if answered:
            break
    assert answered
    assert work.done[0] == 7
    assert experts.join()


def test_without_a_request_it_begins_at_once(experts: ExpertSet) -> None:
    work = Work(request=None)
    experts.start(work.job)
    until(lambda: work.done[0] == 7)
    experts.join()


def test_a_failure_reaches_the_flag_before_the_join(experts: ExpertSet) -> None:
    work = Work(timeout_ns=20_000_000)
    experts.start(work.job)
    until(lambda: work.done[0] == 7 | FAILED)
    with pytest.raises(NativeError, match="did not bring the rows of layer 0 within 20 ms") as got:
        experts.join()
    assert got.value.status == structs.KT_ERR_INTERNAL
    assert not experts.join()
    again = Work(request=None)
    experts.start(again.job)
    assert experts.join()
    assert again.done[0] == 7


def test_one_job_at_a_time(experts: ExpertSet) -> None:
    assert not experts.join()
    work = Work()
    experts.start(work.job)
    for call in (
        lambda: experts.start(work.job),
        lambda: experts.run(0, work.x, work.ids, work.weights, work.out),
    ):
        with pytest.raises(NativeError, match="not joined") as caught:
            call()
        assert caught.value.status == structs.KT_ERR_STATE
    work.request[0] = 7
    assert experts.join()


def test_an_old_request_is_nobodys(experts: ExpertSet) -> None:
    work = Work()
    work.request[0] = 6
    experts.start(work.job)
    time.sleep(5e-3)
    assert not work.done[0]
    work.request[0] = 7
    assert experts.join()


def test_the_pool_is_free_before_the_join(pool: Pool, experts: ExpertSet) -> None:
    other = make_set(pool)
    work = Work(request=None)
    experts.start(work.job)
    other.run(0, work.x, work.ids, work.weights, np.empty_like(work.out))
    experts.join()
    other.close()


def test_destroying_ends_the_wait(pool: Pool) -> None:
    made, work = make_set(pool), Work()
    made.start(work.job)
    begin = time.monotonic()
    made.close()
    assert time.monotonic() - begin < WAIT_S / 2
    assert work.done[0] == 7 | FAILED


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 1}, "layer is 1"),
        ({"num_tokens": MAX_TOKENS + 1}, f"allowed is 0 .. {MAX_TOKENS}"),
        ({"num_spared": 3}, r"num_spared is 3, allowed is 0 \.\. 2"),
        ({"num_spared": -1}, "num_spared is -1"),
        ({"number": 0}, "number is 0"),
        ({"number": FAILED}, f"number is {FAILED}"),
        ({"timeout_ns": -1}, "timeout_ns is -1"),
        ({"x": None}, "x is NULL"),
        ({"ids": None}, "ids is NULL"),
        ({"weights": None}, "weights is NULL"),
        ({"out": None}, "out is NULL"),
        ({"done": None}, "done is NULL"),
    ],
    ids=str,
)
def test_what_is_refused_never_begins(
    experts: ExpertSet, changes: dict[str, Any], message: str
) -> None:
    work = Work(**changes)
    with pytest.raises(NativeError, match=message):
        experts.start(work.job)
    assert not experts.join()
    assert not work.done[0]


def test_unknown_experts_are_refused(experts: ExpertSet) -> None:
    work = Work()
    work.ids[2, 1] = EXPERTS
    with pytest.raises(NativeError, match="outside 0 .. 5"):
        experts.start(work.job)
    assert not work.done[0]
