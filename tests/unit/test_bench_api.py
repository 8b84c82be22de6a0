"""The benchmark programs against our own HTTP layer: the fields, frames and routes they rely on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from bench import record, run, serve
from bench import test_speed as speed
from tests.unit.conftest import Api


async def test_run(api: Api, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "one.jsonl"
    argv = [
        "--url",
        api.base_url,
        "--out",
        str(out),
        "--clients",
        "1,4",
        "--runs",
        "3",
        "--no_plots",
    ]
    assert await asyncio.to_thread(run.main, argv) == 0, capsys.readouterr().err
    cells = [entry for entry in record.read(out) if entry["kind"] == "serve"]
    assert [cell["clients"] for cell in cells] == [1, 4]
    # The engine's answer holds tokens without text: they share a frame with the next one.
    for sample in (sample for runs in cells[0]["raw"] for sample in runs):
        assert 55 < len(sample["frames_ms"]) < 64 == sample["num_tokens"]


async def test_vocabulary_is_told(api: Api) -> None:
    async with serve.new_session() as session:
        name, vocab = await serve.find_model(session, api.base_url)
    assert (name, vocab) == ("fake", api.tokenizer.vocab_size)


async def test_speed_uses_the_servers_times(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--api_url", api.base_url + "/v1/chat/completions", "--prompt_lens", "512"]
    argv += ["--concurrent", "2", "--max_tokens", "8"]
    assert await asyncio.to_thread(speed.main, argv) == 0, capsys.readouterr().err
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4] == "concurrency: 2"
    assert not any(line.startswith("note:") for line in lines)
    prompts = [len(request.prompt_ids) for request in api.engine.submitted[-2:]]
    assert all(abs(count - 512) < 60 for count in prompts)  # bytes are this model's tokens
