"""The prefix cache and its host-RAM tier through ctypes."""

from __future__ import annotations

import random

import pytest

from kt_async.errors import NativeError
from kt_async.ffi import structs
from kt_async.ffi.scheduler import Scheduler
from tests.native.sched_sim import Sim, make_config

CACHE = structs.KT_SCHED_PREFIX_CACHE
AHEAD = structs.KT_SCHED_LOOKAHEAD


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed * 1000 + length).choices(range(50), k=length)


def prefilled(sim: Sim) -> int:
    return sim.scheduler.stats()["prefill_tokens"]


def test_second_turn_of_a_long_chat_prefills_only_what_is_new():
    sim = Sim(
        flags=CACHE, page_size=16, num_pages=400, max_len=6400, chunk_size=512, max_samples=64
    )
    first = sim.submit(prompt_of(4000), 100)
    sim.finish_all()
    assert sim.num_cached[first] == 0
    before = prefilled(sim)
    # The client sends the whole text back with a new question.
    text = prompt_of(4000) + sim.output[first] + prompt_of(30, 1)
    second = sim.submit(text, 10)
    sim.finish_all()
    sim.check_text(second)
    # Prompt and answer are cached but for the last token, which was never fed back.
    assert sim.num_cached[second] == 4099 // 16 * 16
    assert prefilled(sim) - before == len(text) - sim.num_cached[second]


@pytest.mark.parametrize("length", [3, 4, 5, 8, 9, 31, 32, 33])
def test_num_cached_is_whole_pages_and_leaves_a_token_to_run(length):
    sim = Sim(flags=CACHE)
    first, second = sim.submit(prompt_of(length), 1), 0
    sim.finish_all()
    second = sim.submit(prompt_of(length), 1)
    sim.finish_all()
    assert sim.num_cached[first] == 0
    assert sim.num_cached[second] == (length - 1) // 4 * 4
    sim.check_text(second)


def test_running_requests_share_pages_without_copies():
    sim = Sim(flags=CACHE, num_pages=40, chunk_size=100, max_len=100)
    ids = [sim.submit(prompt_of(80) + prompt_of(3, i), 10) for i in range(6)]
    most = 0
    while sim.step():
        sim.scheduler.check()
        most = max(most, sim.scheduler.stats()["num_running"])
    sim.finish_all()
    # Alone each needs 24 pages; 40 hold all six because 20 are shared.
    assert most == 6
    assert sim.scheduler.stats()["preempted"] == 0
    for seq_id in ids:
        sim.check_text(seq_id)


def test_equal_prompts_that_arrive_together_are_computed_once():
    sim = Sim(flags=CACHE, num_pages=200, chunk_size=16, max_len=400)
    ids = [sim.submit(prompt_of(321), 4) for _ in range(8)]
    sim.finish_all()
    for seq_id in ids:
        sim.check_text(seq_id)
    assert prefilled(sim) < 321 + 8 * 16
    cached = [sim.num_cached[seq_id] for seq_id in ids]
    assert cached[0] == 0
    assert min(cached[1:]) >= 300
    assert sum(cached) == 8 * 321 - prefilled(sim)


def test_a_running_prefill_takes_over_pages_that_another_has_computed():
    sim = Sim(flags=CACHE, num_pages=60, chunk_size=20, max_len=100)
    first, second = sim.submit(prompt_of(36), 2), sim.submit(prompt_of(36) + [1] * 20, 2)
    sim.step()  # 20 tokens of the first
    assert sim.plan()  # its other 16, and 4 of the second, which found 20
    assert sim.view("row_start", 3).tolist() == [0, 16, 20]
    sim.commit()
    sim.drain()
    assert sim.plan()  # the second goes on behind the 36 that are there now
    assert sim.view("context_len", 2).tolist()[1] - sim.view("row_start", 3).tolist()[2] == 35
    sim.commit()
    sim.finish_all()
    assert sim.num_cached[second] == 20 + 12
    for seq_id in (first, second):
        sim.check_text(seq_id)


def test_copies_computed_side_by_side_are_merged():
    sim = Sim(flags=CACHE, num_pages=40, chunk_size=64, max_len=100)
    ids = [sim.submit(prompt_of(16), 30) for _ in range(2)]
    sim.step()  # both prompts fit one step: computed twice, then one copy is given up
    assert sim.scheduler.stats()["pages_used"] <= 4 + 2
    sim.finish_all()
    for seq_id in ids:
        sim.check_text(seq_id)


def test_salts_do_not_share():
    sim = Sim(flags=CACHE)
    for salt, cached in ((1, 0), (2, 0), (1, 20), (2, 20), (0, 0)):
        seq_id = sim.submit(prompt_of(21), 1, cache_salt=salt)
        sim.finish_all()
        assert sim.num_cached[seq_id] == cached


def test_without_the_flag_nothing_is_kept():
    sim = Sim(flags=0)
    for _ in range(2):
        seq_id = sim.submit(prompt_of(21), 1)
        sim.finish_all()
        assert sim.num_cached[seq_id] == 0
    stats = sim.scheduler.stats()
    assert (stats["pages_cached"], stats["prefix_hit_tokens"]) == (0, 0)


def test_eviction_drops_the_longest_unused_leaf_first():
    sim = Sim(flags=CACHE, num_pages=30, max_len=100, watermark_pages=0)
    old, new = prompt_of(41, 1), prompt_of(41, 2)
    for prompt in (old, new, old):  # the last use counts
        sim.submit(prompt, 1)
        sim.finish_all()
    sim.submit(prompt_of(61, 3), 1)  # 16 pages: 10 free, 6 of `new` go, from its end
    sim.finish_all()
    for prompt, cached in ((old, 40), (new[:21], 16)):
        seq_id = sim.submit(prompt, 1)
        sim.finish_all()
        assert sim.num_cached[seq_id] == cached
    assert sim.scheduler.stats()["evicted_pages"] > 0


def test_prompt_logprobs_recompute_every_position():
    sim = Sim(flags=CACHE)
    for _ in range(2):
        seq_id = sim.submit(prompt_of(50), 3, prompt_logprobs=1)
        sim.finish_all()
        sim.check_text(seq_id)
        assert sim.num_cached[seq_id] == 0
    assert sim.submit(prompt_of(50), 3)
    sim.finish_all()
    assert sim.scheduler.stats()["prefix_hit_tokens"] == 48


def test_cached_pages_never_keep_a_request_from_running():
    sim = Sim(flags=CACHE, num_pages=32, max_len=128)
    for i in range(20):
        seq_id = sim.submit(prompt_of(100, i), 28)
        sim.finish_all()
        sim.check_text(seq_id)


def test_host_tier_brings_evicted_pages_back():
    sim = Sim(flags=CACHE, num_pages=32, max_len=128, num_host_pages=100)
    prompts = [prompt_of(101, i) for i in range(3)]
    for prompt in prompts:
        sim.submit(prompt, 2)
        sim.finish_all()
    stats = sim.scheduler.stats()
    assert stats["copied_out_pages"] == stats["evicted_pages"] == stats["host_pages_used"] > 0
    before = prefilled(sim)
    for prompt in prompts:
        seq_id = sim.submit(prompt, 2)
        sim.finish_all()
        sim.check_text(seq_id)
        assert sim.num_cached[seq_id] == 100
    assert prefilled(sim) - before == 3
    assert sim.scheduler.stats()["copied_in_pages"] >= 50


def test_a_plan_may_hold_copies_only_and_others_go_on_meanwhile():
    sim = Sim(flags=CACHE, num_pages=32, max_len=128, num_host_pages=100)
    for i in range(2):
        sim.submit(prompt_of(101, i), 2)
        sim.finish_all()
    loading = sim.submit(prompt_of(101, 0), 2)
    assert sim.plan()
    plan = sim.scheduler.plan_struct
    assert (plan.num_tokens, plan.num_rows, plan.num_samples) == (0, 0, 0)
    assert plan.num_copies_in > 0
    sim.commit()
    assert sim.plan()
    assert sim.scheduler.plan_struct.num_tokens == 1
    sim.commit()
    sim.finish_all()
    sim.check_text(loading)


def test_small_host_tier_drops_its_oldest_pages():
    sim = Sim(flags=CACHE, num_pages=32, max_len=128, num_host_pages=7)
    for round_ in range(3):
        for i in range(4):
            seq_id = sim.submit(prompt_of(90, i), 20)
            sim.finish_all()
            sim.check_text(seq_id)
        assert sim.scheduler.stats()["host_pages_used"] <= 7, round_


def test_failed_copies_are_not_trusted():
    sim = Sim(flags=CACHE, num_pages=32, max_len=128, num_host_pages=100)
    for i in range(2):
        sim.submit(prompt_of(101, i), 2)
        sim.finish_all()
    loading = sim.submit(prompt_of(101, 0), 2)
    assert sim.plan()
    sim.results.clear()
    sim.kv[:] = [0] * len(sim.kv)  # the copies never happened, the device lost its memory
    sim.scheduler.fail(sim.now)
    sim.drain()
    assert sim.finish[loading] == structs.KT_FINISH_ERROR
    sim.scheduler.check()
    assert not sim.plan()
    stats = sim.scheduler.stats()
    assert stats["pages_cached"] == stats["host_pages_used"] == 0
    seq_id = sim.submit(prompt_of(101, 0), 2)
    sim.finish_all()
    sim.check_text(seq_id)


def test_host_tier_needs_the_cache():
    with pytest.raises(NativeError, match="num_host_pages"):
        Scheduler(make_config(num_host_pages=3))


@pytest.mark.parametrize("flags", [CACHE, CACHE | AHEAD])
def test_preempted_sequences_find_their_own_pages_again(flags):
    sim = Sim(flags=flags, num_pages=20, max_len=80, max_batch_size=3, watermark_pages=0)
    ids = [sim.submit(prompt_of(20, i), 60) for i in range(4)]
    while sim.step():
        sim.scheduler.check()
    sim.finish_all()
    assert sim.scheduler.stats()["preempted"] > 0
    for seq_id in ids:
        sim.check_text(seq_id)
