"""Mutated GGUF headers: every outcome is a model or a ConfigError, in bounded time and memory."""

from __future__ import annotations

import struct
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kt_async.demo import DEMO_SPEC
from kt_async.errors import ConfigError
from kt_async.model.spec import spec_from_gguf
from kt_async.model.synthetic import metadata_from_spec
from kt_async.model.tensors import check_tensors
from kt_async.text.template import load_template
from kt_async.text.tokenizer import load_tokenizer
from kt_async.weights.source import open_model
from kt_async.weights.writer import TensorData, write_gguf

LIMITS = settings(
    max_examples=max(300, settings.default.max_examples),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


METADATA: dict[str, Any] = metadata_from_spec(DEMO_SPEC) | {
    "general.alignment": 32,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "qwen2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<|im_end|>"],
    "tokenizer.ggml.token_type": np.array([1, 1, 1, 3], np.int32),
    "tokenizer.ggml.scores": np.array([0, -1, -2, 0], np.float32),
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 3,
    "tokenizer.ggml.bos_token_id": 3,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.add_space_prefix": True,
    "tokenizer.ggml.precompiled_charsmap": np.zeros(0, np.uint8),
    "tokenizer.chat_template": "{{ messages[0].content }}",
    "qwen3moe.rope.scaling.type": "yarn",
    "qwen3moe.rope.scaling.factor": 4.0,
    "qwen3moe.rope.scaling.original_context_length": 64,
    "split.count": 1,
    "split.no": 0,
    "split.tensors.count": 2,
    "x.flag": True,
    "x.negative": -1,
}


def sample(metadata: dict[str, Any]) -> bytes:
    """A small file that has every kind of value."""
    tensors = [
        TensorData("token_embd.weight", 0, (8, 4), [bytes(128)]),
        TensorData("blk.0.attn_q.weight", 8, (2, 32), [bytes(68)]),
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        write_gguf(path, metadata, tensors)
        return path.read_bytes()


SAMPLE = sample(METADATA)
HEADER = len(SAMPLE) - 128 - 96
INTERESTING = [0, 1, 2, 7, 8, 9, 31, 255, 1 << 16, (1 << 31) - 1, (1 << 32) - 1, 1 << 40, 1 << 62]

replace_bytes = st.tuples(
    st.integers(0, HEADER), st.binary(min_size=1, max_size=8), st.just("replace")
)
replace_number = st.tuples(
    st.integers(0, HEADER),
    st.sampled_from(INTERESTING).map(lambda n: struct.pack("<Q", n)),
    st.just("replace"),
)
insert = st.tuples(st.integers(0, HEADER), st.binary(max_size=16), st.just("insert"))
cut = st.tuples(st.integers(0, len(SAMPLE)), st.just(b""), st.just("cut"))
mutations = st.lists(st.one_of(replace_bytes, replace_number, insert, cut), min_size=1, max_size=4)


def mutate(changes: list[tuple[int, bytes, str]]) -> bytes:
    data = SAMPLE
    for place, new, how in changes:
        if how == "replace":
            data = data[:place] + new + data[place + len(new) :]
        elif how == "insert":
            data = data[:place] + new + data[place:]
        else:
            data = data[:place]
    return data


def open_everything(path: Path) -> None:
    """What start-up reads of a file, without its weights."""
    files = open_model(path)
    for name in files.tensors:
        assert files.data(name).size == files.tensors[name].num_bytes
        files.prefetch(name)
        files.release(name)
    for step in (
        lambda: check_tensors(spec_from_gguf(files), files),
        lambda: load_template(files, load_tokenizer(files)),
    ):
        try:
            step()
        except ConfigError as error:
            check_sentence(error)
    files.close()


def check_sentence(error: ConfigError) -> None:
    sentence = str(error)
    assert sentence.endswith(".")
    assert len(sentence) < 1000


@LIMITS
@given(changes=mutations)
def test_mutated_headers(tmp_path: Path, changes: list[tuple[int, bytes, str]]) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(mutate(changes))
    try:
        open_everything(path)
    except ConfigError as error:
        check_sentence(error)
        assert str(path) in str(error)


@LIMITS
@given(content=st.binary(max_size=300))
def test_random_bytes_behind_the_magic(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + content)
    try:
        open_everything(path)
    except ConfigError as error:
        check_sentence(error)


WRONG: list[Any] = [
    "",
    "x",
    -1,
    1 << 40,
    1.5,
    float("nan"),
    True,
    [],
    ["x"],
    np.zeros(0, np.int32),
    np.array([7, -7, 7, 7], np.int32),
    np.array([1.5] * 4, np.float32),
]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("key", METADATA)
def test_values_of_a_wrong_type(tmp_path: Path, key: str, kind: str) -> None:
    path = tmp_path / "m.gguf"
    for value in WRONG:
        path.write_bytes(sample(METADATA | {"tokenizer.ggml.model": kind, key: value}))
        try:
            open_everything(path)
        except ConfigError as error:
            check_sentence(error)


def test_memory_is_bounded_by_the_file(tmp_path: Path) -> None:
    """A hole of a gigabyte that claims to be strings costs neither memory nor time."""
    path = tmp_path / "m.gguf"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    head += struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 8, 1 << 19)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(1 << 30)
    tracemalloc.start()
    try:
        open_model(path)  # half a million empty strings: valid
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20 << 20
    with path.open("r+b") as file:
        file.seek(len(head) - 8)
        file.write(struct.pack("<Q", (1 << 22) + 1))
    try:
        open_model(path)
    except ConfigError as error:
        assert "claims 4194305 elements" in str(error)
    else:
        raise AssertionError("an absurd count was accepted")


def test_the_unchanged_sample_opens(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(SAMPLE)
    files = open_model(path)
    assert load_tokenizer(files).encode("ab<|im_end|>") == [2, 3]
    assert spec_from_gguf(files).num_layers == DEMO_SPEC.num_layers
