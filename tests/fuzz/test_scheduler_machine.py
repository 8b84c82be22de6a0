"""Random calls to the native scheduler, compared with the Python rules after every action."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from kt_async.ffi import structs
from kt_async.ffi.scheduler import SAMPLE_DTYPE
from tests.native.sched_sim import Sim
from tests.reference.scheduler import ReferenceScheduler, is_decode_row

STEMS = [[(7 * i + 3 * n) % 50 for i in range(60)] for n in range(3)]


def make_values(choose, between):
    """A random configuration; choose(list) and between(low, high) draw."""
    flags = between(0, 3)
    page_size, num_pages = choose([1, 2, 4, 8]), between(3, 24)
    max_batch_size = choose([1, 2, 3, 6])
    has_cache = flags & structs.KT_SCHED_PREFIX_CACHE
    return {
        "flags": flags,
        "policy": between(0, 1),
        "max_batch_size": max_batch_size,
        "chunk_size": choose([1, 4, 16, 64]),
        "page_size": page_size,
        "num_pages": num_pages,
        "max_len": min(70, num_pages * page_size),
        "max_queue": choose([2, 40]),
        "max_samples": max_batch_size + choose([0, 2, 60]),
        "watermark_pages": choose([-1, 0, 2]),
        "num_host_pages": choose([0, 2, 30]) if has_cache else 0,
        "queue_timeout_ns": choose([0, 20_000]),
        "priority_step_ns": choose([2000, 10**12]),
        "lane_tokens": choose([0, 1, 3, 10, 40]),
    }


def make_request_values(choose, between):
    stem = choose(STEMS)[: between(0, 60)]
    return {
        "prompt": [*stem, *(between(0, 49) for _ in range(between(0, 5)))] or [1],
        "max_tokens": choose([0, 1, 3, 12, 60]),
        "stop_ids": [between(0, 49) for _ in range(between(0, 2))],
        "min_tokens": choose([0, 0, 4]),
        "priority": choose([0, 0, 1, -2]),
        "cache_salt": choose([0, 0, 9]),
        **choose([{}, {}, {"prompt_logprobs": 1}, {"presence_penalty": 1.0}]),
    }


class Pair:
    """The native scheduler and the reference, given the same calls and compared after each."""

    def __init__(self, config) -> None:
        self.sim = Sim(**config)
        self.model = ReferenceScheduler(self.sim.config)
        self.cancelled: list[int] = []

    def submit(self, prompt, **values) -> None:
        seq_id = self.sim.submit(prompt[: self.sim.config.max_len - 1], **values)
        if seq_id:
            assert self.model.submit(seq_id, self.sim.requests[seq_id], self.sim.now)
        else:
            assert self.model.num_queued >= self.sim.config.max_queue
        self.compare()

    def cancel(self, choice: int) -> None:
        seq_id = sorted(self.sim.requests)[choice % len(self.sim.requests)]
        self.sim.scheduler.cancel(seq_id)
        if seq_id not in self.sim.finish:
            self.model.cancel(seq_id)
            self.cancelled.append(seq_id)
        self.compare()

    def can_plan(self) -> bool:
        return len(self.sim.results) <= self.sim.is_ahead

    def plan(self) -> bool:
        self.sim.cancelled.update(self.cancelled)
        expected = self.model.plan(self.sim.now + self.sim.step_ns)
        planned = self.sim.plan()
        assert planned == (expected is not None)
        if expected:
            *described, left = expected
            plan = self.sim.scheduler.plan_struct
            assert plan.lane_waits == left
            self._check_plan(plan, self.sim.block, *described)
        self.compare()
        return planned

    def can_plan_lane(self) -> bool:
        return bool(self.sim.config.lane_tokens) and self.sim.lane_block is None

    def plan_lane(self, run_now: bool) -> bool:
        self.sim.cancelled.update(self.cancelled)
        expected = self.model.plan_lane(self.sim.now + self.sim.step_ns)
        planned = self.sim.plan_lane()
        assert planned == (expected is not None)
        if expected:
            self._check_plan(self.sim.scheduler.lane_struct, self.sim.lane_block, *expected)
            if run_now:
                self.sim.run_lane()
        self.compare()
        return planned

    def can_commit_lane(self) -> bool:
        older = any(
            step[0] < self.model.lane[0] for step in self.model.in_flight if self.model.lane
        )
        return self.sim.lane_block is not None and not older

    def commit_lane(self) -> None:
        self.sim.run_lane()
        self.model.commit_lane(self.sim.lane_result.tolist())
        self.sim.commit_lane()
        self.compare()

    def fail_lane(self) -> None:
        self.sim.fail_lane()
        self.model.fail_lane()
        self.compare()

    def _check_plan(self, plan, block, rows, num_out, num_in):
        assert (plan.num_copies_out, plan.num_copies_in) == (num_out, num_in)
        assert self._rows_of_block(plan, block) == [
            (first, count, [seq_id] * (scores + token))
            for seq_id, first, count, scores, token in rows
        ]
        assert plan.num_decode_rows == sum(
            is_decode_row(self.model.seqs[seq_id], first, count, token)
            for seq_id, first, count, _, token in rows
        )

    def _rows_of_block(self, plan, block):
        starts = self.sim.view("row_start", plan.num_rows + 1, block=block).tolist()
        contexts = self.sim.view("context_len", plan.num_rows, block=block).tolist()
        samples = self.sim.view("samples", plan.num_samples, SAMPLE_DTYPE, block)
        rows = []
        for row, context in enumerate(contexts):
            count = starts[row + 1] - starts[row]
            ids = samples["seq_id"][samples["row"] == row].tolist()
            rows.append((context - count, count, ids))
        return rows

    def commit(self) -> None:
        self.model.commit(self.sim.results[0].tolist())
        self.sim.commit()
        self.compare()

    def fail(self) -> None:
        self.sim.results.popleft()
        self.sim.scheduler.fail(self.sim.now)
        self.model.fail()
        self.compare()

    def compare(self) -> None:
        """Invariants: events, gauges and the native check of pages and references."""
        assert self.sim.drain() == self.model.events
        self.model.events = []
        self.sim.scheduler.check()
        stats, gauges = self.sim.scheduler.stats(), self.model.gauges()
        assert {name: stats[name] for name in gauges} == gauges

    def finish(self) -> None:
        """Everything ends in bounded steps, with the text it would have had alone."""
        bound = 100 + 20 * sum(len(t.tokens) for t in self.sim.truth.values())
        while (
            (self.can_plan() and self.plan()) or self.sim.results or self.sim.lane_block is not None
        ):
            bound -= 1
            assert bound > 0
            if self.can_plan_lane():
                self.plan_lane(bound % 2 == 0)
            elif self.sim.lane_block is not None and not self.sim.results:
                self.commit_lane()
                continue
            if not self.can_plan() or (self.sim.results and not self.plan()):
                self.commit()
        self.sim.finish_all()
        for seq_id, finish in self.sim.finish.items():
            if finish in (structs.KT_FINISH_STOP, structs.KT_FINISH_LENGTH):
                self.sim.check_text(seq_id)


class SchedulerMachine(RuleBasedStateMachine):
    pair: Pair | None = None

    @initialize(data=st.data())
    def create(self, data):
        values = make_values(
            lambda options: data.draw(st.sampled_from(options)),
            lambda low, high: data.draw(st.integers(low, high)),
        )
        self.pair = Pair(values)

    @rule(data=st.data())
    def submit(self, data):
        values = make_request_values(
            lambda options: data.draw(st.sampled_from(options)),
            lambda low, high: data.draw(st.integers(low, high)),
        )
        self.pair.submit(**values)

    @precondition(lambda self: self.pair and self.pair.sim.requests)
    @rule(choice=st.integers(0, 10**6))
    def cancel(self, choice):
        self.pair.cancel(choice)

    @precondition(lambda self: self.pair and self.pair.can_plan())
    @rule()
    def plan(self):
        self.pair.plan()

    @precondition(lambda self: self.pair and self.pair.sim.results)
    @rule()
    def commit(self):
        self.pair.commit()

    @precondition(lambda self: self.pair and self.pair.can_plan_lane())
    @rule(run_now=st.booleans())
    def plan_lane(self, run_now):
        self.pair.plan_lane(run_now)

    @precondition(lambda self: self.pair and self.pair.can_commit_lane())
    @rule()
    def commit_lane(self):
        self.pair.commit_lane()

    @precondition(lambda self: self.pair and self.pair.can_commit_lane())
    @rule()
    def fail_lane(self):
        self.pair.fail_lane()

    @rule(count=st.integers(1, 12))
    def turns(self, count):
        for _ in range(count):
            while not self.pair.can_plan():
                self.pair.commit()
            if not self.pair.plan() and self.pair.sim.results:
                self.pair.commit()

    @precondition(lambda self: self.pair and self.pair.sim.results)
    @rule()
    def fail(self):
        self.pair.fail()

    def teardown(self):
        if self.pair:
            self.pair.finish()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@pytest.mark.parametrize("seed", range(25))
def test_long_random_episodes(seed):
    rng = random.Random(seed)
    pair = Pair(make_values(rng.choice, rng.randint))
    for _ in range(250):
        names = [
            "submit",
            "cancel",
            "plan",
            "commit",
            "fail",
            "plan_lane",
            "commit_lane",
            "fail_lane",
        ]
        action = rng.choices(names, [16, 2, 40, 40, 0.3, 20, 8, 0.2])
        match action[0]:
            case "plan_lane" if pair.can_plan_lane():
                pair.plan_lane(rng.random() < 0.5)
            case "commit_lane" if pair.can_commit_lane():
                pair.commit_lane()
            case "fail_lane" if pair.can_commit_lane():
                pair.fail_lane()
            case "submit":
                pair.submit(**make_request_values(rng.choice, rng.randint))
            case "cancel" if pair.sim.requests:
                pair.cancel(rng.randint(0, 10**6))
            case "plan" if pair.can_plan():
                pair.plan()
            case "commit" if pair.sim.results:
                pair.commit()
            case "fail" if pair.sim.results:
                pair.fail()
    pair.finish()
