"""Which hand-off mechanism works on this machine: tried at start-up, the fastest first."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from kt_async.engine.cuda.handoff import MECHANISMS, Channel, Launch
from kt_async.errors import EngineError, KtError
from kt_async.ffi import structs

log = logging.getLogger(__name__)

_PROBE_LAYERS = 2
_PROBE_TICKS = 1_000_000_000  # half a second: a probe that waits longer has failed
_PROBE_NS = 500_000_000


def choose_mechanism(launch: Launch, only: str = "") -> str:
    """The first mechanism that works here. only: try just this one (tests, benches).

    Raises EngineError naming what failed when none works.
    """
    problems: list[str] = []
    for name in (only,) if only else MECHANISMS:
        problem = probe(launch, name)
        if problem is None:
            log.log(
                logging.INFO if not problems else logging.WARNING,
                "hand-off to the CPU experts: %s%s",
                name,
                "".join(f"; {text}" for text in problems),
            )
            return name
        problems.append(f"{name} does not work here ({problem})")
    raise EngineError("no hand-off to the CPU experts works: " + "; ".join(problems))


def probe(launch: Launch, mechanism: str) -> str | None:
    """Replay a small graph that hands rows over; why it does not work, or None."""
    channel: Channel | None = None
    try:
        channel = Channel.open(mechanism, None, (_PROBE_LAYERS, 1, 64, 2), _PROBE_TICKS)
        return _try(channel, launch)
    except (KtError, RuntimeError) as error:
        return str(error)
    finally:
        if channel is not None:
            channel.native.close()


def _try(channel: Channel, launch: Launch) -> str | None:
    replay = Replay.capture(channel, launch, _PROBE_LAYERS, 1)
    channel.buffers.out.fill_(2.0)
    for round_ in range(3):
        replay.x.fill_(round_ + 1.0)
        torch.cuda.synchronize()
        replay.run(_PROBE_NS)
        channel.check()
        # Each layer adds the answer to what it was given: x + layers * 2.
        expected = round_ + 1.0 + 2.0 * _PROBE_LAYERS
        arrived = float(channel.buffers.x[0, 0])
        if float(replay.out[0, 0]) != expected or arrived != expected - 2.0:
            return "wrong numbers arrived"
    return None


@dataclass(slots=True)
class Replay:
    """A captured chain of layers that hand over: here nothing else, in bench/handoff.py more."""

    channel: Channel
    x: torch.Tensor  # f32 [rows, H], input of the first layer
    out: torch.Tensor  # of the last one
    kept: tuple[torch.Tensor, ...]  # what else the graph reads
    graph: torch.cuda.CUDAGraph
    stream: torch.cuda.Stream

    @staticmethod
    def capture(channel: Channel, launch: Launch, layers: int, rows: int) -> Replay:
        """Each layer's input is the result of the one before, as in a model."""
        hidden, top_k = channel.buffers.x.shape[1], channel.buffers.ids.shape[1]
        x = torch.zeros((rows, hidden), dtype=torch.float32, device="cuda")
        ids = torch.zeros((rows, top_k), dtype=torch.int32, device="cuda")
        weights = torch.zeros((rows, top_k), dtype=torch.float32, device="cuda")
        # A capture cannot load modules: run both kernels once before, with the answer there.
        channel.buffers.done[0, 0] = 1
        stream = torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        spinning = Channel(channel.buffers, channel.native, structs.KT_HANDOFF_SPIN)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            spinning.ask(launch, 0, x, ids, weights)
            spinning.take(launch, 0, x)
            stream.synchronize()
            channel.buffers.request.zero_()
            with torch.cuda.graph(graph, stream=stream):
                out = x
                for layer in range(layers):
                    channel.ask(launch, layer, out, ids, weights)
                    out = channel.take(launch, layer, out)
            graph.instantiate()
        return Replay(channel, x, out, (ids, weights), graph, stream)

    def run(self, timeout_ns: int, asked_ns: int = 0) -> None:
        """One replay. asked_ns: address of int64 [layers] for the times of the requests, or 0."""
        step = structs.sized(
            structs.GpuStep,
            num_tokens=self.x.shape[0],
            stream=self.stream.cuda_stream,
            graph_exec=self.graph.raw_cuda_graph_exec(),
            timeout_ns=timeout_ns,
            asked_ns=asked_ns,
        )
        self.channel.native.run(step)
