"""A stand-in for the engine: runs planned steps on a fake KV and checks all their metadata.

The fake model is a hash: the KV entry of position p is H(entry of p - 1, token), so an entry is right
only if its whole prefix was computed in these pages, and the next token is a function of the last
entry. Text therefore never depends on batching, preemption, sharing or page copies, unless the
scheduler is wrong about a page. Copies run at the latest moment that kt_sched_plan allows.
"""

from __future__ import annotations

import zlib
from collections import defaultdict, deque

import numpy as np

from kt_async.engine.types import GenerationRequest, SamplingParams
from kt_async.ffi import structs
from kt_async.ffi.scheduler import SAMPLE_DTYPE, Scheduler

VOCAB = 50


def mix(state: int, token: int) -> int:
    return zlib.crc32(token.to_bytes(4, "little"), state) or 1


def next_token(entry: int, vocab: int = VOCAB) -> int:
    return mix(entry, 12345) % vocab


def alone(prompt, count: int, vocab: int = VOCAB) -> list[int]:
    """The tokens that the fake model generates after a prompt when nobody else is there."""
    entry = 0
    for token in prompt:
        entry = mix(entry, token)
    output = []
    for _ in range(count):
        output.append(next_token(entry, vocab))
        entry = mix(entry, output[-1])
    return output


def make_config(**changes) -> structs.SchedConfig:
    values = {
        "max_batch_size": 8,
        "chunk_size": 32,
        "page_size": 4,
        "num_pages": 64,
        "max_len": 128,
        "max_queue": 1000,
        "max_samples": 64,
        "watermark_pages": -1,
        **changes,
    }
    return structs.sized(structs.SchedConfig, **values)


def make_request(prompt, max_tokens=8, **changes) -> GenerationRequest:
    request_fields = {"stop_ids", "min_tokens", "priority", "cache_salt"}
    own = {key: changes.pop(key) for key in list(changes) if key in request_fields}
    sampling = SamplingParams(**{"temperature": 0.0, **changes})
    return GenerationRequest("r", list(prompt), max_tokens, sampling, **own)


class Truth:
    """What the fake model computes for one request alone, as far as it can get."""

    def __init__(self, prompt, count: int) -> None:
        self.tokens = [*map(int, prompt)]
        self.entries = []
        for position in range(len(self.tokens) + count):
            if position == len(self.tokens):
                self.tokens.append(next_token(self.entries[-1]))
            before = self.entries[-1] if self.entries else 0
            self.entries.append(mix(before, self.tokens[position]))


class Sim:
    """A scheduler, its block, the fake KV, and everything the clients have received."""

    def __init__(self, **changes) -> None:
        self.config = make_config(**changes)
        self.is_ahead = bool(self.config.flags & structs.KT_SCHED_LOOKAHEAD)
        self.scheduler = Scheduler(self.config)
        self.block = np.zeros(self.scheduler.layout.num_bytes, np.uint8)
        self.kv = [0] * (self.config.num_pages * self.config.page_size)
        self.host_kv = [0] * (self.config.num_host_pages * self.config.page_size)
        self.requests: dict[int, GenerationRequest] = {}
        self.truth: dict[int, Truth] = {}
        self.output: dict[int, list[int]] = defaultdict(list)
        self.scores: dict[int, list[int]] = defaultdict(list)
        self.finish: dict[int, int] = {}
        self.num_cached: dict[int, int] = {}
        self.cancelled: set[int] = set()  # as of the last plan
        self.now = 1
        self.num_steps = 0
        self.num_lane_steps = 0
        self.step_ns = 1000
        self.results: deque[np.ndarray] = deque()  # run, not committed
        self.previous = np.zeros(0, np.int32)  # sampled by the step before
        self.rows: list[tuple[int, int, int]] = []  # (seq_id, first, count) of the last plan
        self.lane_block: np.ndarray | None = None  # of the lane step in flight
        self.lane_result: np.ndarray | None = None  # None while it has not run
        self._current = self.scheduler.plan_struct
        self._ids = iter(range(1, 10**9))

    def submit(self, prompt, max_tokens=8, **changes) -> int:
        """The id of a new request, 0 when the queue is full."""
        request = make_request(prompt, max_tokens, **changes)
        seq_id = next(self._ids)
        if not self.scheduler.submit(seq_id, request, self.now):
            return 0
        self.requests[seq_id] = request
        room = min(max_tokens, self.config.max_len - len(request.prompt_ids))
        self.truth[seq_id] = Truth(request.prompt_ids, room + 1)
        return seq_id

    def view(self, name: str, count: int, dtype=np.int32, block=None) -> np.ndarray:
        start = getattr(self.scheduler.layout, name)
        block = self.block if block is None else block
        return block[start : start + count * np.dtype(dtype).itemsize].view(dtype)

    def plan(self) -> bool:
        """Plan and run a step; its result waits for commit()."""
        self.now += self.step_ns
        self.block[:] = 0xEE  # whatever the scheduler does not write is visibly wrong
        if not self.scheduler.plan(self.now, self.block.ctypes.data):
            return False
        self._current = self.scheduler.plan_struct
        self._move_pages()
        self.previous = self._run()
        self.results.append(self.previous)
        self._finish_copies()
        self.num_steps += 1
        return True

    def plan_lane(self) -> bool:
        """Plan a lane step and move its pages; run_lane() may follow at any time."""
        self.now += self.step_ns
        block = np.full(self.scheduler.layout.num_bytes, 0xEE, np.uint8)
        if not self.scheduler.plan_lane(self.now, block.ctypes.data):
            return False
        self.lane_block = block
        self.num_lane_steps += 1
        self._as_lane(self._move_pages)
        self._as_lane(self._finish_copies)
        return True

    def run_lane(self) -> None:
        if self.lane_result is None:
            self.lane_result = self._as_lane(self._run)

    def commit_lane(self) -> None:
        self.run_lane()
        tokens, self.lane_result, self.lane_block = self.lane_result, None, None
        assert tokens is not None
        self.now += self.step_ns
        self.scheduler.commit_lane(self.now, tokens.ctypes.data, len(tokens))

    def fail_lane(self) -> None:
        self.lane_result = self.lane_block = None
        self.scheduler.fail_lane(self.now)

    def _as_lane(self, call):
        block, current = self.block, self._current
        assert self.lane_block is not None
        self.block, self._current = self.lane_block, self.scheduler.lane_struct
        try:
            return call()
        finally:
            self.block, self._current = block, current

    def commit(self) -> None:
        tokens = self.results.popleft()
        self.now += self.step_ns
        self.scheduler.commit(self.now, tokens.ctypes.data, len(tokens))

    def step(self) -> bool:
        """One turn of the engine; False when there is nothing left to do."""
        if self.config.lane_tokens and self.lane_block is None:
            self.plan_lane()
        while len(self.results) > self.is_ahead:
            self.commit()
            self.drain()
        planned = self.plan()
        if self.results and (len(self.results) > 1 or not planned or not self.is_ahead):
            self.commit()
            planned = True
        lane_is_due = self.lane_block is not None and not self.results
        if lane_is_due and (not planned or self.num_steps % 3 == 0):
            self.commit_lane()
            planned = True
        self.drain()
        return planned

    def _move_pages(self) -> None:
        """What has to happen before the step: pages leave, places of coming ones are unusable."""
        for page, host_page in self._copies("copies_out", self._current.num_copies_out):
            self.host_kv[self._span(host_page)] = self.kv[self._span(page)]
        for page, _ in self._copies("copies_in", self._current.num_copies_in):
            self.kv[self._span(page)] = [0] * self.config.page_size

    def _finish_copies(self) -> None:
        for page, host_page in self._copies("copies_in", self._current.num_copies_in):
            self.kv[self._span(page)] = self.host_kv[self._span(host_page)]

    def _run(self) -> np.ndarray:
        """Check the planned step, write its KV, and return its sampled tokens."""
        plan = self._current
        last = "page_ids", plan.num_page_ids
        if plan.num_history or plan.num_bias:
            last = (
                ("history_counts", plan.num_history)
                if plan.num_history
                else ("bias_values", plan.num_bias)
            )
        assert plan.used_bytes == getattr(self.scheduler.layout, last[0]) + 4 * last[1]
        assert plan.num_rows <= self.config.max_batch_size
        assert plan.num_tokens <= max(self.config.chunk_size, self.config.max_batch_size)
        assert plan.num_samples <= self.config.max_samples
        kv_slot = self.view("kv_slot", plan.num_tokens).tolist()
        assert len(set(kv_slot)) == plan.num_tokens, "two tokens share a place"
        self._run_rows()
        samples = self.view("samples", plan.num_samples, SAMPLE_DTYPE)
        for row in range(plan.num_decode_rows):
            assert samples[row]["row"] == row
            assert samples[row]["target"] == -1
        return np.array([self._sample(sample) for sample in samples], np.int32)

    def _copies(self, name: str, count: int) -> list[list[int]]:
        copies = self.view(name, 2 * count).reshape(-1, 2).tolist()
        assert len({page for page, _ in copies}) == count
        assert len({host_page for _, host_page in copies}) == count
        return copies

    def _span(self, page: int) -> slice:
        return slice(page * self.config.page_size, (page + 1) * self.config.page_size)

    def _run_rows(self) -> None:
        """Check indptrs, page lists and positions; write the KV of every token."""
        plan, page_size = self._current, self.config.page_size
        total, rows = plan.num_tokens, plan.num_rows
        tokens = self.view("tokens", total).tolist()
        positions = self.view("positions", total).tolist()
        token_row = self.view("token_row", total).tolist()
        kv_slot = self.view("kv_slot", total).tolist()
        row_start = self.view("row_start", rows + 1).tolist()
        context_len = self.view("context_len", rows).tolist()
        page_start = self.view("page_start", rows + 1).tolist()
        last_page_len = self.view("last_page_len", rows).tolist()
        page_ids = self.view("page_ids", plan.num_page_ids).tolist()
        assert (row_start[0], row_start[-1]) == (0, total)
        assert (page_start[0], page_start[-1]) == (0, len(page_ids))
        for row, context in enumerate(context_len):
            begin, end = row_start[row], row_start[row + 1]
            assert end > begin
            assert end == begin + 1 or row >= plan.num_decode_rows
            pages = page_ids[page_start[row] : page_start[row + 1]]
            first = context - (end - begin)
            assert len(set(pages)) == len(pages) == -(-context // page_size)
            assert last_page_len[row] == context - (len(pages) - 1) * page_size
            assert positions[begin:end] == list(range(first, context))
            assert token_row[begin:end] == [row] * (end - begin)
            slots = [pages[p // page_size] * page_size + p % page_size for p in range(context)]
            assert kv_slot[begin:end] == slots[first:]
            entry = self.kv[slots[first - 1]] if first else 0
            for token, slot in zip(tokens[begin:end], slots[first:], strict=True):
                value = token if token >= 0 else int(self.previous[-1 - token])
                assert token >= 0 or self.is_ahead
                entry = mix(entry, value)
                self.kv[slot] = entry

    def _sample(self, sample: np.void) -> int:
        plan = self._current
        at = int(sample["token_index"])
        position = int(self.view("positions", plan.num_tokens)[at])
        entry = self.kv[int(self.view("kv_slot", plan.num_tokens)[at])]
        seq_id, target = int(sample["seq_id"]), int(sample["target"])
        assert seq_id not in self.finish or self.is_ahead, "a sequence was planned after its end"
        in_lane = plan is self.scheduler.lane_struct  # was planned before it was cancelled
        assert in_lane or seq_id not in self.cancelled, "a cancelled sequence was planned"
        assert self.view("token_row", plan.num_tokens)[at] == sample["row"]
        self._check_prompt(int(sample["row"]), seq_id)
        truth = self.truth[seq_id]
        assert entry == truth.entries[position], f"sequence {seq_id} does not see its own text"
        if target >= 0:
            assert target == truth.tokens[position + 1]
            assert sample["num_logprobs"] == self.requests[seq_id].sampling.prompt_logprobs
            return target
        self._check_sample(sample, seq_id, position)
        return next_token(entry)

    def _check_prompt(self, row: int, seq_id: int) -> None:
        """How many of a row's tokens belong to the prompt, also when generated ones run again."""
        begin, end = self.view("row_start", row + 2)[row:].tolist()
        first = int(self.view("positions", end)[begin])
        left = len(self.requests[seq_id].prompt_ids) - first
        assert self.view("num_prompt", row + 1)[row] == min(max(left, 0), end - begin)

    def _check_sample(self, sample: np.void, seq_id: int, position: int) -> None:
        request, truth = self.requests[seq_id], self.truth[seq_id]
        prompt_len = len(request.prompt_ids)
        num_generated = position + 1 - prompt_len
        assert sample["position"] == num_generated
        assert len(self.output[seq_id]) <= num_generated <= len(self.output[seq_id]) + 1
        assert num_generated < request.max_tokens
        assert sample["seed"] == request.sampling.seed
        for name in ("top_k", "num_logprobs"):
            assert sample[name] == getattr(request.sampling, name)
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            assert np.float32(getattr(request.sampling, name)) == sample[name]
        start, count = int(sample["bias_start"]), int(sample["bias_count"])
        ids = self.view("bias_ids", start + count)[start:].tolist()
        values = self.view("bias_values", start + count, np.float32)[start:].tolist()
        assert dict(zip(ids, values, strict=True)) == dict(request.sampling.logit_bias)
        start, count = int(sample["history_start"]), int(sample["history_count"])
        ids = self.view("history_ids", start + count)[start:].tolist()
        counts = self.view("history_counts", start + count)[start:].tolist()
        expected = {}
        if (
            request.sampling.presence_penalty
            or request.sampling.frequency_penalty
            or request.sampling.repetition_penalty != 1.0
        ):
            seen = truth.tokens[: position + 1]
            expected = {token: seen[prompt_len:].count(token) for token in set(seen)}
        assert dict(zip(ids, counts, strict=True)) == expected
        assert len(ids) == len(expected)

    def drain(self) -> list[tuple]:
        events = self.scheduler.drain().tolist()
        for seq_id, kind, finish, token, token_pos, _row, num_cached, admit_ns in events:
            assert seq_id not in self.finish, "an event after the end"
            truth = self.truth[seq_id].tokens
            prompt_len = len(self.requests[seq_id].prompt_ids)
            self.num_cached[seq_id] = num_cached
            if kind == structs.KT_EVENT_TOKEN:
                assert token_pos == prompt_len + len(self.output[seq_id])
                assert token == truth[token_pos]
                self.output[seq_id].append(token)
                assert 0 < admit_ns <= self.now
            elif kind == structs.KT_EVENT_PROMPT_LOGPROB:
                assert token_pos == 1 + len(self.scores[seq_id])
                assert token == truth[token_pos]
                self.scores[seq_id].append(token)
            else:
                assert kind == structs.KT_EVENT_FINISH
                self.finish[seq_id] = finish
        return events

    def finish_all(self, limit: int = 10_000) -> None:
        for _ in range(limit):
            if not self.step():
                break
        assert self.requests.keys() == self.finish.keys()
        self.scheduler.check()
        stats = self.scheduler.stats()
        assert stats["num_running"] == stats["num_waiting"] == stats["pages_used"] == 0
        assert stats["pages_free"] + stats["pages_cached"] == stats["pages_total"]

    def check_text(self, seq_id: int) -> None:
        """Output is exactly what the request alone would have given."""
        request, truth = self.requests[seq_id], self.truth[seq_id].tokens
        prompt_len = len(request.prompt_ids)
        room = min(request.max_tokens, self.config.max_len - prompt_len)
        expected = truth[prompt_len : prompt_len + room]
        reason = structs.KT_FINISH_LENGTH
        for count, token in enumerate(expected, 1):
            if token in request.stop_ids and count >= request.min_tokens:
                expected, reason = expected[:count], structs.KT_FINISH_STOP
                break
        assert self.finish[seq_id] == reason
        assert self.output[seq_id] == expected
        if request.sampling.prompt_logprobs >= 0:
            assert self.scores[seq_id] == truth[1:prompt_len]
