"""How a GPU's memory is divided, by hand-made numbers; needs no GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kt_async.config import Config
from kt_async.demo import DEMO_SPEC
from kt_async.engine.build import expert_placement, num_host_pages
from kt_async.engine.memory import GpuMemoryPlan, KvWish, plan_gpu_memory
from kt_async.errors import ConfigError

GIB = 1 << 30
# 96 KiB of bf16 KV per token, 17 GiB of experts: Qwen3-30B-A3B in Q4_K_M.
SPEC = replace(DEMO_SPEC, num_layers=48, num_kv_heads=4, head_dim=128, v_head_dim=128)


def plan(
    budget_gib: float, expert_mem: str = "auto", cache_lens: int | None = None
) -> GpuMemoryPlan:
    return plan_gpu_memory(
        SPEC,
        KvWish(page_size=32, max_model_len=8192, max_batch_size=4, cache_lens=cache_lens),
        dense_bytes=1 * GIB,
        expert_bytes=17 * GIB,
        budget=int(budget_gib * GIB),
        expert_mem=expert_mem,
    )


def test_experts_go_to_the_gpu_when_everything_fits() -> None:
    assert plan(24).experts_in_vram
    assert not plan(16).experts_in_vram
    assert not plan(24, "none").experts_in_vram


def test_everything_stays_within_the_budget() -> None:
    for budget in (5, 8, 12, 24, 80):
        made = plan(budget)
        experts = made.expert_bytes if made.experts_in_vram else 0
        assert made.dense_bytes + experts + made.kv_bytes + made.work_bytes <= made.budget_bytes
        assert made.kv_bytes == made.num_pages * 32 * (96 << 10)


def test_too_little_memory_is_refused_with_numbers() -> None:
    with pytest.raises(ConfigError, match=r"2\.00 GiB to use.*1\.00 GiB"):
        plan(2)
    with pytest.raises(ConfigError, match=r"experts 17\.00 GiB"):
        plan(12, "all")
    with pytest.raises(ConfigError, match="the largest value that fits is"):
        plan(8, cache_lens=1_000_000)


def test_a_rule_file_decides_where_experts_lie() -> None:
    assert expert_placement(DEMO_SPEC, Config(device="cuda:0")) == "auto"
    rules = Config(device="cuda:0", optimize_config_path="Qwen3Moe-serve.yaml")
    assert expert_placement(DEMO_SPEC, rules) == "none"


def test_only_a_gpu_has_a_second_tier() -> None:
    config = Config(device="cuda:0", cpu_memory_size_GB=1.0, page_size=32)
    assert num_host_pages(SPEC, config) == 1_000_000_000 // (32 * (96 << 10))
    assert num_host_pages(SPEC, replace(config, device="cpu")) == 0
    assert num_host_pages(SPEC, replace(config, prefix_cache=False)) == 0
