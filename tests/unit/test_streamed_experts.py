"""The CPU's side of shared prompt experts: its thread, its flag and its core. Needs no GPU."""

from __future__ import annotations

import os
import threading
from typing import Any, cast

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kt_async.engine.cuda.copies import ExpertCopies, HostBuffers  # noqa: E402
from kt_async.engine.cuda.experts import VramExperts  # noqa: E402
from kt_async.engine.cuda.stream import StreamedExperts, around_step  # noqa: E402
from kt_async.engine.expert_split import LayerRates, SplitRates  # noqa: E402
from kt_async.errors import EngineError, NativeError  # noqa: E402
from kt_async.ffi.handoff import ExpertSet  # noqa: E402

TOKENS, HIDDEN, TOP_K, EXPERTS = 4, 8, 2, 4


class FakeSet:
    """Answers every row with ones; notes who asked, from where, and how many workers rest."""

    caller_cpu = min(os.sched_getaffinity(0))

    def __init__(self) -> None:
        self.spared: list[int] = []
        self.cores: list[set[int]] = []
        self.threads: list[str] = []
        self.fails = False

    def spare(self, num_workers: int) -> None:
        self.spared.append(num_workers)

    def run(self, layer: int, x: Any, ids: Any, weights: Any, out: Any, is_prompt: Any) -> None:
        self.cores.append(os.sched_getaffinity(0))
        self.threads.append(threading.current_thread().name)
        if self.fails:
            raise NativeError(1, "no such expert")
        out[:] = np.where((ids >= 0).any(1)[:, None], 1, out)


class FakeEvent:
    def synchronize(self) -> None:
        """There is nothing to wait for."""


class FakeCopies:
    num_layers = 1

    def start(self, layer: int, experts: Any) -> FakeEvent:
        return FakeEvent()


def experts(fake: FakeSet, *, copies: bool = True) -> StreamedExperts:
    host = HostBuffers(
        x=torch.zeros(TOKENS, HIDDEN),
        ids=torch.zeros(TOKENS, TOP_K, dtype=torch.int32),
        weights=torch.zeros(TOKENS, TOP_K),
        out=torch.zeros(TOKENS, HIDDEN),
        gpu_computes=torch.zeros(EXPERTS, dtype=torch.uint8),
        flags=torch.zeros(2, dtype=torch.int32),
    )
    made = StreamedExperts(
        cpu=cast(ExpertSet, fake),
        layer_of={"blk.0.ffn_gate_exps.weight": 0},
        num_experts=EXPERTS,
        host=host,
        vram=VramExperts({}),
    )
    if copies:
        made.copies = cast(ExpertCopies, FakeCopies())
    return made


def start(made: StreamedExperts, streamed: list[bool]) -> None:
    ids = np.array([[0, 1], [2, 3], [1, 2], [-1, -1]], np.int32)
    made._start_cpu(0, ids, np.array(streamed), None, cast(Any, FakeEvent()))


def test_the_cpu_computes_what_is_not_streamed() -> None:
    fake = FakeSet()
    made = experts(fake)
    with made.step(TOKENS):
        start(made, [True, True, False, False])
    assert made.host.out[:, 0].tolist() == [0, 1, 1, 0]
    assert fake.spared == [1, 0]
    assert fake.threads[0].startswith("kt-experts")
    made.close()


def test_nothing_runs_when_everything_is_streamed() -> None:
    fake = FakeSet()
    made = experts(fake)
    with made.step(TOKENS):
        start(made, [True] * EXPERTS)
    assert fake.threads == []
    assert not made.host.flags.any()
    made.close()


def test_threads_stay_on_the_core_without_a_worker_during_a_step_only() -> None:
    fake = FakeSet()
    made, before = experts(fake), os.sched_getaffinity(0)
    with made.step(TOKENS):
        assert os.sched_getaffinity(0) == {fake.caller_cpu}
        start(made, [False] * EXPERTS)
    assert fake.cores == [{fake.caller_cpu}]
    assert os.sched_getaffinity(0) == before
    with pytest.raises(ValueError, match="in the forward"), made.step(TOKENS):
        raise ValueError("in the forward")
    assert os.sched_getaffinity(0) == before
    made.close()


def test_without_copies_the_cpu_has_all_its_cores() -> None:
    fake = FakeSet()
    made, before = experts(fake, copies=False), os.sched_getaffinity(0)
    with around_step(made, TOKENS, is_decode=False):
        assert os.sched_getaffinity(0) == before
        start(made, [False] * EXPERTS)
    assert fake.spared == [0, 0]
    made.close()


def test_generated_tokens_stay_on_the_cpu() -> None:
    fake = FakeSet()
    made, before = experts(fake), os.sched_getaffinity(0)
    made.rates = SplitRates([LayerRates(1e-9, (1,), (1.0,))], (0.0, 0.0), (0.0, 0.0), overlap=True)
    ids = np.array([[0, 1]], np.int32)
    with around_step(made, 1, is_decode=True):
        assert os.sched_getaffinity(0) == before
        assert not made._choose(0, ids).any()
    with around_step(made, 1, is_decode=False):
        assert made._choose(0, ids)[:2].all()
    made.close()


def test_a_failure_of_the_cpu_releases_the_gpu_and_is_raised() -> None:
    fake = FakeSet()
    made = experts(fake)
    fake.fails = True
    with pytest.raises(NativeError, match="no such expert"), made.step(TOKENS):
        start(made, [False] * EXPERTS)
        assert made._running is not None
        made._running.exception()
        assert made.host.flags[0] == 2  # the waiting kernel's way out
    made.close()


def test_a_cpu_that_did_not_answer_is_an_error() -> None:
    made = experts(FakeSet())
    with pytest.raises(EngineError, match=r"did not answer the GPU \(state 3\)"), made.step(TOKENS):
        made.host.flags[1] = 3
    assert not made.host.flags.any()
    made.close()
