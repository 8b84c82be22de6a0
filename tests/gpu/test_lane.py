"""Decode steps and a long prompt at the same time on one GPU give the text of either alone."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from kt_async.engine.loop import Delivery, EngineLoop  # noqa: E402
from kt_async.engine.types import GenerationRequest, SamplingParams  # noqa: E402
from kt_async.ffi import structs  # noqa: E402
from tests.gpu.test_engine import checkpoint, engine, folder, prompt  # noqa: E402, F401
from tests.reference.harness import DirectEngine  # noqa: E402

pytestmark = pytest.mark.gpu

NUM_DECODING, LONG, TOKENS = 3, 900, 150


class Client:
    """Submits to an engine loop and collects what comes."""

    def __init__(self, made: DirectEngine) -> None:
        self.made = made
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.ended: set[int] = set()
        self.failures: list[str] = []
        self.changed = threading.Condition()
        self.loop = EngineLoop(made.scheduler, made.runner, self.deliver)

    def deliver(self, delivery: Delivery) -> None:
        with self.changed:
            for seq_id, kind, _, token, *_ in delivery.events.tolist():
                if kind == structs.KT_EVENT_TOKEN:
                    self.tokens[seq_id].append(token)
                elif kind == structs.KT_EVENT_FINISH:
                    self.ended.add(seq_id)
            self.failures += [delivery.failure] if delivery.failure else []
            self.changed.notify_all()

    def submit(self, tokens: list[int], max_tokens: int) -> int:
        greedy = SamplingParams(temperature=0.0)
        return self.made.submit(GenerationRequest("test", tokens, max_tokens, greedy))

    def until(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: bool(self.failures) or condition(), 60)
        assert not self.failures


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("experts_in_vram", [True, False])
def test_text_is_that_of_each_request_alone(
    folder: Path,  # noqa: F811
    experts_in_vram: bool,
    seed: int,
) -> None:
    made = engine(
        checkpoint(folder, "Q8_0"),
        experts_in_vram=experts_in_vram,
        # Prompts beside decode rows leave nothing to the CPU, whose sums are rounded otherwise.
        prompt_experts="gpu",
        use_graphs=True,
        max_batch_size=NUM_DECODING + 1,
        chunk_size=256,
        lane_tokens=16,
    )
    client = Client(made)
    try:
        prompts = [prompt(7 + 5 * i, seed=10 * seed + i) for i in range(NUM_DECODING)]
        long = prompt(LONG, seed=100 + seed)
        alone = [made.generate([p], TOKENS)[0] for p in prompts]
        alone_long = made.generate([long], 10)[0]
        assert made.scheduler.stats()["lane_steps"] == 0
        client.loop.start()
        ids = [client.submit(p, TOKENS) for p in prompts]
        client.until(lambda: all(client.tokens[i] for i in ids))
        long_id = client.submit(long, 10)
        client.until(lambda: client.ended.issuperset([*ids, long_id]))
        assert made.scheduler.stats()["lane_steps"] >= LONG // 256
    finally:
        client.loop.stop()
        made.close()
    assert [client.tokens[i] for i in ids] == alone
    assert client.tokens[long_id] == alone_long


def test_an_engine_ends_with_a_prompt_under_way(folder: Path) -> None:  # noqa: F811
    made = engine(
        checkpoint(folder, "Q8_0"),
        experts_in_vram=False,
        use_graphs=True,
        max_batch_size=2,
        chunk_size=1024,
        lane_tokens=16,
    )
    client = Client(made)
    client.loop.start()
    first = client.submit(prompt(5), 500)
    client.until(lambda: len(client.tokens[first]) > 2)
    client.submit(prompt(1000), 5)
    client.until(lambda: made.scheduler.stats()["lane_steps"] > 0)
    client.loop.stop()
    made.close()
    torch.cuda.synchronize()
