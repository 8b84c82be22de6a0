"""Prometheus metrics in a registry of their own, named as vLLM names them under `kt_async:`.

The API observes requests and tokens [loop]; engine counters are read when somebody scrapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

PREFIX = "kt_async:"

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640)
_ITL = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
_TOKENS = (1, 4, 16, 64, 256, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)

# Names of Engine.stats() that have a customary name: (key, name, help, is_counter).
_KNOWN = (
    ("num_running", "num_requests_running", "Sequences in prefill or decode.", False),
    ("num_waiting", "num_requests_waiting", "Sequences in the queue.", False),
    ("preempted", "num_preemptions", "Sequences taken out to make room.", True),
    ("prefix_query_tokens", "prefix_cache_queries", "Prompt tokens looked up.", True),
    ("prefix_hit_tokens", "prefix_cache_hits", "Prompt tokens found in the cache.", True),
    ("steps", "engine_steps", "Steps of the engine.", True),
    ("prefill_tokens", "engine_prefill_tokens", "Prompt tokens computed.", True),
    ("decode_tokens", "engine_decode_tokens", "Tokens generated.", True),
    ("evicted_pages", "prefix_cache_evicted_pages", "Cached pages dropped.", True),
    ("rejected", "engine_requests_rejected", "Sequences refused by the scheduler.", True),
    ("submitted", "engine_requests_submitted", "Sequences accepted.", True),
    ("finished", "engine_requests_finished", "Sequences ended.", True),
    ("cancelled", "engine_requests_cancelled", "Sequences cancelled.", True),
    ("timed_out", "engine_requests_timed_out", "Sequences that waited too long.", True),
    ("copied_out_pages", "copied_out_pages", "Pages copied to host memory.", True),
    ("copied_in_pages", "copied_in_pages", "Pages copied back.", True),
    ("runner_steps", "runner_steps", "Steps that the model ran.", True),
)


class RequestTimes(NamedTuple):
    """What is observed when a request ends; times in seconds, None where it never got there."""

    prompt_tokens: int
    generated_tokens: int
    e2e_s: float
    queue_s: float | None
    prefill_s: float | None
    decode_s: float | None


class _EngineCollector(Collector):
    """Turns Engine.stats() into metrics at scrape time."""

    def __init__(self, stats: Callable[[], Mapping[str, float]]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = dict(self._stats())
        for key, name, text, is_counter in _KNOWN:
            if key not in stats:
                continue
            value = stats.pop(key)
            if is_counter:
                yield CounterMetricFamily(PREFIX + name, text, value=value)
            else:
                yield GaugeMetricFamily(PREFIX + name, text, value=value)
        total = stats.get("pages_total")
        if total:
            used = stats.get("pages_used", 0.0) / total
            yield GaugeMetricFamily(
                PREFIX + "kv_cache_usage_perc", "Share of KV pages in use, 0 to 1.", value=used
            )
        for key, value in sorted(stats.items()):
            yield GaugeMetricFamily(PREFIX + key, f"Engine statistic {key}.", value=value)


class Metrics:
    """All metrics of one server."""

    def __init__(self, stats: Callable[[], Mapping[str, float]]) -> None:
        """stats: Engine.stats, read at every scrape."""
        self.registry = CollectorRegistry()
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of ended requests.")
        self._generated = self._counter("generation_tokens", "Generated tokens of ended requests.")
        self._finished = self._counter(
            "request_success", "Ended choices by reason.", ("finished_reason",)
        )
        self._http = self._counter("http_responses", "HTTP responses.", ("status",))
        self.ttft = self._histogram(
            "time_to_first_token_seconds", "From the request to its first token.", _SECONDS
        )
        self.itl = self._histogram("inter_token_latency_seconds", "Gap between tokens.", _ITL)
        self._e2e = self._histogram("e2e_request_latency_seconds", "Whole request.", _SECONDS)
        self._queue = self._histogram("request_queue_time_seconds", "Time in the queue.", _SECONDS)
        self._prefill = self._histogram("request_prefill_time_seconds", "Prefill.", _SECONDS)
        self._decode = self._histogram("request_decode_time_seconds", "Decode.", _SECONDS)
        self._prompt_size = self._histogram("request_prompt_tokens", "Prompt length.", _TOKENS)
        self._output_size = self._histogram("request_generation_tokens", "Output length.", _TOKENS)
        self.registry.register(_EngineCollector(stats))

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, text, buckets=buckets, registry=self.registry)

    def count_response(self, status: int) -> None:
        """Count one HTTP response."""
        self._http.labels(str(status)).inc()

    def count_finish(self, reason: str) -> None:
        """Count the end of one choice: stop, length, abort or error."""
        self._finished.labels(reason).inc()

    def observe_request(self, times: RequestTimes) -> None:
        """Record an ended request."""
        self._prompt_tokens.inc(times.prompt_tokens)
        self._generated.inc(times.generated_tokens)
        self._prompt_size.observe(times.prompt_tokens)
        self._output_size.observe(times.generated_tokens)
        self._e2e.observe(times.e2e_s)
        for histogram, value in (
            (self._queue, times.queue_s),
            (self._prefill, times.prefill_s),
            (self._decode, times.decode_s),
        ):
            if value is not None:
                histogram.observe(value)

    def render(self) -> bytes:
        """Return the text exposition format."""
        return generate_latest(self.registry)
