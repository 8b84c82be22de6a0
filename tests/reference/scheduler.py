"""The scheduler's rules in plain Python: slow, without page ids, hashes or a block.

It predicts every plan (rows in order, page copies), every event and every gauge of the native
scheduler. A cached page is named by its salt and all tokens up to its end; lists stand for the
lists by age. The adaptive prefill budget is not modelled.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kt_async.ffi import structs as kt

FLAG_CACHE, FLAG_AHEAD = kt.KT_SCHED_PREFIX_CACHE, kt.KT_SCHED_LOOKAHEAD


@dataclass
class Seq:
    seq_id: int
    tokens: list[int]
    prompt_len: int
    max_tokens: int
    stop_ids: frozenset[int]
    min_tokens: int
    scores: bool  # prompt log-probabilities wanted
    penalty: bool
    salt: int
    submit_ns: int
    key: tuple[int, int]
    admit_ns: int = 0
    pages: int = 0
    nodes: list = field(default_factory=list)
    planned: int = 0
    pending: int = 0
    cached: int = 0
    scored: int = 0
    admissions: int = 0
    running: bool = False
    ready: int = 0
    in_lane: bool = False
    lane_end: int = 0

    @property
    def remaining(self):
        return len(self.tokens) + self.pending - self.planned

    @property
    def generated(self):
        return len(self.tokens) - self.prompt_len

    @property
    def decoding(self):
        return self.remaining == 1 and self.max_tokens > 0


def is_decode_row(seq, first, count, has_token):
    """One generated token, whose row comes before those of prompts."""
    return count == 1 and has_token and first >= seq.prompt_len


@dataclass
class Node:
    refs: int = 0
    on_host: bool = False
    ready: int = 0


class ReferenceScheduler:
    def __init__(self, config):
        self.c = config
        self.free, self.host_free, self.host_freed = config.num_pages, config.num_host_pages, 0
        self.watermark = config.watermark_pages
        if self.watermark < 0:
            self.watermark = max(1, config.num_pages // 100)
        self.cache: dict[tuple, Node] = {}
        self.idle: list[tuple] = []  # device pages nobody uses, longest idle first
        self.host_idle: list[tuple] = []
        self.seqs: dict[int, Seq] = {}
        self.inbox: list = []
        self.in_flight: list[tuple[int, list, bool]] = []
        self.lane: tuple[int, list, bool] | None = None
        self.lane_blocks_pages = self.in_lane = False
        self.events: list[tuple] = []
        self.plan_id, self.arrivals, self.last_ns = 0, 0, -(2**62)
        self.num_queued = self.preempted = 0

    # ---- calls ----

    def submit(self, seq_id, request, now):
        if self.num_queued >= self.c.max_queue:
            return False
        self.num_queued += 1
        self.inbox.append((seq_id, request, now))
        return True

    def cancel(self, seq_id):
        self.inbox.append((seq_id, None, 0))

    def plan(self, now):
        """None when idle, else (rows [(seq_id, first, count, scores, has_token)], outs, ins, left).

        left: prompt tokens wait for the lane.
        """
        self._begin(now)
        self.lane_blocks_pages = False
        for seq in self._running():
            # An earlier turn of this loop may have preempted it.
            may_run = seq.running and seq.decoding and self._may_run(seq)
            if may_run and self._reserve(seq, seq.planned + 1, True):
                self._add_row(seq, 1)
        left = bool(self.lane or (self.rows and self._lane_is_worth_it()))
        if not left:
            self._prefill(now)
        step = self._end()
        if step is None:
            return None
        self.in_flight.append(step)
        return (*self._described(step), left and not self.lane)

    def plan_lane(self, now):
        """The same for the lane, without `left`."""
        self._begin(now)
        decoding = any(seq.decoding for seq in self._running())
        if not decoding or self.lane_blocks_pages or not self._lane_is_worth_it():
            return None
        self.in_lane = True
        self._prefill(now)
        self.in_lane = False
        self.lane = self._end()
        if self.lane is None:
            return None
        for row in self.lane[1]:
            row[0].in_lane = True
        return self._described(self.lane)

    def _begin(self, now):
        self._take_inbox()
        self.plan_id += 1
        self.host_free, self.host_freed = self.host_free + self.host_freed, 0
        self.outs, self.ins = [], 0
        self._expire(now)
        self.rows = []
        self.tokens_left = max(self.c.chunk_size, self.c.max_batch_size)
        self.samples_left = self.c.max_samples

    def _prefill(self, now):
        for seq in self._running():
            if self.tokens_left and seq.running and not seq.decoding and self._may_run(seq):
                self._chunk(seq)
        self._admit(now)

    def _end(self):
        has_copies = bool(self.outs or self.ins)
        if not self.rows and not has_copies:
            return None
        rows = sorted(self.rows, key=lambda row: not is_decode_row(*row[:3], row[4]))
        for seq, first, count, scores, has_token, _ in rows:
            seq.planned = first + count
            if scores:
                seq.scored = max(first, seq.scored) + scores
            seq.pending += has_token
        return self.plan_id, rows, has_copies

    def _described(self, step):
        return [(r[0].seq_id, *r[1:5]) for r in step[1]], len(self.outs), self.ins

    def _lane_is_worth_it(self):
        if not self.c.lane_tokens:
            return False
        single = self.c.policy == kt.KT_SCHED_FCFS_SINGLE_PREFILL
        prefills = [s for s in self._running() if s.remaining > 0 and not s.decoding]
        waiting = self._waiting()[: self.c.max_batch_size - len(self._running())]
        waiting = [] if single and prefills else waiting[:1] if single else waiting
        count = sum(s.remaining for s in prefills) + sum(len(s.tokens) for s in waiting)
        count -= len(self._match(waiting[0])) * self.c.page_size if waiting else 0
        return count >= self.c.lane_tokens

    def commit_lane(self, tokens):
        (_, rows, _), self.lane = self.lane, None
        sample = 0
        for row in rows:
            seq, first, count, scores, has_token, _ = row
            seq.in_lane = False
            if not seq.lane_end:
                self._commit_row(row, tokens, sample)
            else:
                if seq.lane_end == kt.KT_FINISH_CANCELLED:
                    self._share(seq, first + count)
                self._finish(seq, seq.lane_end)
            sample += scores + has_token

    def fail_lane(self):
        step, self.lane = self.lane, None
        for row in step[1]:
            row[0].in_lane = False
        self._fail(step)

    def commit(self, tokens):
        sample = 0
        for row in self.in_flight[0][1]:
            self._commit_row(row, tokens, sample)
            sample += row[3] + row[4]
        self.in_flight.pop(0)

    def _commit_row(self, row, tokens, sample):
        seq, first, count, scores, has_token, admission = row
        if self.seqs.get(seq.seq_id) is not seq or seq.lane_end:
            return
        end = min(first + count, seq.prompt_len - 1)
        for position in range(end - scores, end):
            token = seq.tokens[position + 1]
            self._emit(seq, kt.KT_EVENT_PROMPT_LOGPROB, 0, token, position + 1, sample)
            sample += 1
        has_pages = seq.running and seq.admissions == admission
        if has_pages and not seq.in_lane:
            self._share(seq, first + count)
        if has_token:
            self._append(seq, tokens[sample], sample)
        elif has_pages and seq.max_tokens == 0 and first + count == seq.prompt_len:
            self._finish(seq, kt.KT_FINISH_LENGTH)

    def fail(self):
        self._fail(self.in_flight.pop(0))

    def _fail(self, step):
        plan_id, rows, has_copies = step
        for row in rows:
            if self.seqs.get(row[0].seq_id) is row[0]:
                self._end_seq(row[0], row[0].lane_end or kt.KT_FINISH_ERROR)
        if has_copies:
            for seq in self._running():
                if seq.ready > plan_id:
                    self._end_seq(seq, kt.KT_FINISH_ERROR)
            self.free += len(self.idle)
            self.host_free += len(self.host_idle)
            for key in self.idle + self.host_idle:
                del self.cache[key]
            self.idle, self.host_idle = [], []

    # ---- queue ----

    def _running(self):
        return sorted((s for s in self.seqs.values() if s.running), key=lambda s: s.key)

    def _waiting(self):
        return sorted((s for s in self.seqs.values() if not s.running), key=lambda s: s.key)

    def _take_inbox(self):
        for seq_id, r, now in self.inbox:
            if r is None:
                if seq_id in self.seqs:
                    self._end_seq(self.seqs[seq_id], kt.KT_FINISH_CANCELLED)
                continue
            self.last_ns = max(self.last_ns, now)
            key = (self.last_ns - r.priority * self.c.priority_step_ns, self.arrivals)
            self.arrivals += 1
            self.seqs[seq_id] = Seq(
                seq_id,
                list(r.prompt_ids),
                len(r.prompt_ids),
                r.max_tokens,
                frozenset(r.stop_ids),
                r.min_tokens,
                r.sampling.prompt_logprobs >= 0,
                r.sampling.presence_penalty != 0,
                r.cache_salt,
                self.last_ns,
                key,
            )
        self.inbox = []

    def _expire(self, now):
        if self.c.queue_timeout_ns:
            for seq in sorted(self._waiting(), key=lambda s: s.key[1]):
                if seq.admissions == 0 and now - seq.submit_ns > self.c.queue_timeout_ns:
                    self._finish(seq, kt.KT_FINISH_TIMEOUT)

    def _may_run(self, seq):
        if seq.in_lane:
            return False
        if seq.pending:
            ends = seq.generated + seq.pending >= seq.max_tokens
            if seq.penalty or ends or len(seq.tokens) + seq.pending >= self.c.max_len:
                return False
        return seq.remaining > 0 and seq.ready <= self.plan_id

    def _admit(self, now):
        promised = sum(max(0, self._pages(s) - s.pages) for s in self._running())
        prefilling = any(s.remaining > 0 and not s.decoding for s in self._running())
        while self.tokens_left:
            waiting, running = self._waiting(), self._running()
            if not waiting or len(running) >= self.c.max_batch_size:
                return
            if prefilling and self.c.policy == kt.KT_SCHED_FCFS_SINGLE_PREFILL:
                return
            seq, spare = waiting[0], self.free + len(self.idle)
            reserve = promised + (self.watermark if running else 0)
            cached = self._match(seq)
            used = sum(1 for key in cached if self.cache[key].refs and not self.cache[key].on_host)
            if seq.pending or spare <= reserve or spare < self._pages(seq) - used + reserve:
                return
            seq.running, seq.ready, seq.admissions = True, 0, seq.admissions + 1
            if seq.admissions == 1:
                seq.admit_ns = now
                self.num_queued -= 1
            for key in cached:
                self._acquire(key)
            for key in cached:
                if self.cache[key].on_host:
                    self._take_page()
                    self.cache[key].on_host, self.cache[key].ready = False, self.plan_id + 1
                    self.ins += 1
                    self.host_freed += 1
                self._use(seq, key)
            if self._may_run(seq):
                self._chunk(seq)
            promised += self._pages(seq) - seq.pages
            prefilling = True

    def _chunk(self, seq):
        page = self.c.page_size
        for key in self._keys(seq)[len(seq.nodes) :]:
            node = self.cache.get(key)
            own = len(seq.nodes) == seq.pages and seq.planned == seq.pages * page
            if not own or node is None or node.on_host or node.ready > self.plan_id:
                break
            self._acquire(key)
            self._use(seq, key)
        count = min(seq.remaining, self.tokens_left)
        while count and self._samples(seq, count) > self.samples_left:
            count -= 1
        if count and not self._reserve(seq, seq.planned + count, False):
            stuck = not self.rows and not self.in_flight and not self.in_lane
            if stuck and not self._reserve(seq, seq.planned + 1, True):
                return
            count = min(count, seq.pages * page - seq.planned)
        if count > 0:
            self._add_row(seq, count)

    def _scores(self, seq, count):
        if not seq.scores:
            return 0
        end = min(seq.planned + count, seq.prompt_len - 1)
        return max(0, end - max(seq.planned, seq.scored))

    def _samples(self, seq, count):
        return self._scores(seq, count) + (count == seq.remaining and seq.max_tokens > 0)

    def _add_row(self, seq, count):
        scores = self._scores(seq, count)
        has_token = count == seq.remaining and seq.max_tokens > 0
        self.rows.append((seq, seq.planned, count, scores, has_token, seq.admissions))
        self.tokens_left -= count
        self.samples_left -= scores + has_token

    # ---- pages ----

    def _pages(self, seq):
        return -(-len(seq.tokens) // self.c.page_size)

    def _keys(self, seq):
        """Names of the pages that may come from the cache."""
        if not self.c.flags & FLAG_CACHE:
            return []
        last = len(seq.tokens) - 1
        if seq.scores and seq.scored < seq.prompt_len - 1:
            last = min(last, seq.scored)
        page = self.c.page_size
        ends = range(page, last + 1, page)
        return [(seq.salt, *seq.tokens[:end]) for end in ends]

    def _match(self, seq):
        keys = self._keys(seq)
        found = next((i for i, key in enumerate(keys) if key not in self.cache), len(keys))
        return keys[:found]

    def _acquire(self, key):
        node = self.cache[key]
        if node.refs == 0:
            (self.host_idle if node.on_host else self.idle).remove(key)
        node.refs += 1

    def _use(self, seq, key):
        seq.nodes.append(key)
        seq.pages += 1
        seq.planned += self.c.page_size
        seq.ready = max(seq.ready, self.cache[key].ready)
        seq.cached += self.c.page_size if seq.admissions == 1 else 0

    def _take_page(self):
        if self.free:
            self.free -= 1
            return True
        if not self.idle:
            return False
        key = self.idle[0]
        if self._take_host():
            self.cache[key].on_host = True
            self.host_idle.append(key)
            self.outs.append(key)
        else:
            del self.cache[key]
        self.idle.pop(0)
        return True

    def _take_host(self):
        if self.host_free:
            self.host_free -= 1
            return True
        if not self.host_idle:
            return False
        key = self.host_idle.pop(0)
        del self.cache[key]
        self.outs = [out for out in self.outs if out != key]
        return True

    def _reserve(self, seq, num_tokens, may_preempt):
        while seq.pages * self.c.page_size < num_tokens:
            if self._take_page():
                seq.pages += 1
                continue
            if not may_preempt:
                return False
            youngest = self._running()[-1]
            if youngest.in_lane:
                self.lane_blocks_pages = True
                return False
            self._release(youngest)
            youngest.running = False
            self.preempted += 1
            if youngest is seq:
                return False
        return True

    def _share(self, seq, num_computed):
        page = self.c.page_size
        while self.c.flags & FLAG_CACHE and (len(seq.nodes) + 1) * page <= num_computed:
            key = (seq.salt, *seq.tokens[: (len(seq.nodes) + 1) * page])
            if key not in self.cache:
                self.cache[key] = Node(refs=1)
            else:
                self._acquire(key)
                node = self.cache[key]
                if node.on_host:
                    node.on_host, node.ready = False, 0
                    self.host_free += 1
                else:
                    self.free += 1
                    seq.ready = max(seq.ready, node.ready)
            seq.nodes.append(key)

    def _release(self, seq):
        self.free += seq.pages - len(seq.nodes)
        for key in reversed(seq.nodes):
            self.cache[key].refs -= 1
            if self.cache[key].refs == 0:
                self.idle.append(key)
        seq.pages = seq.planned = 0
        seq.nodes = []

    # ---- ends ----

    def _append(self, seq, token, sample):
        seq.pending -= 1
        seq.tokens.append(token)
        reason = 0
        if token in seq.stop_ids and seq.generated >= seq.min_tokens:
            reason = kt.KT_FINISH_STOP
        elif seq.generated >= seq.max_tokens or len(seq.tokens) >= self.c.max_len:
            reason = kt.KT_FINISH_LENGTH
        self._emit(seq, kt.KT_EVENT_TOKEN, reason, token, len(seq.tokens) - 1, sample)
        if reason:
            self._finish(seq, reason)

    def _end_seq(self, seq, reason):
        if seq.in_lane:
            seq.lane_end = seq.lane_end or reason
        else:
            self._finish(seq, reason)

    def _finish(self, seq, reason):
        self._emit(seq, kt.KT_EVENT_FINISH, reason, -1, len(seq.tokens), -1)
        self._release(seq)
        self.num_queued -= seq.admissions == 0
        del self.seqs[seq.seq_id]

    def _emit(self, seq, kind, finish, token, position, sample):
        event = (seq.seq_id, kind, finish, token, position, sample, seq.cached, seq.admit_ns)
        self.events.append(event)

    def gauges(self):
        running = sum(s.running for s in self.seqs.values())
        return {
            "num_running": running,
            "num_waiting": self.num_queued + len(self.seqs) - running - self._num_queued_known(),
            "pages_free": self.free,
            "pages_cached": len(self.idle),
            "preempted": self.preempted,
            "host_pages_used": self.c.num_host_pages - self.host_free,
        }

    def _num_queued_known(self):
        return sum(s.admissions == 0 for s in self.seqs.values())
