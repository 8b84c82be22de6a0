"""How a GPU's memory is divided, by hand-made numbers; needs no GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kt_async.config import Config
from kt_async.demo import DEMO_SPEC
from kt_async.engine.build import expert_wish, num_host_pages, rule_layers
from kt_async.engine.gpu_memory import (
    ExpertWish,
    GpuMemoryPlan,
    KvWish,
    chunk_for,
    gpu_budget,
    plan_gpu_memory,
    work_bytes,
)
from kt_async.engine.memory import check_host_memory
from kt_async.errors import ConfigError

GIB = 1 << 30
LAYER = GIB * 17 // 48
# 96 KiB of bf16 KV per token, 17 GiB of experts: Qwen3-30B-A3B in Q4_K_M.
SPEC = replace(
    DEMO_SPEC,
    num_layers=48,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    v_head_dim=128,
    vocab_size=151936,
    hidden_size=2048,
    moe_intermediate_size=768,
    num_experts=128,
    top_k=8,
)
EVERY = frozenset(range(48))
SIZES = dict.fromkeys(range(48), LAYER)


def plan(
    budget_gib: float, wish: ExpertWish | None = None, cache_lens: int | None = None
) -> GpuMemoryPlan:
    return plan_gpu_memory(
        SPEC,
        KvWish(page_size=32, max_model_len=8192, max_batch_size=4, cache_lens=cache_lens),
        wish or ExpertWish(SIZES, EVERY),
        dense_bytes=1 * GIB,
        budget=int(budget_gib * GIB),
    )


def test_a_chunk_is_as_large_as_the_gpu_allows() -> None:
    chunks = [chunk_for(SPEC, size * GIB) for size in (140, 24, 12, 8, 4)]
    assert chunks == [8192, 8192, 8192, 4096, 2048]
    wide = replace(SPEC, hidden_size=7168, moe_intermediate_size=2048)
    assert [chunk_for(wide, size * GIB) for size in (140, 24, 8)] == [8192, 4096, 2048]


def test_as_many_layers_as_fit_go_to_the_gpu() -> None:
    counts = [len(plan(budget).vram_layers) for budget in (4, 8, 12, 16, 21, 24)]
    assert counts == sorted(counts)
    assert counts[0] < 4
    assert counts[-1] == 48
    assert 0 < counts[2] < 48
    assert plan(12).vram_layers == tuple(range(counts[2]))


def test_everything_stays_within_the_budget() -> None:
    for budget in (5, 8, 12, 24, 80):
        made = plan(budget)
        assert made.total_needed <= made.budget_bytes
        assert made.kv_bytes == made.num_pages * 32 * (96 << 10)
        assert made.expert_bytes == len(made.vram_layers) * LAYER
        assert made.expert_bytes + made.host_bytes == 48 * LAYER
        # At least one sequence of full length, unless even that does not fit.
        assert made.kv_bytes >= 8192 * (96 << 10) or not made.vram_layers


def test_staging_room_only_while_experts_are_on_the_cpu() -> None:
    assert plan(80).work_bytes == plan(12).work_bytes - 2 * LAYER


def test_a_number_of_gigabytes_is_kept_to() -> None:
    none = plan(80, ExpertWish(SIZES, EVERY, limit=0))
    assert none.vram_layers == ()
    some = plan(80, ExpertWish(SIZES, EVERY, limit=4_000_000_000))
    assert some.expert_bytes <= 4_000_000_000 < some.expert_bytes + LAYER
    with pytest.raises(ConfigError, match=r"X asks for 26 layers.*the largest value that fits is"):
        plan(10, ExpertWish(SIZES, EVERY, limit=10_000_000_000, origin="X"))


def test_layers_without_a_kernel_stay_on_the_cpu() -> None:
    usable = EVERY - {0, 3}
    assert plan(80, ExpertWish(SIZES, usable)).vram_layers == tuple(sorted(usable))


def test_too_little_memory_is_refused_with_numbers() -> None:
    with pytest.raises(ConfigError, match=r"2\.00 GiB to use.*1\.00 GiB"):
        plan(2)
    with pytest.raises(ConfigError, match=r"experts of 48 layers 17\.00 GiB.*--gpu_expert_mem all"):
        plan(12, ExpertWish(SIZES, EVERY, layers=EVERY, origin="--gpu_expert_mem all"))
    with pytest.raises(ConfigError, match="the largest value that fits is"):
        plan(8, cache_lens=1_000_000)


def test_others_use_counts_against_the_share() -> None:
    assert gpu_budget(free_bytes=20 * GIB, total_bytes=24 * GIB, utilization=0.5) == 8 * GIB
    with pytest.raises(ConfigError, match=r"allows 12\.00 GiB .* 24\.00 GiB, but 14\.00 GiB"):
        gpu_budget(10 * GIB, 24 * GIB, 0.5)


def test_long_chunks_need_more_work_memory() -> None:
    wish = KvWish(32, 8192, 4, None)
    small, large = work_bytes(SPEC, wish), work_bytes(SPEC, replace(wish, chunk_size=4096))
    assert 0.5 * GIB < small < large < 2 * GIB


def test_a_model_of_235_billion_parameters_fits_beside_12_gigabytes() -> None:
    """Dense weights of Qwen3-235B-A22B in Q4_K_M, and two layers' experts on their way."""
    large = replace(
        SPEC,
        num_layers=94,
        num_heads=64,
        hidden_size=4096,
        moe_intermediate_size=1536,
    )
    wish = KvWish(32, 32768, 16, None, chunk_for(large, 12 * GIB))
    layers = ExpertWish(dict.fromkeys(range(94), 1_450_000_000), frozenset(range(94)))
    made = plan_gpu_memory(
        large, wish, layers, dense_bytes=5_080_000_000, budget=int(12 * 0.9 * GIB)
    )
    assert made.num_pages * wish.page_size >= 8192
    assert made.total_needed <= made.budget_bytes


def test_experts_on_the_cpu_need_ram() -> None:
    check_host_memory(10 * GIB, 2 * GIB, 13 * GIB)
    with pytest.raises(ConfigError, match=r"10\.00 GiB of RAM .* 4\.00 GiB for KV .* 13\.00 GiB"):
        check_host_memory(10 * GIB, 4 * GIB, 13 * GIB)


def model(*types: int) -> Any:
    """A model with one expert tensor of each type, in layers 0, 1, ..."""
    tensors = {
        f"blk.{i}.ffn_up_exps.weight": SimpleNamespace(
            name=f"blk.{i}.ffn_up_exps.weight", num_bytes=100, type=kind, type_name=f"T{kind}"
        )
        for i, kind in enumerate(types)
    }
    return SimpleNamespace(files=SimpleNamespace(tensors=tensors), spec=DEMO_SPEC)


def test_the_flag_says_where_experts_lie() -> None:
    kernels = frozenset({12})
    auto = expert_wish(model(12, 16), Config(device="cuda:0"), kernels)
    assert (auto.layers, auto.limit, auto.usable) == (None, None, {0})
    given = expert_wish(model(12), Config(device="cuda:0", gpu_expert_mem="1.5"), kernels)
    assert (given.layers, given.limit) == (None, 1_500_000_000)
    every = Config(device="cuda:0", gpu_expert_mem="all")
    assert expert_wish(model(12, 12), every, kernels).layers == {0, 1}
    with pytest.raises(ConfigError, match=r"--gpu_expert_mem all .* blk\.1\.\S+ has type T16"):
        expert_wish(model(12, 16), every, kernels)


def test_a_rule_file_decides_before_the_flag(tmp_path: Path) -> None:
    rules = Config(optimize_config_path="Qwen3Moe-serve.yaml", gpu_expert_mem="all")
    assert expert_wish(model(12, 12), replace(rules, device="cuda:0"), frozenset({12})).layers == (
        frozenset()
    )
    first = tmp_path / "rules.yaml"
    first.write_text(
        r"""
- match: {name: "^model\\.layers\\.0\\.mlp\\.experts$"}
  replace:
    class: ktransformers.operators.experts.KTransformersExperts
    kwargs: {generate_device: "cuda", generate_op: "KExpertsMarlin"}
  recursive: False
- match: {name: "^model\\.layers\\..*\\.mlp\\.experts$"}
  replace:
    class: ktransformers.operators.experts.KTransformersExperts
    kwargs: {generate_device: "cpu", generate_op: "KExpertsCPU", out_device: "cuda"}
  recursive: False
"""
    )
    config = Config(device="cuda:0", optimize_config_path=str(first))
    assert rule_layers(DEMO_SPEC, config) == {0}


def test_only_a_gpu_has_a_second_tier() -> None:
    config = Config(device="cuda:0", cpu_memory_size_GB=1.0, page_size=32, kv_dtype="bf16")
    # 1 GB in 48 layers is 19.9 MiB each, of which a pinned tensor of 16 MiB holds 64 KiB a page.
    assert num_host_pages(SPEC, config) == (16 << 20) // (64 << 10)
    assert num_host_pages(SPEC, replace(config, cpu_memory_size_GB=0.0)) == 0
    assert num_host_pages(SPEC, replace(config, kv_dtype="fp8")) == (16 << 20) // (32 << 10)
    assert num_host_pages(SPEC, replace(config, device="cpu")) == 0
    assert num_host_pages(SPEC, replace(config, prefix_cache=False)) == 0
