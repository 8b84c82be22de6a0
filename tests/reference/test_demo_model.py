"""The shipped demo model: facts of the file, and that its data agrees with the program."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from gguf import GGMLQuantizationType, GGUFReader, quants

from bench.demo_model import measure, numbers_days, stories
from bench.demo_model import questions as q
from bench.demo_model.conversations import Generator
from bench.demo_model.quantize import quantize
from kt_async.config import default_of, options
from kt_async.demo import PACKAGED
from kt_async.model.spec import spec_from_gguf
from kt_async.model.tensors import check_tensors
from kt_async.text.tokenizer import load_tokenizer
from kt_async.weights.source import open_model
from tests.reference.quantize import quantize as plain_quantize

HERE = Path(measure.__file__).parent


def load(name: str) -> Any:
    return yaml.safe_load((HERE / name).read_text(encoding="utf-8"))


def test_the_file_is_a_small_qwen3moe() -> None:
    assert PACKAGED.stat().st_size <= 16_000_000
    files = open_model(PACKAGED)
    spec = spec_from_gguf(files)
    check_tensors(spec, files)
    assert (spec.architecture, spec.num_layers, spec.num_experts, spec.top_k) == (
        "qwen3moe", 6, 16, 4,
    )  # fmt: skip
    kinds = {name: info.type_name for name, info in files.tensors.items()}
    assert set(kinds.values()) == {"F32", "Q8_0", "Q4_K", "Q6_K"}
    experts = {kind for name, kind in kinds.items() if "_exps" in name}
    assert experts == {"Q4_K", "Q6_K"}
    assert files.metadata["general.license"] == "apache-2.0"


def test_tokens_and_template_are_those_of_qwen() -> None:
    files = open_model(PACKAGED)
    meta = files.metadata
    tokens = list(meta["tokenizer.ggml.tokens"])
    assert len(tokens) == len(set(tokens)) == 4096
    assert meta["tokenizer.ggml.pre"] == "qwen2"
    assert tokens[meta["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"
    assert {"<|endoftext|>", "<|im_start|>", "<think>"} <= set(tokens)
    assert "<|im_start|>" in meta["tokenizer.chat_template"]


@pytest.mark.parametrize(
    "text",
    ["How do I start kt_async?", "怎么启动服务器", "`--max_batch_size 8` naïve  \n x", "€ 7+8"],
)
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = load_tokenizer(open_model(PACKAGED))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_model_knows_every_flag_and_no_other() -> None:
    flags = {item["flag"]: item for item in load("flags.yaml")}
    assert set(flags) == {name for name, _, _ in options()}
    for name, item in flags.items():
        words = re.findall(r"[\w.]+", item["default"] + " " + str(item.get("value", "")))
        default = default_of(name)
        if isinstance(default, bool):
            assert ("on" if default else "off") in words or not default, name
        elif isinstance(default, tuple):
            assert all(part in item["default"] for part in default), name
        elif default:
            shown = str(int(default)) if default == int_or_none(default) else str(default)
            assert shown in item["default"], f"{name}: {default} is not in {item['default']!r}"
        assert re.match(rf"--(no-)?{name}\b", item["use"]), name


def int_or_none(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else None


def test_facts_name_only_real_flags() -> None:
    names = [name for name, _, _ in options()]
    talk = load("talk.yaml")
    says = [say for item in load("facts.yaml") for say in item["say"]]
    says += [
        say for part in ("small_talk", "chinese") for item in talk[part] for say in item["say"]
    ]
    assert [(say, bad) for say in says if (bad := measure.wrong_flags(say, names))] == []
    assert measure.wrong_flags("use `--portt 1` and --max-batch-size", names) == ["portt"]


def test_every_answer_holds_its_own_key_phrases() -> None:
    items = [*load("facts.yaml"), *load("talk.yaml")["chinese"]]
    assert [item["id"] for item in items if not measure.is_right(item["say"][0], item["key"])] == []
    assert not measure.is_right("The port is 8080.", ["10002"])


def test_held_out_questions_are_never_generated() -> None:
    held = [q.normalise(item["ask"]) for item in load("held_out.yaml")]
    assert sum(item["set"] == "test" for item in load("held_out.yaml")) == 100
    maker = Generator(12345)
    asked = [
        q.normalise(message["content"])
        for _ in range(3000)
        for message in maker.conversation()
        if message["role"] == "user"
    ]
    assert len(asked) > 5000
    assert not [text for text in asked if any(one in text for one in held)]


def test_the_same_seed_gives_the_same_conversations() -> None:
    one, two = Generator(5), Generator(5)
    assert [one.conversation() for _ in range(50)] == [two.conversation() for _ in range(50)]


def test_numbers_in_the_data_are_right() -> None:
    rng = random.Random(3)
    for _ in range(500):
        for _, say in numbers_days.sums(rng):
            if match := re.fullmatch(r"(\d+) ([+-]) (\d+) = (\d+)\.", say):
                a, sign, b, result = match.groups()
                assert int(result) == (int(a) + int(b) if sign == "+" else int(a) - int(b)) <= 20
            else:
                assert say == numbers_days.LIMIT


def test_stories_keep_their_characters() -> None:
    rng = random.Random(4)
    for _ in range(200):
        story = stories.tell(rng)
        assert story.hero != story.friend and story.hero_kind != story.friend_kind
        others = (set(stories.SHE) | set(stories.HE)) - {story.hero, story.friend}
        assert not [name for name in others if re.search(rf"\b{name}\b", story.text)]
        assert "{" not in story.text


@pytest.mark.parametrize(("kind", "limit"), [("Q8_0", 0.006), ("Q4_K", 0.075), ("Q6_K", 0.02)])
def test_encoders_against_the_gguf_package(kind: str, limit: float) -> None:
    """limit: relative rms error on normal weights; Q4_K and Q6_K also beat plain min/max scales."""
    x = np.random.default_rng(1).normal(size=(64, 512)).astype(np.float32)
    x[0], x[1], x[2], x[3] = 0, 1, -0.25, np.abs(x[3])

    def error(data: np.ndarray) -> float:
        back = quants.dequantize(data, GGMLQuantizationType[kind])
        assert np.isfinite(back).all()
        return float(np.sqrt(((back - x) ** 2).mean() / (x**2).mean()))

    ours = error(quantize(x, kind))
    assert ours < limit
    if kind != "Q8_0":
        assert ours < error(plain_quantize(x, kind))


def test_zero_weights_stay_zero() -> None:
    for kind in ("Q8_0", "Q4_K", "Q6_K"):
        back = quants.dequantize(quantize(np.zeros((2, 256), np.float32), kind),
                                 GGMLQuantizationType[kind])  # fmt: skip
        assert not back.any()


def test_no_expert_is_unused_by_its_router() -> None:
    """A dead expert shows as a router row or expert weights that never left their start."""
    for tensor in GGUFReader(PACKAGED).tensors:
        if "ffn_gate_inp" in tensor.name or "_exps" in tensor.name:
            values = quants.dequantize(tensor.data, tensor.tensor_type).reshape(16, -1)
            spread = values.std(axis=1)
            assert spread.min() > 0.25 * spread.max(), tensor.name
