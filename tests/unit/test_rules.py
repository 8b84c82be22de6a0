"""Rule files: syntax, names, matching, fallbacks, and the files that come with kt_async."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from kt_async.config import Config
from kt_async.errors import ConfigError
from kt_async.model.spec import ModelSpec, RopeSpec
from kt_async.weights.modules import list_modules
from kt_async.weights.placement import Placement, place
from kt_async.weights.plan import PlanHost, plan_text
from kt_async.weights.rules import find_rules, load_rules, rules_folder

RULE_FILES = sorted(file.name for file in rules_folder().glob("*.yaml"))
PUBLISHED_NAMES = [
    "DeepSeek-V2-Chat",
    "DeepSeek-V2-Chat-multi-gpu",
    "DeepSeek-V2-Chat-multi-gpu-4",
    "DeepSeek-V2-Lite-Chat",
    "DeepSeek-V2-Lite-Chat-gpu-cpu",
    "DeepSeek-V2-Lite-Chat-multi-gpu",
    "DeepSeek-V3-Chat",
    "DeepSeek-V3-Chat-amx",
    "DeepSeek-V3-Chat-fp8-linear-ggml-experts",
    "DeepSeek-V3-Chat-fp8-linear-ggml-experts-serve",
    "DeepSeek-V3-Chat-fp8-linear-ggml-experts-serve-amx",
    "DeepSeek-V3-Chat-multi-gpu",
    "DeepSeek-V3-Chat-multi-gpu-4",
    "DeepSeek-V3-Chat-multi-gpu-8",
    "DeepSeek-V3-Chat-multi-gpu-fp8-linear-ggml-experts",
    "DeepSeek-V3-Chat-multi-gpu-marlin",
    "DeepSeek-V3-Chat-serve",
    "Moonlight-16B-A3B",
    "Moonlight-16B-A3B-serve",
    "Qwen2-57B-A14B-Instruct",
    "Qwen2-57B-A14B-Instruct-multi-gpu",
    "Qwen2-serve",
    "Qwen2-serve-amx",
    "Qwen3Moe-serve",
    "Qwen3Moe-serve-amx",
]


def make_spec(architecture: str = "qwen3moe", num_layers: int = 4, **values: object) -> ModelSpec:
    latent = architecture == "deepseek2"
    fields: dict[str, object] = {
        "architecture": architecture,
        "name": "test",
        "num_layers": num_layers,
        "hidden_size": 64,
        "vocab_size": 1000,
        "max_context": 4096,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "rms_eps": 1e-6,
        "rope": RopeSpec(theta=1e4, dim=16),
        "intermediate_size": 128,
        "num_experts": 8,
        "top_k": 2,
        "moe_intermediate_size": 32,
        "qk_norm": architecture == "qwen3moe",
        "shared_intermediate_size": 0 if architecture == "qwen3moe" else 64,
        "num_dense_layers": 1 if latent else 0,
        "kv_lora_rank": 32 if latent else 0,
    }
    return ModelSpec(**(fields | values))  # type: ignore[arg-type]


SPECS = {
    "Qwen3": make_spec(num_layers=48),
    "Qwen2": make_spec("qwen2moe", num_layers=28),
    "DeepSeek-V3": make_spec("deepseek2", num_layers=61, q_lora_rank=16),
    "DeepSeek-V2-Chat": make_spec("deepseek2", num_layers=60, q_lora_rank=16),
    "DeepSeek-V2-Lite": make_spec("deepseek2", num_layers=27),
    "Moonlight": make_spec("deepseek2", num_layers=27),
}


def rule(tmp_path: Path, text: str) -> str:
    file = tmp_path / "rules.yaml"
    file.write_text(text)
    return str(file)


def devices(placement: Placement) -> dict[str, str]:
    return {placed.module.name: placed.device for placed in placement.modules}


def problem(spec: ModelSpec, path: str) -> str:
    with pytest.raises(ConfigError) as caught:
        place(spec, rules_path=path, num_gpus=1)
    return str(caught.value)


# ---- files that come with the project


def test_published_names_are_there() -> None:
    assert {f"{name}.yaml" for name in PUBLISHED_NAMES} <= set(RULE_FILES)


@pytest.mark.parametrize("name", RULE_FILES)
def test_shipped_file_fits_its_model(name: str) -> None:
    spec = next(spec for prefix, spec in SPECS.items() if name.startswith(prefix))
    placement = place(spec, rules_path=name, device="cuda:0", num_gpus=8, amx=True)
    assert placement.warnings == ()
    for placed in placement.modules:
        if placed.module.kind in {"experts", "embedding"}:
            assert placed.device == "cpu", placed
        elif "gpu-cpu" not in name and placed.module.tensors:
            assert placed.device.startswith("cuda"), placed
    used = {d for d in devices(placement).values() if d != "cpu"}
    count = 8 if name.endswith("-8.yaml") else 4 if name.endswith("-4.yaml") else None
    count = count or (2 if "multi-gpu" in name else 1)
    assert used == {f"cuda:{index}" for index in range(count)}


@pytest.mark.parametrize("name", RULE_FILES)
def test_without_gpu_everything_is_on_the_cpu_with_one_warning(name: str) -> None:
    spec = next(spec for prefix, spec in SPECS.items() if name.startswith(prefix))
    placement = place(spec, rules_path=name, num_gpus=0)
    assert set(devices(placement).values()) == {"cpu"}
    assert len(placement.warnings) == 1


def test_fewer_gpus_than_the_rules_name() -> None:
    placement = place(
        SPECS["DeepSeek-V3"], rules_path="DeepSeek-V3-Chat-multi-gpu-4.yaml", num_gpus=2
    )
    assert set(devices(placement).values()) == {"cpu", "cuda:0", "cuda:1"}
    assert "cuda:2, cuda:3" in placement.warnings[0]


def test_old_path_resolves_by_name() -> None:
    old = "ktransformers/optimize/optimize_rules/Qwen3Moe-serve.yaml"
    assert find_rules(old) == rules_folder() / "Qwen3Moe-serve.yaml"
    assert find_rules(old.replace("/", "\\")).name == "Qwen3Moe-serve.yaml"


def test_amx_rules_without_amx_warn_once() -> None:
    placement = place(SPECS["Qwen3"], rules_path="Qwen3Moe-serve-amx.yaml", num_gpus=1, amx=False)
    assert len(placement.warnings) == 1
    assert "AMXBF16" in placement.warnings[0]


# ---- matching


def test_derived_placement() -> None:
    spec = make_spec()
    on_gpu = devices(place(spec, device="cuda:0", num_gpus=1))
    assert on_gpu["model.layers.3.mlp.experts"] == "cpu"
    assert on_gpu["model.layers.3.self_attn.q_proj"] == "cuda:0"
    assert set(devices(place(spec)).values()) == {"cpu"}


def test_first_match_wins(tmp_path: Path) -> None:
    path = rule(
        tmp_path,
        "- match: {name: 'layers\\.[01]\\.self_attn'}\n"
        "  replace: {class: default, kwargs: {generate_device: cpu}}\n"
        "- match: {name: 'self_attn'}\n"
        "  replace: {class: default, kwargs: {generate_device: 'cuda:0'}}\n",
    )
    found = devices(place(make_spec(), rules_path=path, num_gpus=1))
    assert found["model.layers.1.self_attn.q_proj"] == "cpu"
    assert found["model.layers.2.self_attn.q_proj"] == "cuda:0"


def test_name_and_class_must_both_hold(tmp_path: Path) -> None:
    path = rule(
        tmp_path,
        "- match: {name: 'self_attn', class: torch.nn.Linear}\n"
        "  replace: {class: default, kwargs: {generate_device: cpu}}\n",
    )
    found = devices(place(make_spec(), rules_path=path, num_gpus=1))
    assert found["model.layers.0.self_attn.k_proj"] == "cpu"
    assert found["model.layers.0.self_attn.k_norm"] == "cuda:0"


def test_recursive_false_decides_for_children(tmp_path: Path) -> None:
    text = (
        "- match: {name: 'self_attn$'}\n"
        "  replace: {class: ktransformers.operators.attention.KQwen3MoeAttention,\n"
        "            kwargs: {generate_device: cpu}}\n"
        "  recursive: %s\n"
    )
    for recursive, device in (("True", "cuda:0"), ("False", "cpu")):
        found = devices(place(make_spec(), rules_path=rule(tmp_path, text % recursive), num_gpus=1))
        assert found["model.layers.0.self_attn"] == "cpu"
        assert found["model.layers.0.self_attn.q_proj"] == device


def test_rule_for_a_class_the_model_lacks_is_noted(tmp_path: Path) -> None:
    path = rule(
        tmp_path,
        "- match: {class: ktransformers.models.modeling_qwen3_moe.Qwen3MoeMLP}\n"
        "  replace: {class: ktransformers.operators.mlp.KQwen2MoeMLP}\n",
    )
    placement = place(make_spec(), rules_path=path, num_gpus=1)
    assert "rule 1" in placement.notes[0]


# ---- mistakes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("match: 1", "must hold a list of rules"),
        ("- 5", "must be a mapping"),
        ("- match: {nam: x}\n  replace: {}", "unknown key 'nam'; did you mean name?"),
        ("- match: {name: x}\n  replce: {}", "unknown key 'replce'; did you mean replace?"),
        ("- match: {name: x}\n  replace: {kwargs: {generate_devce: cpu}}", "generate_device?"),
        ("- match: {name: x}\n  replace: {kwargs: {generate_device: tpu}}", "valid are cpu, cuda"),
        ("- match: {name: x}\n  replace: {class: a.KTransformerLiner}", "KTransformerLinear?"),
        ("- match: {class: torch.nn.Liner}\n  replace: {}", "did you mean Linear?"),
        ("- match: {name: '('}\n  replace: {}", "no regular expression"),
        ("- match: {}\n  replace: {}", "needs a name or a class"),
        ("- match: {name: x}\n  replace: {kwargs: {backend: AMXInt4}}", "did you mean AMXInt8?"),
        ("- match: {name: x}\n  replace: {}\n  recursive: 3", "valid are True and False"),
        (
            (
                "- match: {name: experts}\n  replace: {class: o.KTransformersExperts, "
                "kwargs: {generate_device: cuda, generate_op: KExpertsCPU}}"
            ),
            "KExpertsCPU does not run on generate_device cuda",
        ),
        ("- match: {name: x\n", "is not valid YAML"),
        ("- match: !!python/object:os.system {}\n", "is not valid YAML"),
    ],
)
def test_mistakes_are_named(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_rules(Path(rule(tmp_path, text)))
    assert words in str(caught.value)


def test_all_mistakes_of_a_file_at_once(tmp_path: Path) -> None:
    path = rule(tmp_path, "- match: {nam: x}\n  replace: {}\n- match: {name: '('}\n  replace: {}\n")
    with pytest.raises(ConfigError) as caught:
        load_rules(Path(path))
    assert [line.partition(": ")[2][:6] for line in str(caught.value).splitlines()] == [
        "rule 1",
        "rule 2",
    ]


def test_rule_without_module_is_an_error(tmp_path: Path) -> None:
    path = rule(tmp_path, "- match: {name: '^model.layers.9.mlp$'}\n  replace: {}\n")
    text = problem(make_spec(), path)
    assert "rule 1" in text and "4 layers" in text
    assert "the nearest module is model.layers." in text


def test_operator_on_the_wrong_module(tmp_path: Path) -> None:
    path = rule(
        tmp_path,
        "- match: {name: 'mlp.experts$'}\n"
        "  replace: {class: ktransformers.operators.attention.flashinfer_attn}\n",
    )
    assert "operator for attention on model.layers.0.mlp.experts" in problem(make_spec(), path)


def test_wrong_file_name_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean Qwen3Moe-serve\.yaml"):
        find_rules("rules/Qwen3Moe-srve.yaml")


# ---- modules and --plan


@dataclass
class Tensor:
    num_bytes: int
    type_name: str = "Q8_0"


def tensors_of(spec: ModelSpec) -> dict[str, Tensor]:
    return {
        name: Tensor(1_000_000 if "_exps" in name else 1000)
        for module in list_modules(spec)
        for name in module.tensors
    }


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_module_names_are_unique_and_ordered(spec: ModelSpec) -> None:
    names = [module.name for module in list_modules(spec)]
    assert len(set(names)) == len(names)
    for index, name in enumerate(names):
        parent = name.rpartition(".")[0]
        assert not parent or parent in names[:index], name


def test_plan_adds_up() -> None:
    spec = make_spec()
    tensors = tensors_of(spec) | {"rope_freqs.weight": Tensor(500_000, "F32")}
    config = Config(device="cpu", max_batch_size=4)
    text = plan_text(spec, tensors, config, PlanHost(10**9, cpu_bytes_per_s=1e9))
    total = sum(tensor.num_bytes for tensor in tensors.values())
    assert f"cpu: {total / 1e6:.2f} MB of weights, 1.00 GB free: fits" in text
    # One request reads 2 of 8 experts; four requests read 1 - (3/4)^4 of them.
    experts = 12e6
    dense = total - experts - 500_000 - 1000
    assert f"a step of 1 request reads {(dense + experts / 4) / 1e6:.2f} MB of RAM" in text
    union = experts * (1 - 0.75**4)
    assert f"a step of 4 requests reads {(dense + union) / 1e6:.2f} MB of RAM" in text
    assert f"at most {1e9 / (dense + experts / 4 + 1):.1f} tokens/s" in text


def test_plan_of_a_gpu_shows_where_experts_lie() -> None:
    spec = make_spec()
    tensors = tensors_of(spec)
    config = Config(device="cuda:0", vram_layers=(0,), max_batch_size=1, cache_lens=64)
    host = PlanHost(10**9, 1e9, gpu_bytes=(10**9,), gpu_bytes_per_s=1e10)
    text = plan_text(spec, tensors, config, host)
    experts = [line.split() for line in text.splitlines() if line.startswith("routed experts")]
    assert sorted(line[2] for line in experts) == ["cpu", "cuda:0"]
    assert "embedding       cuda:0" in text
    assert "tokens/s" in text


def test_plan_with_gpu_and_without_bandwidth() -> None:
    spec = make_spec()
    tensors = tensors_of(spec)
    config = Config(device="cuda:0", optimize_config_path="Qwen3Moe-serve.yaml")
    text = plan_text(spec, tensors, config, PlanHost(10**6, gpu_bytes=(10**9,), has_amx=False))
    assert "DOES NOT FIT" in text and "cuda:0" in text
    assert "no speed bound" in text and "tokens/s" not in text
