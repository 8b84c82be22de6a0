"""The whole server as its users meet it: concurrency, cancellation, limits, shutdown, bad starts."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Server

pytestmark = pytest.mark.e2e


def complete(server: Server, prompt: str, max_tokens: int, **extra: Any) -> Any:
    body = {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        **extra,
    }
    status, answer, _ = server.post("/v1/completions", body)
    assert status == 200, answer
    return answer


def wait_until(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "condition not reached"
        time.sleep(0.01)


def open_stream(server: Server, max_tokens: int, path: str = "/v1/completions") -> socket.socket:
    """Send a streaming request by hand and return after its first bytes."""
    body = json.dumps(
        {"prompt": "x", "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
    ).encode()
    raw = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    raw.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    assert raw.recv(1)
    return raw


def test_sixteen_clients_get_the_text_they_would_get_alone(server: Server) -> None:
    prompts = [(f"client {i} says " + "word " * (i * 7 % 50), 5 + 3 * i) for i in range(16)]
    alone = [complete(server, *p)["choices"][0]["text"] for p in prompts]
    with ThreadPoolExecutor(16) as threads:
        together = list(threads.map(lambda p: complete(server, *p)["choices"][0]["text"], prompts))
    assert together == alone


def test_usage_is_exact(server: Server) -> None:
    answer = complete(server, "hello", 17)
    assert answer["usage"]["completion_tokens"] == 17
    assert answer["choices"][0]["finish_reason"] == "length"


def test_disconnect_frees_everything(server: Server) -> None:
    streams = [open_stream(server, 1500) for _ in range(3)]
    wait_until(lambda: server.metric("kt_async:num_requests_running") >= 3)
    for stream in streams:
        stream.close()
    wait_until(lambda: server.metric("kt_async:num_requests_running") == 0, 5.0)


def test_disconnect_without_streaming_frees_everything(server: Server) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 1500, "ignore_eos": True}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    wait_until(lambda: server.metric("kt_async:num_requests_running") >= 1)
    connection.close()
    wait_until(lambda: server.metric("kt_async:num_requests_running") == 0, 5.0)


def test_too_long_prompt_is_refused_with_numbers(server: Server) -> None:
    limit = server.get("/v1/models")["data"][0]["max_model_len"]
    status, answer, _ = server.post(
        "/v1/completions", {"prompt": [1] * (limit + 1), "max_tokens": 1}
    )
    assert status == 400
    assert str(limit) in answer["error"]["message"]


def test_full_queue_answers_429(make_server: Callable[..., Server]) -> None:
    server = make_server("--max_batch_size", "1", "--max_queue", "1")
    first = open_stream(server, 1500)
    second = threading.Thread(target=lambda: complete(server, "x", 1))
    second.start()
    wait_until(lambda: server.metric("kt_async:num_requests_waiting") == 1)
    status, answer, headers = server.post("/v1/completions", {"prompt": "x", "max_tokens": 1})
    assert status == 429, answer
    assert int(headers["Retry-After"]) >= 1
    first.close()
    second.join(30)
    assert not second.is_alive()


def test_sigterm_finishes_running_requests(make_server: Callable[..., Server]) -> None:
    server = make_server()
    received = b""
    with open_stream(server, 300) as stream:
        server.process.send_signal(signal.SIGTERM)
        while b"[DONE]" not in received and (chunk := stream.recv(65536)):
            received += chunk
    assert b"[DONE]" in received
    assert server.process.wait(30) == 0, server.log.read_text()


def test_tiny_cache_preempts_and_still_answers_exactly(make_server: Callable[..., Server]) -> None:
    roomy = make_server("--max_batch_size", "4")
    tight = make_server("--max_batch_size", "4", "--cache_lens", "320", "--no-prefix_cache")
    prompts = [f"story number {i}" for i in range(6)]
    expected = [complete(roomy, p, 150)["choices"][0]["text"] for p in prompts]
    with ThreadPoolExecutor(6) as threads:
        texts = list(threads.map(lambda p: complete(tight, p, 150)["choices"][0]["text"], prompts))
    assert texts == expected


def run_cli(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kt_async", *flags],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"not a gguf file at all, certainly not", "not a GGUF"), (b"GGUF\x03\0\0\0", "truncated")],
)
def test_a_broken_file_is_one_sentence(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    result = run_cli("--gguf_path", str(path))
    assert result.returncode == 2
    assert "broken.gguf" in result.stderr
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unknown_flag_names_the_nearest() -> None:
    result = run_cli("--max_batch_sise", "4")
    assert result.returncode == 2
    assert "max_batch_size" in result.stderr


def test_a_taken_port_is_one_sentence(server: Server) -> None:
    result = run_cli("--port", str(server.port))
    assert result.returncode == 2
    assert str(server.port) in result.stderr
    assert "Traceback" not in result.stderr
