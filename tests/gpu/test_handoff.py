"""Handing rows to the CPU inside a graph: every mechanism, time limits, overlap, mixed placement."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from gguf import GGMLQuantizationType, quants  # noqa: E402

from bench.handoff import Layers  # noqa: E402
from kt_async.engine.cuda import cpu_part, stream  # noqa: E402
from kt_async.engine.cuda import probe as cuda_probe  # noqa: E402
from kt_async.engine.cuda.build import (  # noqa: E402
    CudaOptions,
    load_cuda_runner,
)
from kt_async.engine.cuda.copies import HostBuffers  # noqa: E402
from kt_async.engine.cuda.handoff import MECHANISMS, Channel  # noqa: E402
from kt_async.engine.cuda.kernels import kernels_for, launcher  # noqa: E402
from kt_async.engine.cuda.ops import CudaOps  # noqa: E402
from kt_async.engine.cuda.probe import Replay, choose_mechanism, probe  # noqa: E402
from kt_async.engine.cuda.runner import CudaLimits  # noqa: E402
from kt_async.engine.cuda.values import Rows  # noqa: E402
from kt_async.errors import EngineError, NativeError  # noqa: E402
from kt_async.ffi import structs  # noqa: E402
from kt_async.ffi.cuda import Kernels  # noqa: E402
from kt_async.ffi.handoff import ExpertSet  # noqa: E402
from kt_async.ffi.pool import Pool  # noqa: E402
from tests.reference.checkpoints import (  # noqa: E402
    QWEN2,
    QWEN3,
    exact_model,
    hf_logprobs,
    make_checkpoint,
)
from tests.reference.harness import DirectEngine, log_softmax, mean_kl  # noqa: E402

pytestmark = pytest.mark.gpu

HEADS = {"head_dim": 128, "v_head_dim": 128, "rope": replace(QWEN3.rope, dim=128)}
SPEC, SHARED = replace(QWEN3, **HEADS), replace(QWEN2, **HEADS)
SHAPE = (4, 2, 64, 2)  # layers, rows, hidden size, top_k


def engine(path: Path, **options: Any) -> DirectEngine:
    def runner(files: Any, spec: Any, pool: Any, layout: Any, limits: Any) -> Any:
        cuda = CudaLimits(limits.page_size, limits.num_pages, limits.sample_vocab, limits.num_pages)
        chosen = CudaOptions(show_progress=False, **options)
        return load_cuda_runner(files, spec, pool, layout, cuda, chosen)

    return DirectEngine(path, make_runner=partial(runner), max_batch_size=4)


def prompt(length: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, SPEC.vocab_size, length).tolist()


PROMPTS = [prompt(5 + 9 * i, seed=i) for i in range(4)]


@pytest.fixture(scope="module")
def launch() -> Any:
    return launcher(kernels_for({8}, None))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("gpu") / "m.gguf", "Q8_0", SPEC)


@pytest.fixture(scope="module")
def shared_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("gpu") / "s.gguf", "Q8_0", SHARED)


def generate(path: Path, **options: Any) -> list[list[int]]:
    made = engine(path, **options)
    try:
        text = made.generate(PROMPTS, 16)
        assert not options.get("use_graphs", True) or made.runner.stats()["graph_steps"] > 0
    finally:
        made.close()
    return text


def test_every_mechanism_gives_the_same_text(checkpoint: Path) -> None:
    texts = [generate(checkpoint, handoff=name) for name in MECHANISMS]
    assert texts[0] == texts[1] == texts[2]


def test_probe_falls_back(launch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(probe(launch, name) is None for name in MECHANISMS)
    assert choose_mechanism(launch) == "spin"
    broken = {"spin"}
    monkeypatch.setattr(
        cuda_probe, "probe", lambda launch, name: "broken" if name in broken else None
    )
    assert choose_mechanism(launch) == "wait_value"
    broken.add("wait_value")
    assert choose_mechanism(launch) == "host_call"
    broken.add("host_call")
    with pytest.raises(EngineError, match="spin does not work here"):
        choose_mechanism(launch)


def test_probe_sees_a_cpu_that_does_not_answer(
    launch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_probe, "_PROBE_TICKS", 1_000_000)

    def silent(self: Replay, timeout_ns: int, asked_ns: int = 0) -> None:
        self.graph.replay()
        torch.cuda.synchronize()

    monkeypatch.setattr(Replay, "run", silent)
    assert "did not answer" in str(probe(launch, "spin"))


def test_the_gpu_gives_up_on_a_silent_cpu(launch: Any) -> None:
    channel = Channel.open("spin", None, SHAPE, limit_ticks=2_000_000)
    replay = Replay.capture(channel, launch, SHAPE[0], SHAPE[1])
    replay.graph.replay()  # nobody serves it
    torch.cuda.synchronize()
    with pytest.raises(EngineError, match=r"did not answer in time .*\(state 3\)"):
        channel.check()
    channel.native.close()


def test_the_cpu_gives_up_on_a_gpu_that_does_not_ask(launch: Any) -> None:
    channel = Channel.open("spin", None, SHAPE)
    replay = Replay.capture(channel, launch, 2, SHAPE[1])  # two layers of the four announced
    with pytest.raises(NativeError, match="did not ask for the experts of layer 2") as caught:
        replay.run(200_000_000)
    assert caught.value.status == structs.KT_ERR_INTERNAL
    channel.native.close()


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_experts_that_fail_end_the_step(launch: Any, mechanism: str) -> None:
    with Pool(num_threads=1) as pool:
        experts = ExpertSet(pool, max_tokens=2, top_k=2)
        rows, cols = 64, 64
        blocks = quants.quantize(np.zeros((2, rows, cols), np.float32), GGMLQuantizationType.Q8_0)
        tensor = structs.tensor_at(8, (2, rows, cols), blocks.nbytes, blocks.ctypes.data)
        experts.add_layer(tensor, tensor, tensor)
        experts.finish()
        channel = Channel.open(mechanism, experts, (1, 2, cols, 2))
        replay = Replay.capture(channel, launch, 1, 2)
        replay.run(1_000_000_000)
        channel.check()
        replay.kept[0].fill_(7)  # no such expert
        torch.cuda.synchronize()  # written on another stream than the replay's
        with pytest.raises(NativeError, match="7"):
            replay.run(1_000_000_000)
        with pytest.raises(EngineError, match=r"failed in a decode step \(state 2\)"):
            channel.check()
        channel.native.close()
        experts.close()


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_rows_and_answers_arrive_whole(rows: int) -> None:
    """Many replays of a graph, in which a row that came late would be another layer's."""
    layers = Layers(kernels_for({8}, None), 6, rows, 2048, 8, 2)
    rng, blocks = np.random.default_rng(1), []

    def tensor(*shape: int) -> structs.Tensor:
        values = (0.05 * rng.standard_normal(shape)).astype(np.float32)
        blocks.append(quants.quantize(values, GGMLQuantizationType.Q8_0))
        return structs.tensor_at(8, shape, blocks[-1].nbytes, blocks[-1].ctypes.data)

    with Pool(num_threads=4) as pool:
        experts = ExpertSet(pool, max_tokens=rows, top_k=2)
        for _ in range(layers.num_layers):
            experts.add_layer(tensor(8, 32, 2048), tensor(8, 32, 2048), tensor(8, 2048, 32))
        experts.finish()
        asked = 0

        def step_by_step(ops: Any, x: Rows, residual: Any, ids: Any, weights: Any, _: Any) -> Rows:
            nonlocal asked
            out = np.zeros((rows, 2048), np.float32)
            given = [t.cpu().numpy() for t in (x.f32, ids, weights)]
            experts.run(asked % layers.num_layers, *given, out)
            asked += 1
            return Rows(residual + torch.from_numpy(out).cuda(), 2048)

        channel = Channel.open("spin", experts, (layers.num_layers, rows, 2048, 2))
        x = torch.zeros((rows, 2048), device="cuda")
        replay = layers.capture(channel, x, lambda _: None)
        inputs = [
            torch.randn((rows, 2048), generator=torch.Generator().manual_seed(i)).cuda()
            for i in range(3)
        ]
        ops = layers.ops()
        ops.experts_backend = step_by_step
        expected = [layers.forward(ops, given, lambda _: None).f32 for given in inputs]
        for i in range(100):
            x.copy_(inputs[i % 3])
            torch.cuda.synchronize()  # the replay has a stream of its own
            replay.run(10_000_000_000)
            assert torch.equal(replay.out, expected[i % 3])
        channel.check()
        channel.native.close()
        experts.close()


def test_mixed_placement_gives_the_logits_of_one_side(checkpoint: Path) -> None:
    """Expert layers in VRAM and on the CPU differ in rounding only: near ties may fall otherwise."""

    def logits(**options: Any) -> Any:
        made = engine(checkpoint, **options)
        try:
            return log_softmax(made.prompt_logits(prompt(60)))
        finally:
            made.close()

    whole = logits(experts_in_vram=True)
    for layers in ((0,), (1, 2), (0, 1, 2)):
        assert mean_kl(whole, logits(vram_layers=layers)) <= 5e-3
    text = generate(checkpoint, experts_in_vram=True)
    assert generate(checkpoint, vram_layers=(0, 1, 2)) == text


@pytest.mark.parametrize("layers", [(), (1,), (0, 1, 2)])
def test_shared_experts_kl(shared_checkpoint: Path, layers: tuple[int, ...]) -> None:
    made = engine(shared_checkpoint, vram_layers=layers)
    try:
        ours = log_softmax(made.prompt_logits(prompt(200)))
    finally:
        made.close()
    kl = mean_kl(hf_logprobs(exact_model(shared_checkpoint), prompt(200)), ours)
    print(f"KL with shared experts, VRAM layers {layers}: {kl:.2e}")
    assert kl <= 5e-3


def test_shared_experts_run_while_the_cpu_computes(
    shared_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []
    real = Kernels.launch

    def record(self: Kernels, name: str, *args: Any, **kw: Any) -> None:
        launched.append(name)
        real(self, name, *args, **kw)

    monkeypatch.setattr(Kernels, "launch", record)
    ours = generate(shared_checkpoint)
    between: Sequence[str] = ()
    at = len(launched) - 1 - launched[::-1].index("router")  # which asks the CPU
    between = launched[at + 1 : launched.index("handoff_wait_norm", at)]
    assert any(name.startswith("multiply") for name in between), between
    assert [t[0] for t in ours] == [t[0] for t in generate(shared_checkpoint, use_graphs=False)]


@pytest.mark.parametrize("prompt_experts", ["cpu", "auto"])
def test_a_launch_that_waits_for_an_idle_gpu_ends(
    checkpoint: Path, prompt_experts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading a kernel may do so behind the one that waits for the CPU, and keep all locks."""
    driver = ctypes.PyDLL("libcuda.so.1")  # keeps the GIL
    real, waits = stream.sum_rows, []

    def blocked(*args: Any) -> Any:
        begin = time.monotonic()
        assert driver.cuCtxSynchronize() == 0
        waits.append(time.monotonic() - begin)
        return real(*args)

    made = engine(checkpoint, prompt_experts=prompt_experts)
    try:
        expected = made.generate(PROMPTS, 16)
        monkeypatch.setattr(stream, "sum_rows", blocked)
        assert made.generate(PROMPTS, 16) == expected
    finally:
        made.close()
    assert len(waits) >= SPEC.num_layers
    assert max(waits) < 5


FAILED = structs.KT_EXPERT_JOB_FAILED


@pytest.mark.parametrize(
    ("done", "message"),
    [(1, None), (1 | FAILED, "failed in a prompt step"), (0, "lower --chunk_size"), (9, "lower")],
)
def test_what_the_waiting_kernel_finds(
    launch: Any, done: int, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_part, "_LIMIT_TICKS", 2_000_000)
    host = HostBuffers.allocate(4, 64, 2, 4)
    part = cpu_part.CpuPart(None, host)  # type: ignore[arg-type]
    ops: Any = SimpleNamespace(launch=lambda name, grid, args, block: launch(name, grid, args))
    x = torch.ones((4, 64), device="cuda")
    ids = torch.full((4, 2), 3, dtype=torch.int32, device="cuda")
    part.fetch(ops, x, ids, torch.ones((4, 2), device="cuda"))
    host.flags.numpy().view(np.uint32)[1, 0] = done
    part.wait_in_stream(ops)
    torch.cuda.synchronize()
    assert host.flags[0, 0] == 1  # number of the first layer: it was asked
    assert host.x.eq(1).all()
    assert host.ids.eq(3).all()
    if message is None:
        part.check()
        return
    with pytest.raises(EngineError, match=message):
        part.check()
    part.check()


def test_rows_that_never_come_end_the_step(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = engine(checkpoint, prompt_experts="cpu")
    real = CudaOps.launch

    def silent(self: CudaOps, name: str, *args: Any) -> None:
        if name != "raise_flag":
            real(self, name, *args)

    monkeypatch.setattr(CudaOps, "launch", silent)
    monkeypatch.setattr(cpu_part, "_ROWS_TIMEOUT_NS", 50_000_000)
    begin = time.monotonic()
    try:
        with pytest.raises(NativeError, match="rows of layer 0 within 50 ms") as caught:
            made.generate(PROMPTS[:1], 2)
        assert caught.value.status == structs.KT_ERR_INTERNAL
        torch.cuda.synchronize()  # the kernel that waited has ended as well
    finally:
        made.close()
    assert time.monotonic() - begin < 10
