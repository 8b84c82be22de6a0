"""The CPU's side of shared prompt experts: its jobs, its failures and its core. Needs no GPU."""

from __future__ import annotations

import ctypes
import os
import weakref
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kt_async.engine.cuda.copies import ExpertCopies, HostBuffers  # noqa: E402
from kt_async.engine.cuda.cpu_part import CpuPart  # noqa: E402
from kt_async.engine.cuda.experts import VramExperts  # noqa: E402
from kt_async.engine.cuda.ops import CudaOps  # noqa: E402
from kt_async.engine.cuda.stream import StreamedExperts, around_step  # noqa: E402
from kt_async.engine.cuda.values import Rows  # noqa: E402
from kt_async.engine.expert_split import LayerRates, SplitRates  # noqa: E402
from kt_async.errors import EngineError, NativeError  # noqa: E402
from kt_async.ffi import structs  # noqa: E402
from kt_async.ffi.handoff import ExpertSet  # noqa: E402

TOKENS, HIDDEN, TOP_K, EXPERTS = 4, 8, 2, 4


class FakeSet:
    """Answers every row with ones at the join; notes what it was asked, and from which cores."""

    caller_cpu = min(os.sched_getaffinity(0))

    def __init__(self) -> None:
        self.jobs: list[structs.ExpertJob] = []
        self.fails = False
        self.out: Any = None
        self._waiting: structs.ExpertJob | None = None

    def start(self, job: structs.ExpertJob) -> None:
        self.jobs.append(job)
        self._waiting = job

    def join(self) -> bool:
        job, self._waiting = self._waiting, None
        if job is None:
            return False
        if self.fails:
            raise NativeError(structs.KT_ERR_INTERNAL, "no such expert")
        count = job.num_tokens * TOP_K
        ids = np.ctypeslib.as_array((ctypes.c_int32 * count).from_address(job.ids))
        self.out[:] = np.where((ids.reshape(-1, TOP_K) >= 0).any(1)[:, None], 1, self.out)
        return True


class FakeCopies:
    num_layers = 1

    def start(self, layer: int, experts: Any) -> None:
        """There is nothing to wait for."""


def experts(fake: FakeSet, *, copies: bool = True) -> StreamedExperts:
    host = HostBuffers(
        x=torch.zeros(TOKENS, HIDDEN),
        ids=torch.zeros(TOKENS, TOP_K, dtype=torch.int32),
        weights=torch.zeros(TOKENS, TOP_K),
        out=torch.zeros(TOKENS, HIDDEN),
        gpu_computes=torch.zeros(EXPERTS, dtype=torch.uint8),
        flags=torch.zeros(3, 16, dtype=torch.int32),
    )
    fake.out = host.out.numpy()
    made = StreamedExperts(
        cpu=CpuPart(cast(ExpertSet, fake), host),
        layer_of={"blk.0.ffn_gate_exps.weight": 0},
        num_experts=EXPERTS,
        vram=VramExperts({}),
    )
    if copies:
        made.copies = cast(ExpertCopies, FakeCopies())
    return made


def start(made: StreamedExperts, streamed: list[bool]) -> None:
    ids = np.array([[0, 1], [2, 3], [1, 2], [-1, -1]], np.int32)
    made._start_cpu(0, ids, np.array(streamed))


def test_the_cpu_computes_what_is_not_streamed() -> None:
    fake = FakeSet()
    made = experts(fake)
    held, real = [], fake.join
    fake.join = lambda: (held.append(made.cpu.is_running), real())[1]  # type: ignore[method-assign]
    with made.step(TOKENS):
        start(made, [True, True, False, False])
        assert made.cpu.is_running
    assert held[0]  # the workers read ids of ours until they have ended
    assert not made.cpu.is_running
    assert made.cpu.host.out[:, 0].tolist() == [0, 1, 1, 0]
    (job,) = fake.jobs
    assert (job.layer, job.num_tokens, job.num_spared) == (0, TOKENS, 1)
    assert job.x == made.cpu.host.x.data_ptr()
    assert job.request < job.done


def test_what_the_cpu_reads_is_kept_until_it_has_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeSet()
    part = experts(fake).cpu
    ids = np.array([[0, 1], [2, 3]], np.int32)
    lent, alive = weakref.ref(ids), []
    monkeypatch.setattr(fake, "join", lambda: alive.append(lent() is not None))
    part.start(0, ids, None, num_spared=0)
    del ids
    part.join()
    assert alive == [True]
    assert lent() is None


def test_nothing_runs_when_everything_is_streamed() -> None:
    fake = FakeSet()
    made = experts(fake)
    with made.step(TOKENS):
        start(made, [True] * EXPERTS)
    assert fake.jobs == []


def test_this_thread_stays_on_the_core_without_a_worker_during_a_step_only() -> None:
    fake = FakeSet()
    made, before = experts(fake), os.sched_getaffinity(0)
    with made.step(TOKENS):
        assert os.sched_getaffinity(0) == {fake.caller_cpu}
        start(made, [False] * EXPERTS)
    assert os.sched_getaffinity(0) == before
    with pytest.raises(ValueError, match="in the forward"), made.step(TOKENS):
        start(made, [False] * EXPERTS)
        raise ValueError("in the forward")
    assert os.sched_getaffinity(0) == before
    assert not made.cpu.is_running  # else the pool would be refused to the next step


def test_without_copies_the_cpu_has_all_its_cores() -> None:
    fake = FakeSet()
    made, before = experts(fake, copies=False), os.sched_getaffinity(0)
    with around_step(made, TOKENS, is_decode=False):
        assert os.sched_getaffinity(0) == before
        start(made, [False] * EXPERTS)
    assert [job.num_spared for job in fake.jobs] == [0]


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


def test_copies_for_the_next_layer_begin_even_where_a_layer_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Layers of two kinds: the first leaves all to the CPU, the second copies everything."""
    made = experts(FakeSet())
    made.layer_of = {f"blk.{layer}.ffn_gate_exps.weight": layer for layer in range(2)}
    kinds = [LayerRates(copy_s, (1,), (1.0,)) for copy_s in (1.0, 2.0)]
    made.rates = SplitRates(kinds, (0.0, 0.0), (0.0, 0.0), overlap=True)
    monkeypatch.setattr(SplitRates, "streams_all", lambda _self, layer, *_: layer == 1)
    monkeypatch.setattr(SplitRates, "ahead", lambda *_: 0)
    monkeypatch.setattr(SplitRates, "choose", lambda *_: np.zeros(EXPERTS, np.bool_))
    monkeypatch.setattr(CpuPart, "fetch", lambda *_: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(CpuPart, "wait_in_stream", lambda *_: None)
    for name in ("sort_rows", "sum_rows"):
        monkeypatch.setattr(f"kt_async.engine.cuda.stream.{name}", lambda *_: None)
    x, ids = torch.zeros(TOKENS, HIDDEN), made.cpu.host.ids
    with made.step(TOKENS):
        made._share(cast(CudaOps, None), Rows(x, HIDDEN), x, ids, made.cpu.host.weights, 0)
        assert made._streams_all(1)
        assert 1 in made._copied


def test_a_failure_of_the_cpu_is_raised() -> None:
    fake = FakeSet()
    made = experts(fake)
    fake.fails = True
    with pytest.raises(NativeError, match="no such expert"), made.step(TOKENS):
        start(made, [False] * EXPERTS)
    fake.fails = False
    with made.step(TOKENS):
        start(made, [False] * EXPERTS)


@pytest.mark.parametrize(
    ("state", "message"), [(2, r"failed in a prompt step \(state 2\)"), (3, "lower --chunk_size")]
)
def test_what_the_gpu_did_not_get_is_an_error(state: int, message: str) -> None:
    made = experts(FakeSet())
    with pytest.raises(EngineError, match=message), made.step(TOKENS):
        made.cpu.host.flags[2, 0] = state
    with made.step(TOKENS):
        pass


def test_numbers_of_layers_are_never_zero_nor_marked_as_failed() -> None:
    fake = FakeSet()
    made = experts(fake)
    made.cpu._number = structs.KT_EXPERT_JOB_FAILED - 2
    for _ in range(3):
        made.cpu.run(0, np.zeros((TOKENS, TOP_K), np.int32), None, num_spared=0)
    most = structs.KT_EXPERT_JOB_FAILED - 1
    assert [job.number for job in fake.jobs] == [most, 1, 2]
    assert not any(job.request for job in fake.jobs)
