"""Look-ahead, priorities, the adaptive prefill budget and the journal."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest

from kt_async.errors import NativeError
from kt_async.ffi import structs
from tests.native.sched_sim import Sim, alone, make_request

AHEAD = structs.KT_SCHED_LOOKAHEAD
SECOND = 10**9


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed * 1000 + length).choices(range(50), k=length)


def test_the_next_step_is_planned_with_the_token_in_flight():
    sim = Sim(flags=AHEAD)
    seq_id = sim.submit(prompt_of(5), 10)
    assert sim.plan()
    assert sim.plan()
    assert sim.view("tokens", 1).tolist() == [-1]
    assert sim.view("positions", 1).tolist() == [5]
    with pytest.raises(NativeError, match="plan before the commit"):
        sim.plan()
    sim.commit()
    sim.drain()
    sim.finish_all()
    sim.check_text(seq_id)


def test_the_speculative_token_after_a_stop_is_never_emitted():
    text = alone(prompt_of(9), 20)
    sim = Sim(flags=AHEAD)
    seq_id = sim.submit(prompt_of(9), 20, stop_ids=[text[5]])
    count = text.index(text[5]) + 1
    sim.finish_all()
    assert sim.output[seq_id] == text[:count]
    assert sim.num_steps == count + 1  # one row ran for nothing


def test_the_end_by_length_is_known_ahead():
    sim = Sim(flags=AHEAD)
    seq_id = sim.submit(prompt_of(9), 7)
    sim.finish_all()
    sim.check_text(seq_id)
    assert sim.num_steps == 7


def test_penalised_sequences_wait_for_their_history():
    sim = Sim(flags=AHEAD)
    seq_id = sim.submit(prompt_of(9), 7, repetition_penalty=1.2)
    assert sim.plan()
    assert not sim.plan()
    sim.commit()
    assert sim.plan()
    sim.finish_all()
    sim.check_text(seq_id)


def test_cancel_with_a_row_in_flight_gives_no_event():
    sim = Sim(flags=AHEAD)
    seq_id = sim.submit(prompt_of(9), 7)
    assert sim.plan()
    sim.scheduler.cancel(seq_id)
    sim.cancelled.add(seq_id)
    assert not sim.plan()
    sim.commit()
    sim.drain()
    assert sim.output[seq_id] == []
    assert sim.finish[seq_id] == structs.KT_FINISH_CANCELLED
    sim.finish_all()


def test_failing_the_older_step_ends_its_sequences_only():
    sim = Sim(flags=AHEAD, max_batch_size=2, chunk_size=16)
    first = sim.submit(prompt_of(16), 30)
    assert sim.plan()
    second = sim.submit(prompt_of(6), 30)
    assert sim.plan()
    sim.results.popleft()
    sim.scheduler.fail(sim.now)
    sim.commit()
    sim.drain()
    assert sim.finish == {first: structs.KT_FINISH_ERROR}
    sim.finish_all()
    sim.check_text(second)


@pytest.mark.parametrize("seed", range(4))
def test_preemption_with_tokens_in_flight_loses_none(seed):
    flags = AHEAD | (structs.KT_SCHED_PREFIX_CACHE if seed % 2 else 0)
    sim = Sim(flags=flags, num_pages=20, max_len=72, max_batch_size=4, watermark_pages=0)
    ids = [sim.submit(prompt_of(10 + i, seed), 50, prompt_logprobs=i % 2 - 1) for i in range(8)]
    while sim.step():
        sim.scheduler.check()
    sim.finish_all()
    assert sim.scheduler.stats()["preempted"] > 3
    for seq_id in ids:
        sim.check_text(seq_id)


# ---- priorities ----


def order_of_admission(sim: Sim) -> list[int]:
    order: list[int] = []
    while sim.plan():
        sim.commit()
        order.extend(e[0] for e in sim.drain() if e[0] not in order)
    return order


def test_higher_priority_comes_first_and_equals_stay_in_order():
    sim = Sim(max_batch_size=1, policy=structs.KT_SCHED_FCFS_SINGLE_PREFILL)
    ids = [sim.submit(prompt_of(3), 1, priority=p) for p in (0, 2, 1, 2, -1, 0)]
    assert order_of_admission(sim) == [ids[i] for i in (1, 3, 2, 0, 5, 4)]


def test_waiting_outweighs_priority_after_the_priority_step():
    sim = Sim(max_batch_size=1, priority_step_ns=SECOND)
    old = sim.submit(prompt_of(3), 1)
    sim.now += 3 * SECOND
    newer = sim.submit(prompt_of(3), 1, priority=2)
    newest = sim.submit(prompt_of(3), 1, priority=4)
    assert order_of_admission(sim) == [newest, old, newer]


def test_preemption_spares_the_higher_priority():
    sim = Sim(num_pages=16, max_len=64, max_batch_size=2, watermark_pages=0)
    low = sim.submit(prompt_of(20), 40)
    high = sim.submit(prompt_of(20, 1), 40, priority=1)
    while sim.step():
        sim.scheduler.check()
    assert sim.scheduler.stats()["preempted"] > 0
    assert list(sim.finish) == [high, low]


# ---- target time between tokens ----


def run_with_cost(sim: Sim, base_ns: int, token_ns: int) -> list[tuple[int, int]]:
    """Steps as (tokens, decode rows) on an engine whose steps take base + tokens * token_ns."""
    steps = []
    while True:
        sim.step_ns = 0
        if not sim.plan():
            return steps
        plan = sim.scheduler.plan_struct
        steps.append((plan.num_tokens, plan.num_decode_rows))
        sim.step_ns = base_ns + token_ns * plan.num_tokens
        sim.commit()
        sim.drain()


def test_prefill_budget_adapts_to_the_target_time():
    base, token = 5_000_000, 100_000
    config = {"num_pages": 2000, "max_len": 4096, "chunk_size": 1024, "max_samples": 8}
    longest = {}
    for target in (0, 25_000_000):
        sim = Sim(**config, target_itl_ns=target)
        decoding = sim.submit(prompt_of(10), 400)
        sim.step_ns = base
        for _ in range(5):
            sim.step()
        sim.submit(prompt_of(4000), 4)
        steps = run_with_cost(sim, base, token)
        longest[target] = max(base + token * tokens for tokens, rows in steps if rows)
        sim.check_text(decoding)
        if target:
            mixed = [t for t, rows in steps if rows and t > 8]
            assert len(mixed) < 40, "the budget is used, not just kept"
    assert longest[0] > 100_000_000
    assert longest[25_000_000] <= 27_000_000


def test_the_budget_follows_tokens_that_grow_dearer():
    sim = Sim(
        num_pages=2000, max_len=4096, chunk_size=1024, max_samples=8, target_itl_ns=25_000_000
    )
    sim.submit(prompt_of(10), 400)
    sim.step_ns = 5_000_000
    for _ in range(5):
        sim.step()
    sim.submit(prompt_of(4000), 4)
    done, times = 0, []
    while done < 4000:
        sim.step_ns = 0
        assert sim.plan()
        tokens = sim.scheduler.plan_struct.num_tokens - sim.scheduler.plan_struct.num_decode_rows
        done += tokens
        # As attention does: four times the cost at the end of the prompt.
        sim.step_ns = 5_000_000 + round(100_000 * tokens * (1 + 3 * done / 4000))
        times.append(sim.step_ns)
        sim.commit()
        sim.drain()
    assert max(times[3:]) < 29_000_000
    assert sorted(times)[len(times) // 2] > 22_000_000


def test_a_hopeless_target_still_lets_prompts_through():
    sim = Sim(target_itl_ns=1, chunk_size=32)
    sim.submit(prompt_of(3), 60)
    sim.step()
    other = sim.submit(prompt_of(100), 2)
    run_with_cost(sim, 5_000_000, 100_000)
    sim.check_text(other)


# ---- journal and threads ----


def test_journal_tells_every_call_in_order():
    sim = Sim(flags=structs.KT_SCHED_JOURNAL)
    seq_id = sim.submit([5, 6], 1, stop_ids=[9])
    sim.scheduler.cancel(seq_id)
    assert not sim.plan()
    other = sim.submit([7], 1)
    assert sim.plan()
    sim.commit()
    words = [line.split() for line in sim.scheduler.journal().decode().splitlines()]
    assert [w[0] for w in words] == ["submit", "cancel", "plan", "submit", "plan", "commit"]
    assert words[0][2:] == [
        str(seq_id),
        "0",
        "0",
        "1",
        "0",
        "0",
        "-1",
        "0",
        "1",
        "9",
        "2",
        "5",
        "6",
    ]
    assert words[1] == ["cancel", str(seq_id)]
    assert words[2][2:] == ["2", "0" * 16]
    assert int(words[4][3], 16) != 0
    assert words[5][2:] == ["1", str(alone([7], 1)[0])]
    assert other
    assert sim.scheduler.journal() == b""


def test_submit_and_cancel_from_many_threads_while_the_engine_runs():
    sim = Sim(num_pages=200, max_queue=100_000, flags=structs.KT_SCHED_PREFIX_CACHE)
    scheduler = sim.scheduler
    block = np.zeros(scheduler.layout.num_bytes, np.uint8)
    finished: set[int] = set()

    def client(offset: int) -> None:
        for i in range(offset, offset + 300):
            scheduler.submit(i, make_request(prompt_of(i % 30 + 1), i % 7 + 1), i)
            if i % 5 == 0:
                scheduler.cancel(i)

    clients = [threading.Thread(target=client, args=(1 + 1000 * n,)) for n in range(4)]
    for thread in clients:
        thread.start()
    tokens = np.zeros(1000, np.int32)
    while len(finished) < 1200:
        scheduler.wait(1_000_000)
        if scheduler.plan(1, block.ctypes.data):
            scheduler.commit(2, tokens.ctypes.data, scheduler.plan_struct.num_samples)
        events = scheduler.drain()
        ended = events["seq_id"][events["kind"] == structs.KT_EVENT_FINISH].tolist()
        assert not finished & set(ended)
        finished |= set(ended)
    for thread in clients:
        thread.join()
    scheduler.check()
    assert scheduler.stats()["finished"] == 1200
