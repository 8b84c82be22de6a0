"""Run a scheduler journal (native/src/sched/journal.h) again and compare the digest of every plan.

A journal file is the JSON of the scheduler's configuration on the first line, then the journal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench.errors import BenchError
from kt_async.engine.types import GenerationRequest, SamplingParams
from kt_async.ffi import structs
from kt_async.ffi.scheduler import Scheduler

_CONFIG_FIELDS = [field[0] for field in structs.SchedConfig._fields_ if field[0] != "struct_size"]


def write_header(config: structs.SchedConfig) -> str:
    """First line of a journal file."""
    return json.dumps({name: getattr(config, name) for name in _CONFIG_FIELDS}) + "\n"


def read_config(line: str) -> structs.SchedConfig:
    """The configuration of the first line, with the journal switched on."""
    try:
        values = json.loads(line)
        config = structs.sized(structs.SchedConfig, **values)
    except (ValueError, TypeError) as error:
        raise BenchError(f"the first line is not a scheduler configuration: {error}") from None
    config.flags |= structs.KT_SCHED_JOURNAL
    return config


def _request(fields: list[int]) -> GenerationRequest:
    _, seed, salt, max_tokens, min_tokens, priority, scores, has_penalty, num_stop = fields[:9]
    stop_ids, rest = fields[9 : 9 + num_stop], fields[9 + num_stop :]
    prompt = rest[1 : 1 + rest[0]]
    sampling = SamplingParams(
        seed=seed, prompt_logprobs=scores, presence_penalty=float(has_penalty)
    )
    return GenerationRequest(
        "replay",
        prompt,
        max_tokens,
        sampling,
        stop_ids=stop_ids,
        min_tokens=min_tokens,
        priority=priority,
        cache_salt=salt,
    )


class Replay:
    """Feeds journal lines to a scheduler of its own; `calls` counts them by name."""

    def __init__(self, config: structs.SchedConfig) -> None:
        self.scheduler = Scheduler(config)
        self._block = np.zeros(self.scheduler.layout.num_bytes, np.uint8)
        self.calls: dict[str, int] = {}

    def feed(self, line: str) -> None:
        """Make the call again. The scheduler's own journal then has the line it should."""
        name, *words = line.split()
        self.calls[name] = self.calls.get(name, 0) + 1
        if name == "submit":
            fields = [int(word) for word in words]
            if not self.scheduler.submit(fields[1], _request(fields[1:]), fields[0]):
                raise BenchError("the queue is full; the journal is not complete")
        elif name == "cancel":
            self.scheduler.cancel(int(words[0]))
        elif name in ("plan", "lane_plan"):
            lane = name == "lane_plan"
            plan = self.scheduler.plan_lane if lane else self.scheduler.plan
            plan(int(words[0]), self._block.ctypes.data)
        elif name in ("commit", "lane_commit"):
            tokens = np.array([int(word) for word in words[2:]], np.int32)
            lane = name == "lane_commit"
            commit = self.scheduler.commit_lane if lane else self.scheduler.commit
            commit(int(words[0]), tokens.ctypes.data, len(tokens))
        elif name in ("fail", "lane_fail"):
            (self.scheduler.fail_lane if name == "lane_fail" else self.scheduler.fail)(
                int(words[0])
            )
        else:
            raise BenchError(f"the journal ends early: {name!r}")
        if name not in ("submit", "cancel"):
            self.scheduler.drain()

    def recorded(self) -> Iterator[str]:
        """Lines that the replaying scheduler has recorded since the last call."""
        text = b""
        while piece := self.scheduler.journal():
            text += piece
        yield from text.decode().splitlines()


def replay(text: str) -> tuple[dict[str, int], str | None]:
    """Calls by name, and the first line that came out differently (None: all are equal)."""
    header, _, body = text.partition("\n")
    run = Replay(read_config(header))
    expected: list[str] = []
    for line in body.splitlines():
        run.feed(line)
        expected.append(line)
        if line.startswith(("plan", "lane_plan")):
            for was, now in zip(expected, run.recorded(), strict=True):
                if was != now:
                    return run.calls, f"recorded {was!r}, now {now!r}"
            expected.clear()
    return run.calls, None


def main(path: Path) -> int:
    """Command line part of bench/scheduler.py --replay."""
    try:
        calls, difference = replay(path.read_text(encoding="ascii"))
    except (BenchError, OSError, UnicodeDecodeError) as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 2
    print(", ".join(f"{count} {name}" for name, count in calls.items()))
    if difference:
        print(f"the schedule differs: {difference}")
        return 1
    print("every plan is the same, bit by bit")
    return 0
