"""The benchmarks' logic without network: figures, frames, prompts, tables, report, metrics."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import (
    bound,
    measure,
    options,
    outputs,
    peers,
    plots,
    process,
    prompts,
    record,
    report,
    run,
    sse,
    stats,
    trace,
)
from bench import test_speed as speed
from bench.errors import BenchError
from kt_async import demo


class TestStats:
    def test_percentiles_interpolate(self) -> None:
        values = [4.0, 1.0, 3.0, 2.0]
        assert stats.percentile(values, 0) == 1
        assert stats.percentile(values, 100) == 4
        assert stats.percentile(values, 50) == 2.5
        assert stats.percentile(values, 90) == pytest.approx(3.7)
        assert stats.percentile([7.0], 99) == 7

    @pytest.mark.parametrize(("values", "q"), [([], 50), ([1.0], -1), ([1.0], 101)])
    def test_percentile_refuses(self, values: list[float], q: float) -> None:
        with pytest.raises(ValueError, match="percentile"):
            stats.percentile(values, q)

    def test_spread_and_noise(self) -> None:
        assert stats.spread([9.0, 10.0, 12.0]) == pytest.approx(0.15)
        assert stats.spread([5.0]) == 0
        assert stats.noise([10.0, 10.0, 10.0, 50.0]) == 0  # one outlier is no noise
        assert stats.noise([9.0, 10.0, 11.0]) == pytest.approx(0.14826)
        assert stats.noise([0.0, 0.0]) == stats.spread([0.0, 0.0]) == 0

    @pytest.mark.parametrize(
        ("value", "text"),
        [(None, "-"), (float("nan"), "-"), (0.0, "0"), (1234567.0, "1,234,567"), (12.345, "12.3"),
         (0.01234, "0.0123"), (-4.0, "-4.00")],
    )  # fmt: skip
    def test_number(self, value: float | None, text: str) -> None:
        assert stats.number(value) == text

    def test_table_aligns(self) -> None:
        text = stats.table(("a", "long"), [("first", "1"), ("x", "20")])
        assert text.splitlines() == ["a      long", "-----  ----", "first     1", "x        20"]
        with pytest.raises(ValueError, match="2 cells"):
            stats.table(("a", "b"), [("only",)])


FRAME = b'{"object":"text_completion","choices":[{"index":0,"text":"hi","finish_reason":null}]}'


class TestSse:
    @given(st.lists(st.integers(1, 9), min_size=1, max_size=40))
    def test_any_cut_gives_the_same_events(self, cuts: list[int]) -> None:
        raw = (
            b": ping\r\n\r\ndata: one\r\n\r\nevent: x\ndata:two\ndata: lines\n\n\ndata: [DONE]\n\n"
        )
        parser, events, pos = sse.SseParser(), [], 0
        for cut in [*cuts, len(raw)]:
            events += parser.feed(raw[pos : pos + cut])
            pos += cut
        assert events == [b"one", b"two\nlines", b"[DONE]"]
        assert not parser.has_rest

    def test_rest_of_a_cut_stream(self) -> None:
        parser = sse.SseParser()
        assert parser.feed(b"data: half") == []
        assert parser.has_rest
        assert parser.feed(b"\n") == []
        assert parser.has_rest  # the blank line is missing

    def test_frames(self) -> None:
        assert sse.parse_frame(FRAME) == sse.Frame(text="hi", has_choice=True)
        assert sse.parse_frame(b"[DONE]").is_done
        chat = {"delta": {"reasoning_content": "a", "content": "b"}, "finish_reason": "stop"}
        body = {"object": "chat.completion.chunk", "choices": [chat], "usage": {"total_tokens": 1}}
        frame = sse.parse_frame(json.dumps(body).encode())
        assert (frame.text, frame.finish_reason) == ("ab", "stop")
        assert frame.usage == {"total_tokens": 1}
        role = {"object": "chat.completion.chunk", "choices": [{"delta": {"role": "assistant"}}]}
        assert sse.parse_frame(json.dumps(role).encode()).text == ""

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"{", "not JSON"),
            (b"[1]", "not a JSON object"),
            (b'{"object":"other","choices":[]}', "not an OpenAI chunk"),
            (b'{"object":"text_completion"}', "not an OpenAI chunk"),
            (b'{"object":"text_completion","choices":[1]}', "a choice is not an object"),
            (b'{"object":"text_completion","choices":[],"usage":3}', "usage"),
            (b'{"error":{"message":"no pages left"}}', "no pages left"),
            (b'{"error":"plain"}', "plain"),
        ],
    )
    def test_bad_frames(self, data: bytes, message: str) -> None:
        with pytest.raises(sse.FrameError, match=message):
            sse.parse_frame(data)


class TestPrompts:
    def test_word_count_is_exact_and_seeded(self) -> None:
        for count in (1, 7, 300):
            assert len(prompts.words(count, 3).split()) == count
        assert prompts.words(40, 1) == prompts.words(40, 1)
        assert prompts.words(40, 1) != prompts.words(40, 2)

    def test_scale_fits_a_line(self) -> None:
        scale = prompts.Scale.fit((16, 42), (80, 202))
        assert (scale.fixed, scale.per_word) == (2, 2.5)
        assert scale.num_words(1002) == 400
        assert scale.num_words(1) == 1
        text = prompts.text_of_tokens(1002, 5, scale)
        assert len(text.split()) * 2.5 + 2 == 1002
        with pytest.raises(ValueError, match="no more tokens"):
            prompts.Scale.fit((16, 42), (80, 42))

    @pytest.mark.parametrize("vocab", [2, 256, 151936])
    def test_ids_stay_inside(self, vocab: int) -> None:
        ids = prompts.token_ids(500, 1, vocab)
        assert len(ids) == 500
        assert 0 <= min(ids) <= max(ids) < vocab
        with pytest.raises(ValueError, match="vocabulary of 1"):
            prompts.token_ids(5, 1, 1)


def stream(times: list[float], counts: list[int] | None = None, **fields: Any) -> trace.Stream:
    """A finished stream of made-up moments."""
    counts = counts or [1] * len(times)
    usage = {"completion_tokens": sum(counts), "prompt_tokens": 10}
    values: dict[str, Any] = {"end": times[-1], "is_done": True, "finish_reason": "length"}
    values |= {"usage": usage, "first_byte": times[0]} | fields
    return trace.Stream(0.0, times=times, counts=counts, **values)


class TestStream:
    def test_figures(self) -> None:
        one = stream([1.0, 1.5, 2.0, 3.0])
        assert one.ttft == 1
        assert one.gaps == [0.5, 0.5, 1.0]
        assert one.tokens_per_s == 1.5
        assert stream([1.0]).tokens_per_s is None

    def test_steady_speed_counts_only_common_time(self) -> None:
        early = stream([0.0, 1.0, 2.0, 3.0, 4.0])
        late = stream([2.0, 2.5, 3.0, 3.5, 4.0, 9.0])
        assert trace.steady_tokens_per_s([early, late]) == (2 + 4) / 2
        assert trace.steady_tokens_per_s([stream([0.0, 1.0]), stream([5.0, 6.0])]) is None

    def test_steady_speed_with_held_back_tokens(self) -> None:
        usage = {"completion_tokens": 6, "prompt_tokens": 1}
        assert trace.steady_tokens_per_s([stream([0.0, 1.0, 2.0], usage=usage)]) == 2

    def test_summary(self) -> None:
        found = trace.summarize([stream([0.1, 0.2, 0.3]), stream([0.3, 0.4, 0.5])])
        assert found["total_tokens_per_s"] == pytest.approx(6 / 0.5)
        assert found["ttft_p50_ms"] == pytest.approx(200)
        assert found["ttft_max_ms"] == pytest.approx(300)
        assert found["itl_p99_ms"] == pytest.approx(100)
        assert found["decode_tokens_per_s"] is None

    def test_tokens_of_continuous_usage(self) -> None:
        one = trace.Stream(0.0)
        for text, count in (("a", 1), ("", 2), ("bc", 4), ("", 4)):
            one.take(sse.Frame(text, usage={"completion_tokens": count}, has_choice=True), 1.0)
        one.take(sse.Frame(usage={"completion_tokens": 4}), 1.0)
        assert one.counts == [1, 1, 2]  # a token without text counts, a repeated total does not
        assert (one.text, one.num_tokens) == ("abc", 4)

    def test_final_usage_is_no_token(self) -> None:
        one = trace.Stream(0.0)
        one.take(sse.Frame("a", has_choice=True), 1.0)
        one.take(sse.Frame(usage={"completion_tokens": 1}), 2.0)
        one.take(sse.Frame(is_done=True), 2.0)
        assert one.times == [1.0]
        with pytest.raises(sse.FrameError, match="follows"):
            one.take(sse.Frame("late"), 3.0)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"is_done": False}, r"without \[DONE\]"),
            ({"usage": {"completion_tokens": 3}}, "has 3 tokens, asked were 2"),
            ({"finish_reason": "stop"}, "finish_reason is stop"),
        ],
    )
    def test_check(self, fields: dict[str, Any], message: str) -> None:
        trace.check(stream([1.0, 2.0]), 2, 0)
        with pytest.raises(BenchError, match=message):
            trace.check(stream([1.0, 2.0], **fields), 2, 0)


def result(clients: int, **runs: list[float]) -> dict[str, Any]:
    return {"kind": "serve", "clients": clients, "runs": runs, "machine": {"cpu": "a"}}


class TestReport:
    def test_noise_is_not_a_change(self) -> None:
        base = [result(4, decode_tokens_per_s=[98.0, 100.0, 103.0, 99.0, 101.0])]
        new = [result(4, decode_tokens_per_s=[95.0, 97.0, 99.0, 96.0, 98.0])]
        (line,), missing = report.compare_files(base, new)
        assert (line.verdict, missing) == ("same", [])

    @pytest.mark.parametrize(
        ("metric", "factor", "verdict"),
        [
            ("decode_tokens_per_s", 0.8, "WORSE"),
            ("decode_tokens_per_s", 1.2, "better"),
            ("itl_p50_ms", 0.8, "better"),
            ("itl_p50_ms", 1.2, "WORSE"),
        ],
    )
    def test_direction(self, metric: str, factor: float, verdict: str) -> None:
        values = [100.0, 101.0, 99.0]
        line = report.compare((), metric, values, [v * factor for v in values])
        assert line.verdict == verdict

    def test_noisy_runs_need_a_larger_change(self) -> None:
        values = [60.0, 100.0, 140.0]
        assert (
            report.compare((), "decode_tokens_per_s", values, [v * 0.8 for v in values]).verdict
            == "same"
        )

    def test_tiny_absolute_change_is_none(self) -> None:
        assert report.compare((), "idle_cpu_percent", [0.1], [0.3]).verdict == "same"
        assert report.compare((), "idle_cpu_percent", [0.1], [2.0]).verdict == "WORSE"
        assert report.compare((), "idle_cpu_percent", [0.0], [3.0]).verdict == "WORSE"

    def test_cells_do_not_mix(self) -> None:
        base = [result(1, itl_p50_ms=[5.0]), result(4, itl_p50_ms=[9.0])]
        lines, missing = report.compare_files(base, [result(1, itl_p50_ms=[5.0])])
        assert len(lines) == 1
        assert missing == ["serve clients 4: no such cell in the new file"]
        with pytest.raises(BenchError, match="no figure in common"):
            report.compare_files(base, [result(2, itl_p50_ms=[5.0])])

    def test_command(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        paths = [tmp_path / name for name in ("base", "same", "slow")]
        for path, speed_of in zip(paths, (100.0, 101.0, 50.0), strict=True):
            record.ResultFile(path).append("serve", result(1, decode_tokens_per_s=[speed_of] * 3))
        base, same, slow = map(str, paths)
        assert report.main([base, same]) == 0
        assert report.main([base, slow]) == 1
        out = capsys.readouterr().out
        assert "-50.0 %" in out
        assert "1 worse beyond noise" in out
        assert report.main([base, str(tmp_path / "none")]) == 2
        assert "cannot read" in capsys.readouterr().err

    @pytest.mark.parametrize(("text", "message"), [("{", "line 1 is not JSON"), ("[]", "no kind")])
    def test_bad_files(self, tmp_path: Path, text: str, message: str) -> None:
        path = tmp_path / "bad"
        path.write_text(text)
        with pytest.raises(BenchError, match=message):
            record.read(path)

    def test_warnings(self) -> None:
        other = result(1, itl_p50_ms=[1.0]) | {"machine": {"cpu": "b"}}
        found = report.warnings([result(1, itl_p50_ms=[1.0])], [other])
        assert ["CPU" in found[0], "three runs" in found[1]] == [True, True]
        busy = result(1, itl_p50_ms=[1.0] * 3) | {"machine": {"load_1min": 3.0, "cores": 2}}
        assert "busy" in "".join(report.warnings([busy], [busy]))


class TestProcess:
    def test_stat_line_with_spaces_in_the_name(self) -> None:
        fields = " ".join(str(i) for i in range(4, 53))
        assert process.parse_stat(f"12 (a ) b) S {fields}") == 14 + 15

    def test_waiting_for_a_core(self) -> None:
        assert process.wait_percent((1.0, 2.0), (4.0, 3.0)) == 25
        assert process.wait_percent((1.0, 2.0), (1.0, 2.0)) is None
        assert process.wait_percent(None, (1.0, 2.0)) is None
        assert process.core_seconds(2**22 + 1) is None
        found = process.core_seconds(os.getpid())
        assert found is None or found[0] > 0

    def test_fill(self) -> None:
        command = process.fill("run -m '{model}' --port {port} {x}", {"port": 7, "model": "a b"})
        assert command == ["run", "-m", "a b", "--port", "7", "{x}"]
        with pytest.raises(BenchError, match="port"):
            process.fill("run", {"port": 7})
        with pytest.raises(BenchError, match="cannot be split"):
            process.fill("run '{port}", {"port": 7})


class TestRun:
    def test_metrics_text(self) -> None:
        text = '# HELP a b\na_total 3.0\nb{le="1"} 4\nc 1.5e3 1700000\nbroken\nd x\n'
        assert measure.parse_metrics(text) == {"a_total": 3.0, "c": 1500.0}

    def test_host_time(self) -> None:
        before = {"kt_async:engine_host_ns": 1e6, "kt_async:engine_steps_total": 10.0}
        after = {"kt_async:engine_host_ns": 5e6, "kt_async:engine_steps_total": 30.0}
        assert measure.host_us_per_step(before, after) == 200
        assert measure.host_us_per_step(before, before) is None
        assert measure.host_us_per_step({}, after) is None

    def test_difference_is_located(self) -> None:
        outputs.same("abc", "abc", "x")
        with pytest.raises(outputs.WrongOutputError, match=r"prompt 2 differs .* at character 2"):
            outputs.same("abcd", "abXd", "prompt 2")
        with pytest.raises(outputs.WrongOutputError, match="at character 3"):
            outputs.same("abcd", "abc", "prompt 2")

    def test_targets(self) -> None:
        lines = run.target_lines({"ready_s": 2.0, "first_byte_ms": 45.0})
        assert lines[0].endswith("ok")
        assert lines[1].endswith("ABOVE")

    def test_server_has_room_for_all_clients(self) -> None:
        def last(*argv: str) -> list[str]:
            return run.server_command(run.parse_args(list(argv)), 9)[-2:]

        assert last() == ["--max_batch_size", "8"]
        assert last("--clients", "1,16") == ["--max_batch_size", "16"]
        assert last("--server_args", "--max-batch-size 3") == ["--max-batch-size", "3"]

    def test_answer_without_streaming(self) -> None:
        answer = {"choices": [{"text": "a"}], "usage": {"completion_tokens": 32}}
        assert outputs.text_of(answer) == "a"
        for bad in ([], {"choices": []}, answer | {"usage": {"completion_tokens": 31}}):
            with pytest.raises(BenchError, match="without streaming"):
                outputs.text_of(bad)

    def test_bad_server_args(self) -> None:
        args = run.parse_args(["--server_args", "'x"])
        with pytest.raises(BenchError, match="server_args"):
            run.server_command(args, 1)


class TestOptions:
    def test_counts(self) -> None:
        assert options.counts("8,1,4,4") == [1, 4, 8]

    @pytest.mark.parametrize("text", ["0", "-3", "x", "1,,2"])
    def test_refused(self, text: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            run.parse_args([f"--clients={text}"])
        assert "--clients" in capsys.readouterr().err

    def test_step_bytes(self) -> None:
        assert peers.step_bytes("1=460,4=813.5") == {1: 460e6, 4: 813.5e6}
        with pytest.raises(SystemExit):
            peers.parse_args(
                ["--model", "m", "--peer", "p", "--step_mb", "1:2", "--bandwidth", "9"]
            )
        with pytest.raises(SystemExit):
            peers.parse_args(["--model", "m", "--peer", "p", "--step_mb", "1=2"])


class TestBound:
    def test_distinct_experts(self) -> None:
        found = [bound.distinct_experts(128, 8, rows) for rows in (1, 2, 4, 8, 16)]
        assert found == pytest.approx([8, 15.5, 29.1, 51.6, 82.4], abs=0.1)

    def test_bytes_of_a_step(self) -> None:
        tensors = [("token_embd.weight", 1000), ("blk.0.attn_q.weight", 30)]
        tensors += [("blk.0.ffn_up_exps.weight", 400), ("blk.0.ffn_gate_inp.weight", 2)]
        assert bound.step_bytes(tensors, 4, 1, 1) == 1000 + 32 + 100  # tied output
        assert bound.step_bytes([*tensors, ("output.weight", 7)], 4, 1, 2) == 7 + 32 + 175

    def test_tiny_file(self, tmp_path: Path) -> None:
        path = tmp_path / "demo.gguf"
        demo.write_demo_model(path)
        sizes = bound.step_bytes_of_file(path, [1, 64])
        assert 0.3 * path.stat().st_size < sizes[1] < sizes[64] < path.stat().st_size
        with pytest.raises(BenchError, match="none"):
            bound.step_bytes_of_file(tmp_path / "none.gguf", [1])

    def test_cells(self) -> None:
        common = ["--model", "m", "--peer", "p"]
        assert peers.bounds_of(peers.parse_args(common)) == {}
        args = peers.parse_args([*common, "--bandwidth", "50", "--step_mb", "4=800"])
        assert peers.bounds_of(args) == {"decode 4": 250}


class TestPeersTable:
    def test_ratio_and_bound(self) -> None:
        limit = bound.tokens_per_s(4, 800e6, 50)
        assert limit == 250
        samples = {"decode 4": {"ours": [200.0, 210.0, 190.0], "peer": [100.0]}}
        (row,) = peers.ratio_rows(samples, "ours", "peer", {"decode 4": limit})
        assert row == ["decode 4", "200", "5 %", "100", "0 %", "2.00", "250", "80 %", "40 %"]
        assert len(peers.header("ours", "peer", True)) == len(row)


class TestSpeed:
    def test_lines(self) -> None:
        assert speed.lines_ready("one\ntwo", 0, False) == (["one"], 4)
        assert speed.lines_ready("one\ntwo", 4, False) == ([], 4)
        assert speed.lines_ready("one\ntwo", 4, True) == (["two"], 7)
        assert speed.lines_ready("one\n", 4, True) == ([], 4)

    def test_speeds(self) -> None:
        usage = {
            "prompt_tokens": 1000,
            "completion_tokens": 2,
            "prefill_time": 2.0,
            "decode_time": 0.5,
        }
        found = speed.speed_of(stream([1.0, 3.0], usage=usage))
        assert found == speed.Speed(500, 4, 2, True)
        assert speed.speed_of(stream([1.0, 3.0])) == speed.Speed(10, 0.5, 2, False)
        with pytest.raises(BenchError, match="no speed"):
            speed.speed_of(trace.Stream(0.0))

    @pytest.mark.parametrize("url", ["localhost:1/v1/chat/completions", "http://h/v1/completions"])
    def test_bad_url(self, url: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert speed.main(["--api_url", url, "--model", "m"]) == 2
        assert "--api_url" in capsys.readouterr().err


def test_plots_say_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BenchError, match="matplotlib is not installed"):
        plots.draw([], tmp_path / "stem", "title")


@pytest.mark.parametrize(("load", "is_busy"), [(0.3, False), (999.0, True)])
def test_busy_machine_is_noted(load: float, is_busy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record.os, "getloadavg", lambda: (load, load, load))
    assert (record.busy_note() is not None) == is_busy
