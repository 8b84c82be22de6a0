"""What a model needs in memory, by hand-made numbers."""

from dataclasses import replace

import pytest

from kt_async.demo import DEMO_SPEC
from kt_async.engine.memory import MemoryPlan, gib, kv_bytes_per_token, plan_cpu_memory
from kt_async.errors import ConfigError
from kt_async.ffi import structs

GIB = 1 << 30
# 48 layers x 4 heads x (128 + 128) values of 2 bytes = 96 KiB per token, as Qwen3-30B-A3B has.
SPEC = replace(DEMO_SPEC, num_layers=48, num_kv_heads=4, head_dim=128, v_head_dim=128)
PER_TOKEN = 96 << 10


def plan(available_gib: float, **changes: int | None) -> MemoryPlan:
    values: dict[str, int | None] = {"max_model_len": 8192, "max_batch_size": 4, "cache_lens": None}
    return plan_cpu_memory(
        SPEC,
        weight_bytes=16 * GIB,
        available_bytes=int(available_gib * GIB),
        kv_type=structs.KT_KV_F16,
        page_size=32,
        **(values | changes),  # type: ignore[arg-type]
    )


def test_bytes_per_token() -> None:
    assert kv_bytes_per_token(SPEC, structs.KT_KV_F16) == PER_TOKEN
    assert kv_bytes_per_token(SPEC, structs.KT_KV_F32) == 2 * PER_TOKEN
    assert (
        kv_bytes_per_token(replace(SPEC, v_head_dim=64), structs.KT_KV_BF16) == PER_TOKEN * 3 // 4
    )


def test_cache_holds_every_row_when_memory_allows() -> None:
    made = plan(64)
    assert made.num_pages * 32 == 4 * 8192
    assert made.kv_bytes == 4 * 8192 * PER_TOKEN
    assert made.total_needed == 16 * GIB + made.kv_bytes + made.process_bytes
    assert "needs 19." in made.describe()


def test_cache_takes_at_most_half_of_what_is_left() -> None:
    made = plan(18)
    left = 2 * GIB - made.process_bytes
    assert left * 0.49 < made.kv_bytes <= left * 0.5 + 32 * PER_TOKEN


def test_cache_lens_is_rounded_up_to_pages() -> None:
    assert plan(64, cache_lens=1000).num_pages == 32


def test_refuses_weights_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"needs 16\.00 GiB .* only 12\.00 GiB of memory"):
        plan(12)


def test_refuses_a_cache_that_does_not_fit_and_names_one_that_does() -> None:
    with pytest.raises(ConfigError, match=r"--cache_lens 100000 needs 9\.16 GiB") as refused:
        plan(18, cache_lens=100_000)
    largest = int(str(refused.value).split()[-1].rstrip("."))
    assert plan(18, cache_lens=largest).num_pages * 32 == largest
    with pytest.raises(ConfigError):
        plan(18, cache_lens=largest + 32)


def test_gib() -> None:
    assert (gib(3 * GIB // 2), gib(12 << 20)) == ("1.50 GiB", "12.0 MiB")
