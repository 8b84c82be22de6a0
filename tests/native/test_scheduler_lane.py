"""The prefill lane: prompt steps that are planned, run and committed beside decode steps."""

from __future__ import annotations

import random

import pytest

from bench import sched_replay
from kt_async.errors import NativeError
from kt_async.ffi import structs
from tests.native.sched_sim import Sim

CACHE = structs.KT_SCHED_PREFIX_CACHE


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed * 1000 + length).choices(range(50), k=length)


def decoding(**changes) -> tuple[Sim, int]:
    """A simulation with a lane in which one sequence decodes."""
    sim = Sim(**{"lane_tokens": 10, "num_pages": 200, "max_len": 400, **changes})
    seq_id = sim.submit(prompt_of(5), 300)
    assert sim.step()
    return sim, seq_id


def decode_steps(sim: Sim, count: int) -> None:
    for _ in range(count):
        assert sim.plan()
        assert sim.scheduler.plan_struct.num_decode_rows == sim.scheduler.plan_struct.num_rows
        sim.commit()
        sim.drain()


def test_decode_steps_go_on_while_a_prompt_prefills():
    sim, first = decoding()
    long = sim.submit(prompt_of(100), 3)
    assert sim.plan()
    plan = sim.scheduler.plan_struct
    assert (plan.num_tokens, plan.lane_waits) == (1, 1)
    sim.commit()
    assert sim.plan_lane()
    assert sim.scheduler.lane_struct.num_tokens == 32  # the whole chunk is the prompt's
    before = len(sim.output[first])
    decode_steps(sim, 7)
    assert not sim.scheduler.plan_struct.lane_waits  # it does not wait, it runs
    assert len(sim.output[first]) == before + 8
    with pytest.raises(NativeError, match="before the commit of the lane step"):
        sim.plan_lane()
    sim.commit_lane()
    sim.finish_all()
    sim.check_text(first)
    sim.check_text(long)
    stats = sim.scheduler.stats()
    assert stats["lane_steps"] == 3  # the last four tokens are too few
    assert stats["prefill_tokens"] == 105


def test_a_prompt_alone_and_a_short_one_use_ordinary_steps():
    sim = Sim(lane_tokens=10)
    alone = sim.submit(prompt_of(60), 20)
    assert not sim.plan_lane()
    assert sim.plan()
    assert sim.scheduler.plan_struct.num_tokens == 32
    sim.commit()
    while not sim.output[alone]:
        sim.step()
    short = sim.submit(prompt_of(9), 4)
    assert not sim.plan_lane()
    assert sim.plan()
    assert sim.scheduler.plan_struct.num_tokens == 10
    sim.commit()
    sim.finish_all()
    sim.check_text(short)
    assert sim.scheduler.stats()["lane_steps"] == 0


def test_what_the_cache_has_does_not_count():
    sim, _ = decoding(flags=CACHE)
    long = sim.submit(prompt_of(100), 1)
    while long not in sim.finish:
        sim.step()
    sim.submit([*prompt_of(100), 1, 2, 3], 1)
    assert not sim.plan_lane()
    assert sim.plan()
    assert sim.scheduler.plan_struct.num_tokens == 1 + 103 - 100
    sim.commit()
    sim.finish_all()


def test_a_cancelled_sequence_keeps_its_pages_until_the_commit():
    sim, _ = decoding()
    long = sim.submit(prompt_of(100), 3)
    assert sim.plan_lane()
    used = sim.scheduler.stats()["pages_used"]
    sim.scheduler.cancel(long)
    decode_steps(sim, 1)
    assert sim.scheduler.stats()["pages_used"] >= used
    assert long not in sim.finish
    sim.cancelled.add(long)
    sim.commit_lane()
    sim.drain()
    assert sim.finish[long] == structs.KT_FINISH_CANCELLED
    assert sim.scheduler.stats()["cancelled"] == 1
    sim.finish_all()


def test_a_failed_lane_step_ends_its_sequences_only():
    sim, first = decoding()
    long = sim.submit(prompt_of(100), 3)
    assert sim.plan_lane()
    sim.fail_lane()
    sim.drain()
    assert sim.finish == {long: structs.KT_FINISH_ERROR}
    sim.finish_all()
    sim.check_text(first)


def test_a_decode_row_without_a_page_waits_for_the_lane_and_goes_first():
    sim, first = decoding(num_pages=18, max_len=70, watermark_pages=0, lane_tokens=20, page_size=4)
    long = sim.submit(prompt_of(50), 2)
    assert sim.plan_lane()
    num_steps = 0
    while sim.plan():
        sim.commit()
        sim.drain()
        num_steps += 1
    assert num_steps > 5  # then the pages were used up
    sim.commit_lane()
    assert not sim.plan_lane()
    assert sim.plan()
    assert sim.scheduler.stats()["preempted"] == 1
    sim.commit()
    sim.finish_all()
    sim.check_text(first)
    sim.check_text(long)


def test_commits_keep_the_order_of_a_sequence():
    sim = Sim(flags=structs.KT_SCHED_LOOKAHEAD, lane_tokens=10, num_pages=200, max_len=400)
    sim.submit(prompt_of(5), 300)
    assert sim.plan()
    sim.submit(prompt_of(100), 3)
    assert sim.plan_lane()
    with pytest.raises(NativeError, match="planned before the lane's is not committed"):
        sim.commit_lane()


def test_without_a_lane_there_is_none():
    sim = Sim()
    with pytest.raises(NativeError, match="lane_tokens is 0"):
        sim.plan_lane()
    with pytest.raises(NativeError, match="lane_tokens is -1"):
        Sim(lane_tokens=-1)


@pytest.mark.parametrize("flags", [0, CACHE, CACHE | structs.KT_SCHED_LOOKAHEAD])
def test_a_journal_with_lane_steps_replays(flags):
    rng = random.Random(flags)
    sim = Sim(flags=flags | structs.KT_SCHED_JOURNAL, lane_tokens=8, num_pages=60, num_host_pages=0)
    for i in range(25):
        sim.submit(prompt_of(rng.randint(1, 60), i % 3), rng.randint(1, 30))
        for _ in range(3):
            sim.step()
        if i % 6 == 5:
            sim.scheduler.cancel(i - 2)
    sim.finish_all()
    text = sched_replay.write_header(sim.config) + sim.scheduler.journal().decode()
    calls, difference = sched_replay.replay(text)
    assert difference is None
    assert calls["lane_commit"] == sim.scheduler.stats()["lane_steps"] > 5
