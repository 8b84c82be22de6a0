"""The scheduler through ctypes: limits, stop rules, refusals, paging, preemption."""

from __future__ import annotations

import ctypes
import random
import threading
import time

import numpy as np
import pytest

from kt_async.errors import NativeError
from kt_async.ffi import structs
from kt_async.ffi.scheduler import Scheduler
from tests.native.sched_sim import Sim, alone, make_config, make_request


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed * 1000 + length).choices(range(50), k=length)


CACHE, AHEAD = structs.KT_SCHED_PREFIX_CACHE, structs.KT_SCHED_LOOKAHEAD


@pytest.mark.parametrize("policy", [structs.KT_SCHED_FCFS, structs.KT_SCHED_FCFS_SINGLE_PREFILL])
@pytest.mark.parametrize(
    ("flags", "host"), [(0, 0), (CACHE, 0), (CACHE, 20), (AHEAD, 0), (CACHE | AHEAD, 20)]
)
def test_many_mixed_requests_get_the_text_they_would_get_alone(policy, flags, host):
    sim = Sim(policy=policy, num_pages=48, flags=flags, num_host_pages=host)
    rng = random.Random(1)
    shared = prompt_of(60)
    ids = []
    for i in range(60):
        ids.append(
            sim.submit(
                shared[: rng.choice([0, 0, 20, 60])] + prompt_of(rng.randint(1, 30), i),
                rng.randint(1, 40),
                prompt_logprobs=rng.choice([-1, -1, 0]),
                stop_ids=rng.sample(range(50), rng.randint(0, 2)),
                min_tokens=rng.choice([0, 0, 5]),
                presence_penalty=rng.choice([0.0, 0.5]),
                logit_bias=rng.choice([{}, {3: 1.5, 7: -2.0}]),
                seed=i,
            )
        )
        if i % 3 == 0:
            sim.step()
            sim.scheduler.check()
    while sim.step():
        sim.scheduler.check()
    sim.finish_all()
    for seq_id in ids:
        sim.check_text(seq_id)
    assert policy != structs.KT_SCHED_FCFS or sim.scheduler.stats()["preempted"] > 0


def test_max_tokens_is_exact_and_max_len_ends_a_sequence():
    sim = Sim(max_len=32)
    short, long = sim.submit(prompt_of(5), 3), sim.submit(prompt_of(30), 100)
    sim.finish_all()
    assert len(sim.output[short]) == 3
    assert len(sim.output[long]) == 2
    assert sim.finish == {short: structs.KT_FINISH_LENGTH, long: structs.KT_FINISH_LENGTH}


def test_zero_max_tokens_ends_after_the_prompt():
    sim = Sim()
    seq_id = sim.submit(prompt_of(50), 0, prompt_logprobs=0)
    sim.finish_all()
    assert sim.output[seq_id] == []
    assert sim.scores[seq_id] == prompt_of(50)[1:]
    assert sim.finish[seq_id] == structs.KT_FINISH_LENGTH


def test_stop_id_is_delivered_and_names_the_reason():
    sim = Sim()
    text = alone(prompt_of(9), 20)
    first = text.index(text[6])
    seq_id = sim.submit(prompt_of(9), 20, stop_ids=[text[6]])
    while sim.plan():
        sim.commit()
        events = sim.drain()
    assert sim.output[seq_id] == text[: first + 1]
    assert [event[1:3] for event in events] == [
        (structs.KT_EVENT_TOKEN, structs.KT_FINISH_STOP),
        (structs.KT_EVENT_FINISH, structs.KT_FINISH_STOP),
    ]


def test_min_tokens_delays_the_stop():
    sim = Sim()
    text = alone(prompt_of(9), 30)
    seq_id = sim.submit(prompt_of(9), 30, stop_ids=list(range(50)), min_tokens=11)
    sim.finish_all()
    assert sim.output[seq_id] == text[:11]


def test_decodes_come_first_and_prefill_takes_the_rest_of_the_chunk():
    sim = Sim(chunk_size=16, max_batch_size=4)
    for _ in range(3):
        sim.submit(prompt_of(4), 50)
    sim.step()
    sim.submit(prompt_of(100), 4)
    assert sim.plan()
    plan = sim.scheduler.plan_struct
    assert (plan.num_decode_rows, plan.num_rows, plan.num_tokens) == (3, 4, 16)
    assert plan.num_samples == 3


def test_a_prompts_last_token_alone_is_no_decode_row():
    sim = Sim(chunk_size=16, max_batch_size=4)
    sim.submit(prompt_of(17), 3)
    steps = []
    for _ in range(4):
        sim.step()
        plan = sim.scheduler.plan_struct
        steps.append((plan.num_tokens, plan.num_decode_rows, plan.num_samples))
    assert steps == [(16, 0, 0), (1, 0, 1), (1, 1, 1), (1, 1, 1)]


def test_single_prefill_policy_runs_one_prompt_at_a_time():
    for policy, rows in ((structs.KT_SCHED_FCFS, 3), (structs.KT_SCHED_FCFS_SINGLE_PREFILL, 1)):
        sim = Sim(chunk_size=24, policy=policy)
        for _ in range(3):
            sim.submit(prompt_of(10), 4)
        assert sim.plan()
        assert sim.scheduler.plan_struct.num_rows == rows


def test_batch_size_is_never_exceeded_and_is_reached():
    sim = Sim(max_batch_size=5, num_pages=200)
    for i in range(20):
        sim.submit(prompt_of(3, i), 30)
    most = 0
    while sim.plan():
        most = max(most, sim.scheduler.plan_struct.num_rows)
        sim.commit()
        sim.drain()
    assert most == 5


def test_pages_are_taken_on_demand_not_reserved():
    # 8 x (8 + 100) tokens would be 216 pages; 64 pages run all eight at once.
    sim = Sim(chunk_size=64)
    for i in range(8):
        sim.submit(prompt_of(8, i), 100)
    sim.step()
    stats = sim.scheduler.stats()
    assert stats["num_running"] == 8
    assert stats["pages_used"] <= 24
    sim.finish_all()
    for seq_id in sim.requests:
        sim.check_text(seq_id)


def test_preemption_takes_the_youngest_and_serves_it_first_afterwards():
    sim = Sim(num_pages=16, max_len=64, max_batch_size=2, watermark_pages=0)
    old, young = sim.submit(prompt_of(20), 40), sim.submit(prompt_of(20, 1), 40)
    later = sim.submit(prompt_of(4, 2), 4)
    while not sim.scheduler.stats()["preempted"]:
        assert sim.step()
    assert sim.scheduler.stats()["num_running"] >= 1
    sim.finish_all()
    assert list(sim.finish) == [old, young, later] or list(sim.finish) == [old, later, young]
    for seq_id in (old, young, later):
        sim.check_text(seq_id)


def test_prompt_logprobs_are_complete_and_never_sent_twice():
    sim = Sim(num_pages=24, max_len=96, max_samples=8, max_batch_size=3, watermark_pages=0)
    ids = [sim.submit(prompt_of(30 + i, i), 30, prompt_logprobs=2) for i in range(5)]
    sim.finish_all()
    for seq_id in ids:
        assert sim.scores[seq_id] == list(sim.requests[seq_id].prompt_ids[1:])
        sim.check_text(seq_id)
    assert sim.scheduler.stats()["preempted"] > 0


def test_cancel_in_every_state():
    sim = Sim(max_batch_size=2)
    decoding, prefilling = sim.submit(prompt_of(4), 50), sim.submit(prompt_of(100), 50)
    waiting = sim.submit(prompt_of(4), 50)
    sim.step()
    fresh = sim.submit(prompt_of(4), 50)
    for seq_id in (decoding, prefilling, waiting, fresh, 999):
        sim.scheduler.cancel(seq_id)
    assert not sim.plan()
    sim.drain()
    cancelled = structs.KT_FINISH_CANCELLED
    assert sim.finish == dict.fromkeys((decoding, prefilling, waiting, fresh), cancelled)
    sim.finish_all()


def test_cancel_between_plan_and_commit_ends_at_the_next_plan():
    sim = Sim()
    seq_id = sim.submit(prompt_of(4), 50)
    assert sim.plan()
    sim.scheduler.cancel(seq_id)
    sim.commit()
    assert not sim.plan()
    sim.drain()
    assert sim.output[seq_id] == alone(prompt_of(4), 1)
    assert sim.finish[seq_id] == structs.KT_FINISH_CANCELLED


def test_queue_is_bounded():
    sim = Sim(max_queue=3, max_batch_size=1)
    ids = [sim.submit(prompt_of(3), 20) for _ in range(4)]
    assert [bool(seq_id) for seq_id in ids] == [True, True, True, False]
    sim.step()  # one is admitted
    assert sim.submit(prompt_of(3), 20)
    assert not sim.submit(prompt_of(3), 20)
    assert sim.scheduler.stats()["rejected"] == 2
    sim.finish_all()


def test_queue_timeout_ends_only_waiting_requests():
    sim = Sim(max_batch_size=1, queue_timeout_ns=5000)
    first, second = sim.submit(prompt_of(3), 30), sim.submit(prompt_of(3), 30)
    sim.finish_all()
    assert sim.finish[first] == structs.KT_FINISH_LENGTH
    assert sim.finish[second] == structs.KT_FINISH_TIMEOUT
    assert sim.output[second] == []


def test_failed_step_ends_its_sequences_and_spares_the_others():
    sim = Sim(max_batch_size=2)
    ids = [sim.submit(prompt_of(3), 5) for _ in range(3)]
    assert sim.plan()
    sim.results.clear()
    sim.scheduler.fail(sim.now)
    sim.drain()
    assert sim.finish == dict.fromkeys(ids[:2], structs.KT_FINISH_ERROR)
    sim.finish_all()
    sim.check_text(ids[2])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_batch_size": 257}, "max_batch_size is 257"),
        ({"max_batch_size": 0}, "max_batch_size is 0"),
        ({"max_samples": 7}, "max_samples is 7"),
        ({"max_len": 300}, "max_len is 300"),
        ({"policy": 9}, "policy is 9"),
        ({"page_size": 0}, "page_size is 0"),
        ({"flags": 1 << 20}, "flags"),
        ({"max_queue": 0}, "max_queue is 0"),
    ],
)
def test_bad_configuration_is_named(changes, words):
    with pytest.raises(NativeError, match=words) as caught:
        Scheduler(make_config(**changes))
    assert caught.value.status == structs.KT_ERR_ARGUMENT


@pytest.mark.parametrize(
    ("prompt", "changes", "words"),
    [
        ([1] * 128, {}, "the prompt has 128 tokens.* at most 128"),
        ([], {}, "num_tokens is 0"),
        ([1, -5], {}, "negative token -5"),
        ([1], {"temperature": -1.0}, "temperature"),
        ([1], {"temperature": float("nan")}, "temperature"),
        ([1], {"top_p": 1.5}, "top_p"),
        ([1], {"stop_ids": list(range(65))}, "num_stop_ids is 65"),
        ([1], {"logit_bias": dict.fromkeys(range(1025), 1.0)}, "num_bias is 1025"),
        ([1], {"num_logprobs": 21}, "num_logprobs is 21"),
        ([1], {"priority": 5000}, "priority is 5000"),
    ],
)
def test_request_that_cannot_run_is_refused_with_numbers(prompt, changes, words):
    scheduler = Scheduler(make_config())
    with pytest.raises(NativeError, match=words) as caught:
        scheduler.submit(1, make_request(prompt, **changes), 0)
    assert caught.value.status == structs.KT_ERR_ARGUMENT
    assert scheduler.wait(0) == structs.KT_TIMEOUT  # nothing was queued


def test_a_living_id_is_refused_and_free_again_after_the_end():
    sim = Sim()
    assert sim.scheduler.submit(7, make_request([1]), 0)
    with pytest.raises(NativeError, match="seq_id 7"):
        sim.scheduler.submit(7, make_request([1]), 0)
    sim.scheduler.cancel(7)
    assert not sim.plan()
    assert sim.scheduler.submit(7, make_request([1]), 0)


def test_order_of_calls_is_checked():
    sim = Sim()
    with pytest.raises(NativeError, match="commit without a plan") as caught:
        sim.scheduler.commit(0, 0, 0)
    assert caught.value.status == structs.KT_ERR_STATE
    sim.submit(prompt_of(3))
    assert sim.plan()
    with pytest.raises(NativeError, match="plan before"):
        sim.plan()
    tokens = np.zeros(5, np.int32)
    with pytest.raises(NativeError, match="5 tokens, the planned step has 1"):
        sim.scheduler.commit(0, tokens.ctypes.data, 5)
    sim.commit()


def test_histories_beyond_the_block_wait_for_a_later_step():
    # Room for 2**18 entries; two sequences with 150k distinct tokens each need more.
    config = make_config(
        max_batch_size=2, chunk_size=400_000, page_size=1024, num_pages=400, max_len=200_000
    )
    with Scheduler(config) as scheduler:
        for seq_id in (1, 2):
            prompt = np.arange(150_000, dtype=np.int32)
            request = make_request([], 3, presence_penalty=1.0)
            object.__setattr__(request, "prompt_ids", prompt)
            assert scheduler.submit(seq_id, request, 0)
        block = np.zeros(scheduler.layout.num_bytes, np.uint8)
        tokens = np.zeros(64, np.int32)
        order = []
        while scheduler.plan(1, block.ctypes.data):
            assert scheduler.plan_struct.num_history <= 1 << 18
            scheduler.commit(2, tokens.ctypes.data, scheduler.plan_struct.num_samples)
            order += scheduler.drain()["seq_id"].tolist()
    assert order == [1] * 4 + [2] * 4


def test_wait_wakes_for_submit_wake_and_time():
    sim = Sim()
    scheduler = sim.scheduler
    assert scheduler.wait(0) == structs.KT_TIMEOUT
    scheduler.wake()
    assert scheduler.wait(-1) == structs.KT_IDLE
    timer = threading.Timer(0.05, lambda: sim.submit(prompt_of(3), 1))
    timer.start()
    begin = time.monotonic()
    assert scheduler.wait(5_000_000_000) == structs.KT_OK
    assert time.monotonic() - begin < 4
    timer.join()
    sim.finish_all()
    assert scheduler.wait(1000) == structs.KT_TIMEOUT


def test_null_and_closed_handles_are_errors():
    scheduler = Scheduler(make_config())
    scheduler.close()
    scheduler.close()
    with pytest.raises(NativeError, match="sched is NULL"):
        scheduler.wake()
    config = make_config()
    config.struct_size = 3
    with pytest.raises(NativeError, match="struct_size is 3") as caught:
        Scheduler(config)
    assert caught.value.status == structs.KT_ERR_ABI


def test_layout_is_aligned_and_disjoint():
    layout = Scheduler(make_config()).layout
    names = [n for n, _ in structs.BlockLayout._fields_[5:]]
    offsets = [getattr(layout, name) for name in names]
    assert offsets == sorted(set(offsets))
    assert all(offset % 64 == 0 for offset in offsets)
    assert layout.num_bytes > offsets[-1]
    assert ctypes.sizeof(structs.SampleParams) == 88
