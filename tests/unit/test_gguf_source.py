"""Opening GGUF models: layout, splits, directories, and a sentence for every defect."""

from __future__ import annotations

import itertools
import mmap
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from kt_async.errors import ConfigError
from kt_async.weights.source import TYPES, open_model
from kt_async.weights.writer import TensorData, write_gguf


def tensor(name: str, shape: tuple[int, ...] = (4, 8), seed: int = 0) -> TensorData:
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return TensorData(name, 0, shape, [values.tobytes()])


def write(path: Path, *names: str, **metadata: Any) -> Path:
    keys = {key.replace("__", "."): value for key, value in metadata.items()}
    write_gguf(path, keys, [tensor(name, seed=i) for i, name in enumerate(names)])
    return path


def test_type_table_agrees_with_the_gguf_package() -> None:
    theirs = {
        int(kind): (kind.name, block, size) for kind, (block, size) in gguf.GGML_QUANT_SIZES.items()
    }
    # Newer packages may know more types than we do, but none differently.
    assert {kind: theirs[kind] for kind in TYPES if kind in theirs} == {
        kind: TYPES[kind] for kind in TYPES if kind in theirs
    }
    assert {0, 1, 8, 12, 14, 30} <= set(TYPES) & set(theirs)


def test_reads_what_the_gguf_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_uint32("x.u32", 7)
    writer.add_uint64("x.u64", 1 << 40)
    writer.add_int32("x.i32", -7)
    writer.add_float32("x.f32", 0.5)
    writer.add_float64("x.f64", 1e-300)
    writer.add_bool("x.yes", True)
    writer.add_string("x.text", "Grüße")
    writer.add_array("x.strings", ["a", "", "ö"])
    writer.add_array("x.ints", [1, -2, 3])
    writer.add_array("x.floats", [0.5, 1.5])
    values = np.arange(2 * 3 * 8, dtype=np.float32).reshape(2, 3, 8)
    writer.add_tensor("t3", values)
    blocks = gguf.quants.quantize(values.repeat(4, axis=2), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("t8", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files = open_model(path)
    expected = {"u32": 7, "u64": 1 << 40, "i32": -7, "f32": 0.5, "f64": 1e-300, "yes": True}
    for key, value in expected.items():
        assert files.metadata[f"x.{key}"] == value
        assert type(files.metadata[f"x.{key}"]) is type(value)
    assert files.metadata["x.text"] == "Grüße"
    assert files.metadata["x.strings"] == ["a", "", "ö"]
    assert files.metadata["x.ints"].tolist() == [1, -2, 3]
    assert files.metadata["x.floats"].tolist() == [0.5, 1.5]
    info = files.tensors["t3"]
    assert (info.shape, info.type_name, info.num_bytes) == ((2, 3, 8), "F32", 192)
    assert (files.data("t3").view(np.float32).reshape(2, 3, 8) == values).all()
    assert files.tensors["t8"].shape == (2, 3, 32)
    assert (files.data("t8") == blocks.reshape(-1)).all()


def test_what_we_write_the_gguf_package_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    metadata = {
        "general.architecture": "qwen3moe",
        "a.bool": True,
        "a.int": 3,
        "a.negative": -3,
        "a.big": 1 << 40,
        "a.float": 0.25,
        "a.list": ["x", "yy"],
        "a.array": np.array([1, 2], np.int32),
    }
    write_gguf(path, metadata, [tensor("one"), tensor("two", (3, 5))])
    reader = gguf.GGUFReader(path)
    for key, value in metadata.items():
        got = reader.fields[key].contents()
        assert got == (value.tolist() if isinstance(value, np.ndarray) else value)
    ours = open_model(path)
    for theirs in reader.tensors:
        assert theirs.data.tobytes() == ours.data(theirs.name).tobytes()
        assert tuple(theirs.shape)[::-1] == ours.tensors[theirs.name].shape


def test_writer_refuses_a_tensor_of_the_wrong_size_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bytes written"):
        write_gguf(tmp_path / "a.gguf", {}, [TensorData("x", 0, (4,), [b"123"])])
    assert not list(tmp_path.iterdir())


def test_data_outlives_close_and_advice_does_not_change_it(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path, {}, [tensor("x", (300, 100)), tensor("y", (300, 100), seed=1)])
    files = open_model(path)
    before = files.data("y").copy()
    files.prefetch("y")
    files.release("x")
    files.release("y")
    view = files.data("y")
    assert (view == before).all()
    assert files.address("y") % 32 == 0
    assert not view.flags.writeable
    files.close()
    files.close()
    assert (view == before).all()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_release_gives_pages_back(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    size = 32 << 20
    write_gguf(path, {}, [TensorData("x", 24, (size,), [bytes(size)]), tensor("y")])
    files = open_model(path)
    before = resident_bytes()
    assert int(files.data("x").sum()) == 0
    touched = resident_bytes()
    files.release("x")
    assert touched - before > size * 0.8
    assert resident_bytes() - before < size * 0.2


def test_large_vocabulary_opens_quickly(tmp_path: Path) -> None:
    tokens = [f"token{i}" for i in range(152_000)]
    path = tmp_path / "big.gguf"
    write_gguf(path, {"t.tokens": tokens, "t.merges": [f"{t} {t}" for t in tokens]}, [tensor("x")])
    start = time.perf_counter()
    files = open_model(path)
    took = time.perf_counter() - start
    assert files.metadata["t.tokens"] == tokens
    assert took < 0.5 * 3, f"{took:.2f} s"  # 0.1 s on an idle core; the margin is for busy ones


# ---- splits and directories ----


def shards(folder: Path, count: int = 3, total: int = 3, prefix: str = "m") -> list[Path]:
    result = []
    for i in range(count):
        keys: dict[str, Any] = {
            "split__no": i,
            "split__count": count,
            "split__tensors__count": total,
        }
        path = folder / f"{prefix}-{i + 1:05}-of-{count:05}.gguf"
        result.append(write(path, f"t{i}", **keys, general__name=f"shard {i}"))
    return result


def test_any_shard_and_the_directory_open_the_whole_model(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    for start in (*paths, tmp_path):
        files = open_model(start)
        assert list(files.tensors) == ["t0", "t1", "t2"]
        assert files.metadata["general.name"] == "shard 0"
        assert files.total_bytes == sum(p.stat().st_size for p in paths)
        assert files.tensors["t2"].file == paths[2]


def test_missing_shard_is_named(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    paths[1].unlink()
    for start in (paths[0], paths[2], tmp_path):
        with pytest.raises(ConfigError, match=r"m-00002-of-00003.gguf: shard is missing"):
            open_model(start)


def test_split_totals_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs 4 tensors, its files hold 3"):
        open_model(shards(tmp_path, total=4)[0])


def test_renamed_shard_is_noticed(tmp_path: Path) -> None:
    path = shards(tmp_path)[0].rename(tmp_path / "alone.gguf")
    with pytest.raises(ConfigError, match="one of 3 split files, 1 found"):
        open_model(path)
    swapped = shards(tmp_path, prefix="s")
    swapped[1].rename(tmp_path / "x")
    swapped[2].rename(swapped[1])
    (tmp_path / "x").rename(swapped[2])
    with pytest.raises(ConfigError, match="split number 2, its name says 1"):
        open_model(swapped[0])


def test_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for i in (1, 2):
        write(tmp_path / f"d-0000{i}-of-00002.gguf", "same", split__no=i - 1, split__count=2)
    with pytest.raises(ConfigError, match=r"tensor 'same' is already in d-00001-of-00002.gguf"):
        open_model(tmp_path)


def test_directory_rules(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no .gguf file"):
        open_model(tmp_path)
    (tmp_path / "Q4").mkdir()
    inner = write(tmp_path / "Q4" / "a.gguf", "t")
    assert open_model(tmp_path).path == inner
    own = write(tmp_path / "b.gguf", "t")
    write(tmp_path / "mmproj-b.gguf", "t")
    assert open_model(tmp_path).path == own
    write(tmp_path / "c.gguf", "t")
    with pytest.raises(ConfigError, match=r"holds 2 models, name one of them: b.gguf, c.gguf"):
        open_model(tmp_path)
    with pytest.raises(ConfigError, match="no such file or directory"):
        open_model(tmp_path / "nothing.gguf")


# ---- defects ----


def header(*tensors: bytes, keys: bytes = b"", num_keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, len(tensors), num_keys) + keys + b"".join(tensors)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(name: str = "t", dims: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def key(name: str, kind: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + payload


PAD = bytes(4096)
U32 = struct.pack("<I", 1)
DEFECTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "magic": (b"GGML" + PAD, "is not a GGUF file"),
    "four bytes": (b"GGUF", "is truncated"),
    "version": (header(version=1), "GGUF version 1; versions 2 and 3"),
    "big endian": (header(version=0x03000000), "big-endian"),
    "tensor count": (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0) + PAD, "tensors, which cannot"),
    "key count": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60) + PAD, "metadata keys, which"),
    "truncated key": (header(keys=text("abc")[:-1], num_keys=1) + b"", "is truncated"),
    "long key": (header(keys=struct.pack("<Q", 1 << 40), num_keys=1) + PAD, "a length of"),
    "utf-8 key": (header(keys=text(b"\xff\xfe"), num_keys=1) + PAD, "is not valid UTF-8"),
    "value type": (header(keys=key("k", 99, b""), num_keys=1) + PAD, "unknown value type 99"),
    "nested": (
        header(keys=key("k", 9, struct.pack("<IQ", 9, 1)), num_keys=1) + PAD,
        "'k' has a nested array",
    ),
    "long array": (
        header(keys=key("k", 9, struct.pack("<IQ", 4, 1 << 40)), num_keys=1) + PAD,
        "'k' claims 1099511627776 elements",
    ),
    "short array": (
        header(keys=key("k", 9, struct.pack("<IQ", 4, 1 << 16)), num_keys=1) + PAD,
        "is truncated",
    ),
    "short strings": (
        header(keys=key("k", 9, struct.pack("<IQ", 8, 1000)), num_keys=1) + PAD,
        "'k' needs 1000 strings, 512 could be read",
    ),
    "duplicate key": (
        header(keys=key("k", 4, U32) * 2, num_keys=2) + PAD,
        "metadata key 'k' appears twice",
    ),
    "alignment": (
        header(keys=key("general.alignment", 4, struct.pack("<I", 24)), num_keys=1) + PAD,
        "general.alignment is 24",
    ),
    "dimensions": (header(entry(dims=(1,) * 5)) + PAD, "tensor 't' has 5 dimensions"),
    "no dimensions": (header(entry(dims=())) + PAD, "tensor 't' has 0 dimensions"),
    "zero": (header(entry(dims=(0, 4))) + PAD, "impossible shape"),
    "overflow": (header(entry(dims=(1 << 40, 1 << 40))) + PAD, "impossible shape"),
    "type": (header(entry(kind=31)) + PAD, "tensor 't' has the unknown type 31"),
    "block": (header(entry(dims=(40,), kind=8)) + PAD, "rows of 40 weights, but Q8_0 needs"),
    "misaligned": (header(entry(offset=8)) + PAD, "tensor 't' is misaligned"),
    "beyond": (header(entry(dims=(1 << 20,))) + PAD, "is truncated: tensor 't' ends at byte"),
    "far": (header(entry(offset=1 << 62)) + PAD, "is truncated: tensor 't'"),
    "duplicate": (header(entry(), entry()) + PAD, "tensor 't' appears twice"),
    "nameless": (header(entry(name="")) + PAD, "a tensor name has a length of 0"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_every_defect_is_one_sentence_naming_the_file(tmp_path: Path, defect: str) -> None:
    content, message = DEFECTS[defect]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        open_model(path)
    sentence = str(caught.value)
    assert str(path) in sentence
    assert message in sentence
    assert "\n" not in sentence
    assert sentence.endswith(".")


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    whole = write(tmp_path / "w.gguf", "a", "b", general__name="n", x__list=["p", "q"]).read_bytes()
    path = tmp_path / "cut.gguf"
    for length in itertools.chain(range(0, len(whole), 7), (len(whole) - 1,)):
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match=r"truncated|empty|not a GGUF|cannot be"):
            open_model(path)
