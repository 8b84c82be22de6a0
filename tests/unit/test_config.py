"""The table of settings and how open values are resolved."""

import dataclasses

import pytest

from kt_async.config import GROUPS, Config, default_of, describe, options
from kt_async.errors import ConfigError
from kt_async.options import convert, nearest
from kt_async.resolve import HostFacts, KvSize, ModelFacts, resolve

MODEL = ModelFacts(name="tiny", architecture="qwen3moe", max_context=4096, main_type="Q4_K")
HOST = HostFacts(num_cpus=8, num_cores=4)


def size_kv(config: Config) -> KvSize:
    """Like the engine's: what was asked for in whole pages, or 16384 tokens of 100 bytes."""
    tokens = -(-(config.cache_lens or 16384) // config.page_size) * config.page_size
    return KvSize(tokens, tokens * 100, "chosen")


def resolved(host: HostFacts = HOST, model: ModelFacts = MODEL, **values: object) -> Config:
    raw = Config(**values, sources=dict.fromkeys(values, "flag"))  # type: ignore[arg-type]
    return resolve(raw, model, host, size_kv)


def test_published_defaults() -> None:
    expected = {
        "port": 10002,
        "max_batch_size": 4,
        "chunk_size": 256,
        "sched_strategy": "FCFS",
        "backend_type": "balance_serve",
        "temperature": 0.95,
        "top_p": 0.8,
        "use_cuda_graph": True,
        "force_think": False,
        "host": "127.0.0.1",
    }
    assert {name: default_of(name) for name in expected} == expected


def test_every_option_is_complete() -> None:
    for name, kind, option in options():
        assert option.group in GROUPS, name
        assert option.help and not option.help.endswith("."), name
        assert kind in (str, int, float, bool, tuple), name
        if kind in (int, float):
            assert option.low is not None and option.high is not None, f"{name} has no range"
        default = default_of(name)
        if not option.auto and kind is not bool:
            assert convert(name, kind, option, default) == default, name


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().port = 1  # type: ignore[misc]


def test_nothing_is_left_open() -> None:
    config = resolved()
    assert config.device == "cpu"
    assert config.kv_dtype == "f16"
    assert config.cpu_infer == 4
    assert config.cache_lens == 16384
    assert config.max_model_len == 4096
    assert config.max_new_tokens == 4096
    assert config.model_name == "tiny"
    assert config.num_pages == 512
    assert set(config.reasons) >= {"device", "cache_lens", "max_model_len", "cpu_infer"}


def test_f32_model_gets_exact_cache() -> None:
    model = dataclasses.replace(MODEL, main_type="F32")
    assert resolved(model=model).kv_dtype == "f32"
    assert resolved(model=model, kv_dtype="bf16").kv_dtype == "bf16"


def test_given_values_stay() -> None:
    config = resolved(cache_lens=1000, max_new_tokens=64, max_model_len=512, cpu_infer=3)
    assert config.cache_lens == 1024  # whole pages of 32
    assert (config.max_new_tokens, config.max_model_len, config.cpu_infer) == (64, 512, 3)


def test_small_cache_limits_the_length() -> None:
    config = resolved(cache_lens=64, max_new_tokens=500)
    assert (config.max_model_len, config.max_new_tokens) == (64, 64)


def test_cpu_memory_limits_the_cache() -> None:
    config = resolved(cpu_memory_size_GB=0.0001)  # 100 kB at 100 bytes a token
    assert config.cache_lens == 992


def test_ktransformers_backend_is_one_at_a_time() -> None:
    assert resolved(backend_type="ktransformers").max_batch_size == 1


def test_too_many_threads_are_lowered_with_a_warning() -> None:
    config = resolved(cpu_infer=65)
    assert config.cpu_infer == 8
    assert "65" in config.warnings[0]


def test_all_contradictions_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(
            device="cuda:1",
            architectures="DeepseekV3ForCausalLM",
            max_model_len=512,
            cache_lens=64,
        )
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert "qwen3moe" in lines[0] and "GPU 1" in lines[1] and "512" in lines[2]


def test_gpu_is_used_when_there() -> None:
    config = resolved(host=HostFacts(num_cpus=8, num_cores=4, num_gpus=1, gpu_chunk=4096))
    assert config.chunk_size == 4096
    assert resolved(HostFacts(8, 4, 1), chunk_size=256).chunk_size == 256
    assert resolved(HostFacts(8, 4, 1), device="cpu").chunk_size == 256
    assert (config.device, config.kv_dtype) == ("cuda:0", "bf16")


def test_generation_config_wins_over_defaults_only() -> None:
    model = dataclasses.replace(MODEL, generation={"temperature": 0.6, "top_k": 20, "top_p": 0.95})
    config = resolved(model=model, top_p=0.5)
    assert (config.temperature, config.top_k, config.top_p) == (0.6, 20, 0.5)


def test_secrets_are_hidden() -> None:
    config = Config(api_key="hush")
    assert "hush" not in str(config.public())
    assert "hush" not in str(describe(config))


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("max_batchsize", "max_batch_size"), ("cache_len", "cache_lens"), ("zzzz", None)],
)
def test_nearest(wrong: str, right: str | None) -> None:
    assert nearest(wrong, [name for name, _, _ in options()]) == right


def test_a_text_flag_with_a_range_takes_a_number_too() -> None:
    option = next(o for name, _, o in options() if name == "gpu_expert_mem")
    for given, wanted in (
        ("auto", "auto"),
        ("ALL", "all"),
        ("8", "8"),
        ("2.50", "2.5"),
        ("0", "0"),
    ):
        assert convert("--gpu_expert_mem", str, option, given) == wanted
    with pytest.raises(ConfigError, match="valid are auto, all and a number of GB; did you mean"):
        convert("--gpu_expert_mem", str, option, "al")
    with pytest.raises(ConfigError, match="between 0 and 1000000 GB"):
        convert("--gpu_expert_mem", str, option, "1e9")


def test_a_gpu_refuses_cache_types_it_has_not() -> None:
    with pytest.raises(
        ConfigError, match=r"--kv_dtype f16 .* GPU; valid there are auto, bf16, fp8"
    ):
        resolved(HostFacts(8, 4, 1), kv_dtype="f16")
    assert resolved(HostFacts(8, 4, 1), kv_dtype="fp8").kv_dtype == "fp8"
    with pytest.raises(ConfigError, match="fp8 is not available on the CPU"):
        resolved(kv_dtype="fp8")


def test_the_place_of_experts_is_decided_once() -> None:
    def size(config: Config) -> KvSize:
        return KvSize(1024, 1, "chosen", 0, (0, 1), 2_500_000_000, "2 of 4 layers")

    config = resolve(Config(), MODEL, HostFacts(8, 4, 1), size)
    assert config.vram_layers == (0, 1)
    assert config.gpu_expert_mem == "2.500"
    assert config.reasons["gpu_expert_mem"] == "2 of 4 layers"


def test_flags_of_a_gpu_are_not_ignored_in_silence() -> None:
    told = resolved(gpu_expert_mem="all", gpu_memory_utilization=0.5).warnings
    assert [line.split()[0] for line in told] == ["--gpu_memory_utilization", "--gpu_expert_mem"]
    assert not resolved(gpu_expert_mem="0", host=dataclasses.replace(HOST, num_gpus=1)).warnings
