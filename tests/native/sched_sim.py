"""A stand-in for the engine: runs planned steps on a fake KV and checks all their metadata.

The fake model is a hash: the KV entry of position p is H(entry of p - 1, token), so an entry is right
only if its whole prefix was computed in these pages, and the next token is a function of the last
entry. Text therefore never depends on batching, preemption or sharing, unless the scheduler is
wrong about a page.
"""

from __future__ import annotations

import zlib
from collections import defaultdict

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


class Sim:
    """A scheduler, its block, the fake KV, and everything the clients have received."""

    def __init__(self, **changes) -> None:
        self.config = make_config(**changes)
        self.scheduler = Scheduler(self.config)
        self.block = np.zeros(self.scheduler.layout.num_bytes, np.uint8)
        self.kv = [0] * (self.config.num_pages * self.config.page_size)
        self.requests: dict[int, GenerationRequest] = {}
        self.output: dict[int, list[int]] = defaultdict(list)
        self.scores: dict[int, list[int]] = defaultdict(list)
        self.finish: dict[int, int] = {}
        self.num_cached: dict[int, int] = {}
        self.now = 1
        self.num_steps = 0
        self._ids = iter(range(1, 10**9))

    def submit(self, prompt, max_tokens=8, **changes) -> int:
        request = make_request(prompt, max_tokens, **changes)
        seq_id = next(self._ids)
        self.requests[seq_id] = request
        if not self.scheduler.submit(seq_id, request, self.now):
            del self.requests[seq_id]
            return 0
        return seq_id

    def view(self, name: str, count: int, dtype=np.int32) -> np.ndarray:
        start = getattr(self.scheduler.layout, name)
        return self.block[start : start + count * np.dtype(dtype).itemsize].view(dtype)

    def plan(self) -> bool:
        self.now += 1000
        self.block[:] = 0xEE  # whatever the scheduler does not write is visibly wrong
        return self.scheduler.plan(self.now, self.block.ctypes.data)

    def run(self) -> np.ndarray:
        """Check the planned step, write its KV, and return its sampled tokens."""
        plan = self.scheduler.plan_struct
        assert plan.used_bytes == self.scheduler.layout.page_ids + 4 * plan.num_page_ids
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

    def _run_rows(self) -> None:
        """Check indptrs, page lists and positions; write the KV of every token."""
        plan, page_size = self.scheduler.plan_struct, self.config.page_size
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
                entry = mix(entry, token)
                self.kv[slot] = entry

    def _sample(self, sample: np.void) -> int:
        plan = self.scheduler.plan_struct
        at = int(sample["token_index"])
        position = int(self.view("positions", plan.num_tokens)[at])
        entry = self.kv[int(self.view("kv_slot", plan.num_tokens)[at])]
        seq_id, target = int(sample["seq_id"]), int(sample["target"])
        assert self.view("token_row", plan.num_tokens)[at] == sample["row"]
        text = [*self.requests[seq_id].prompt_ids, *self.output[seq_id]][: position + 1]
        expected = 0
        for token in text:
            expected = mix(expected, int(token))
        assert entry == expected, f"sequence {seq_id} does not see its own text"
        if target >= 0:
            assert target == self.requests[seq_id].prompt_ids[position + 1]
            return target
        self._check_sample(sample, seq_id, position)
        return next_token(entry)

    def _check_sample(self, sample: np.void, seq_id: int, position: int) -> None:
        request = self.requests[seq_id]
        generated = self.output[seq_id]
        assert position == len(request.prompt_ids) + len(generated) - 1
        assert sample["position"] == len(generated)
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
        has_penalty = (
            request.sampling.presence_penalty
            or request.sampling.frequency_penalty
            or request.sampling.repetition_penalty != 1.0
        )
        expected = {}
        if has_penalty:
            expected = {t: generated.count(t) for t in {*request.prompt_ids, *generated}}
        assert dict(zip(ids, counts, strict=True)) == expected
        assert len(ids) == len(expected)

    def drain(self) -> list[tuple]:
        events = self.scheduler.drain().tolist()
        for seq_id, kind, finish, token, token_pos, _row, num_cached, admit_ns in events:
            assert seq_id not in self.finish, "an event after the end"
            request = self.requests[seq_id]
            if kind == structs.KT_EVENT_TOKEN:
                assert token_pos == len(request.prompt_ids) + len(self.output[seq_id])
                self.output[seq_id].append(token)
                assert 0 < admit_ns <= self.now
                self.num_cached[seq_id] = num_cached
            elif kind == structs.KT_EVENT_PROMPT_LOGPROB:
                assert token_pos == 1 + len(self.scores[seq_id])
                assert token == request.prompt_ids[token_pos]
                self.scores[seq_id].append(token)
            else:
                assert kind == structs.KT_EVENT_FINISH
                self.finish[seq_id] = finish
                self.num_cached[seq_id] = num_cached
        return events

    def step(self) -> bool:
        """One whole step; False when there was nothing to run."""
        planned = self.plan()
        if planned:
            tokens = self.run()
            self.now += 1000
            self.scheduler.commit(self.now, tokens.ctypes.data, len(tokens))
            self.num_steps += 1
        self.drain()
        return planned

    def finish_all(self, limit: int = 10_000) -> None:
        for _ in range(limit):
            if not self.step():
                break
        assert self.requests.keys() == self.finish.keys()
        stats = self.scheduler.stats()
        assert stats["num_running"] == stats["num_waiting"] == stats["pages_used"] == 0
        assert stats["pages_free"] + stats["pages_cached"] == stats["pages_total"]

    def check_text(self, seq_id: int) -> None:
        """Output is exactly what the request alone would have given."""
        request = self.requests[seq_id]
        room = min(request.max_tokens, self.config.max_len - len(request.prompt_ids))
        expected = alone(request.prompt_ids, room)
        for count, token in enumerate(expected, 1):
            if token in request.stop_ids and count >= request.min_tokens:
                expected = expected[:count]
                assert self.finish[seq_id] == structs.KT_FINISH_STOP
                break
        else:
            assert self.finish[seq_id] == structs.KT_FINISH_LENGTH
        assert self.output[seq_id] == expected
