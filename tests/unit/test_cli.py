"""The command line: published commands, precedence, errors."""

from pathlib import Path

import pytest

from kt_async import cli
from kt_async.config import Config, options
from kt_async.errors import ConfigError
from kt_async.retired import RETIRED


def parse(line: str, **env: str) -> Config:
    return cli.parse(line.split(), env)


def problems(line: str, **env: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(line, **env)
    return str(caught.value).splitlines()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "m.gguf").write_bytes(b"GGUF")
    return folder


PUBLISHED = [
    (
        "--port 10002 --model_path {m} --gguf_path {m} --optimize_config_path "
        "ktransformers/optimize/optimize_rules/DeepSeek-V3-Chat-serve.yaml --max_new_tokens 1024 "
        "--cache_lens 32768 --chunk_size 256 --max_batch_size 4 --backend_type balance_serve "
        "--force_think"
    ),
    (
        "--architectures Qwen3MoeForCausalLM --model_path {m} --gguf_path {m} --optimize_config_path "
        "ktransformers/optimize/optimize_rules/Qwen3Moe-serve.yaml --backend_type balance_serve"
    ),
    (
        "--architectures Qwen3MoeForCausalLM --model_path {m} --gguf_path {m} --optimize_config_path "
        "ktransformers/optimize/optimize_rules/Qwen3Moe-serve-amx.yaml --backend_type balance_serve"
    ),
]


@pytest.mark.parametrize("line", PUBLISHED)
def test_published_commands(line: str, model: Path) -> None:
    config = parse(line.format(m=model))
    assert config.warnings == ()
    assert config.backend_type == "balance_serve"
    assert config.gguf_path == config.model_path == str(model)
    if "DeepSeek" in line:
        assert (config.max_new_tokens, config.cache_lens, config.chunk_size) == (1024, 32768, 256)
        assert config.force_think and config.max_batch_size == 4


def test_no_argument_is_the_demo_model() -> None:
    config = parse("")
    assert config.demo and config.command == "serve"


def test_positional_model(model: Path) -> None:
    assert parse(f"--max_batch_size 8 {model}").gguf_path == str(model)
    assert not parse(str(model)).demo


@pytest.mark.parametrize("name", [name for name, _, _ in options()])
def test_both_spellings(name: str, model: Path) -> None:
    samples = {
        "config": str(model / "c.yaml"),
        "device": "cpu",
        "cors_origins": "*",
        "optimize_config_path": "Qwen3Moe-serve.yaml",
    }
    (model / "c.yaml").write_text("")
    kind, option = next((kind, option) for n, kind, option in options() if n == name)
    value = samples.get(name) or {bool: "true", int: "64", float: "1"}.get(kind)
    value = value or (option.choices[-1] if option.choices else str(model))
    extra = "--ssl_keyfile=. --ssl_certfile=. --gguf_path=."
    results = [
        getattr(parse(f"{extra} {spelling} {value}".replace("--demo true", "")), name)
        for spelling in (f"--{name}", f"--{name.replace('_', '-')}")
    ]
    assert results[0] == results[1]


def test_switches() -> None:
    assert parse("--no-use_cuda_graph").use_cuda_graph is False
    assert parse("--no-use-cuda-graph").use_cuda_graph is False
    assert parse("--use_cuda_graph False").use_cuda_graph is False
    assert parse("--use_cuda_graph=true").use_cuda_graph is True
    assert parse("--force_think --no-force_think").force_think is False
    assert parse("--no-prefix_cache").prefix_cache is False


def test_precedence(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("port: 3\nmax_batch_size: 3\nchunk-size: 33\n")
    config = parse(
        f"--config {file} --port 1", KT_ASYNC_PORT="2", KT_ASYNC_MAX_BATCH_SIZE="2", HOME="/x"
    )
    assert (config.port, config.max_batch_size, config.chunk_size) == (1, 2, 33)
    assert config.max_queue == 256
    assert config.sources["port"] == "flag"
    assert config.sources["max_batch_size"] == "env KT_ASYNC_MAX_BATCH_SIZE"
    assert config.sources["chunk_size"] == f"file {file}"
    text = cli.print_config_text(config)
    assert f"file {file}" in text and "max_queue" in text


def test_config_file_from_environment(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("port: 3\n")
    assert parse("", KT_ASYNC_CONFIG=str(file)).port == 3


def test_old_config_yaml(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "log: {dir: logs, file: a.log, level: debug, backup_count: -1}\n"
        "server: {ip: 127.0.0.1, port: 10005}\n"
        "model: {type: balance_serve, cache_lens: 8192, max_new_tokens: 500}\n"
        "long_context: {max_seq_len: 32000}\n"
        "attn: {page_size: 256, chunk_size: 512}\n"
        "kvc2: {gpu_only: true, cpu_memory_size_GB: 500}\n"
    )
    config = parse(f"--config {file}")
    assert (config.port, config.page_size, config.chunk_size) == (10005, 256, 512)
    assert (config.cache_lens, config.max_new_tokens) == (8192, 500)
    assert config.log_file == "logs/a.log"
    assert len(config.warnings) == 3  # backup_count, long_context, gpu_only


@pytest.mark.parametrize("name", sorted(RETIRED))
def test_retired_flags_warn_once(name: str) -> None:
    config = parse(f"--{name} 1 --port 5")
    assert config.port == 5
    assert len(config.warnings) == 1
    assert config.warnings[0].startswith(f"--{name} is ignored: ")


def test_no_retired_flag_is_alive() -> None:
    assert not set(RETIRED) & {name for name, _, _ in options()}


def test_unknown_flag_names_the_nearest() -> None:
    assert problems("--max_bach_size 4") == [
        "Unknown flag --max_bach_size; did you mean --max_batch_size?"
    ]


def test_unknown_key_and_variable(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("prot: 1\n")
    assert problems(f"--config {file}") == [f"{file}: unknown key prot; did you mean port?"]
    assert problems("", KT_ASYNC_PROT="1") == [
        "Unknown environment variable KT_ASYNC_PROT; did you mean KT_ASYNC_PORT?"
    ]


def test_all_errors_at_once() -> None:
    found = problems("--port 99999 --chunk_size abc --kv_dtype f64 --page_size 17 --nope")
    assert len(found) == 5
    assert any("--port is 99999; it must be between 0 and 65535." in line for line in found)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--port", "--port needs a value"),
        ("--temperature nan", "between 0 and 2"),
        ("--page_size 40", "multiple of 16"),
        ("--gguf_path /nowhere/m.gguf", "/nowhere/m.gguf does not exist"),
        ("--backend_type exllamav2", "valid are balance_serve, ktransformers"),
        ("--ssl_keyfile .", "needed together"),
        ("--chunk_size 2 --max_batch_size 4", "at least --max_batch_size 4"),
        ("--demo --gguf_path .", "exclude each other"),
        ("--model_path .", "--gguf_path with the weights is missing"),
        ("--device tpu", "valid are auto, cpu, cuda and cuda:N"),
        ("--optimize_config_path old/Qwen3Moe-srve.yaml", "did you mean Qwen3Moe-serve.yaml?"),
        ("a b", "Only one model"),
        ("--config /nowhere.yaml", "cannot be read"),
        ("--force_think=maybe", "valid are true and false"),
    ],
)
def test_sentences(line: str, words: str) -> None:
    assert any(words in problem for problem in problems(line))


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "\x00", "port: [1]", "port: {a: 1}"])
def test_bad_files_are_config_errors(text: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert len(problems(f"--config {file}")) == 1


def test_open_address_without_key_warns() -> None:
    assert "api_key" in parse("--host 0.0.0.0").warnings[0]
    assert parse("--host 0.0.0.0 --api_key k").warnings == ()
    assert parse("--host ::1").warnings == ()


def test_help_and_version() -> None:
    with pytest.raises(cli.Answer) as caught:
        parse("--help")
    text = caught.value.text
    for name, kind, _ in options():
        assert f"--{name}" in text or f"--no-{name}" in text, name
        assert kind is not bool or "None" not in text
    assert max(len(line) for line in text.splitlines()) <= 100
    with pytest.raises(cli.Answer, match=r"kt_async \d"):
        parse("--version")


def test_commands() -> None:
    assert parse("--cpu-info").command == "cpu_info"
    assert parse("--plan").command == "plan"
    assert parse("--print-config").command == "print_config"


def test_error_format() -> None:
    assert cli.format_error(ConfigError("a\nb")) == "kt_async: error: a\nkt_async: error: b"


def test_log_file(tmp_path: Path) -> None:
    assert cli.open_log(parse("")) is None
    config = parse(f"--log_dir {tmp_path / 'new'}")
    stream = cli.open_log(config)
    assert stream is not None
    with stream:
        stream.write("line\n")
    assert (tmp_path / "new" / "kt_async.log").read_text() == "line\n"
    with pytest.raises(ConfigError, match="cannot be written"):
        cli.open_log(parse(f"--log_file {tmp_path}"))
