"""Tokenisers built from GGUF metadata and from Hugging Face files, against independent ones."""

from __future__ import annotations

import json
import logging
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from kt_async.demo import demo_model_path
from kt_async.errors import ConfigError
from kt_async.text import tokenizer as module
from kt_async.text.pretokenize import _FAMILIES, BYTES, token_to_bytes
from kt_async.text.tokenizer import load_tokenizer
from kt_async.weights.source import open_model

CORPUS = (
    """
It was a bright cold day in April, and the clocks were striking thirteen; nobody's watch agreed.
def add(a, b):\n    return a + b  # 123456 + 0.5\n\tif x != y: print("done")\r\n
Grüße aus Köln, où l'été est là. Съешь же ещё этих мягких французских булок, да выпей чаю.
今日は天気がいいですね。我想在apple工作1314151天~ 한국어 문장입니다. 😀👍🏽 ½ ² Ⅷ
"""
    * 3
)
TEXTS = [
    "",
    " ",
    "   leading and   inner  spaces   ",
    "\n\n\t\r\n x",
    "I'LL we've it's DON'T",
    "12345678 3.14159 1,000",
    "e\u0301te\u0301 \u00e9t\u00e9",
    "Grüße 今日は 한국어 😀👍🏽 ½",
    "!!??...,;:-- #$%& <|not special|>",
    "a\u00a0b\u3000c\u200bd",
    "\x00\x01\x7f",
]

# The published pattern of Qwen2's tokenizer.json, as a second source.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def random_texts(count: int = 200) -> list[str]:
    rng = random.Random(5)
    alphabet = "abcXYZ '\n\t.,!?0123456789éüßжя今日한😀<|im_start|>\u0301\u00a0"
    return ["".join(rng.choices(alphabet, k=rng.randrange(40))) for _ in range(count)]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Path]:
    """A small tokeniser built as Qwen's own is, by the tokenizers package alone."""
    folder = tmp_path_factory.mktemp("hf")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    special = [AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": {"content": "<|im_end|>"}, "bos_token": None, "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer, folder


def model_files(tokenizer: Tokenizer, **changes: Any) -> Any:
    """Write the tokeniser into GGUF keys, as a converter does."""
    state = json.loads(tokenizer.to_str())
    vocab: dict[str, int] = dict(state["model"]["vocab"])
    kinds = dict.fromkeys(vocab.values(), 1)
    for token in state["added_tokens"]:
        vocab[token["content"]] = token["id"]
        kinds[token["id"]] = 3 if token["special"] else 4
    tokens = sorted(vocab, key=vocab.__getitem__)
    metadata = {
        "general.architecture": "qwen3moe",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*tokens, f"[PAD{len(tokens)}]", "[PAD9]"],
        "tokenizer.ggml.token_type": np.array([kinds[vocab[t]] for t in tokens] + [5, 1], np.int32),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in state["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": vocab["<|im_end|>"],
        "tokenizer.ggml.bos_token_id": vocab["<|endoftext|>"],
    }
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    kept = {key: value for key, value in metadata.items() if value is not None}
    return SimpleNamespace(metadata=kept, path=Path("m.gguf"))


def test_byte_level_equals_the_original(qwen: tuple[Tokenizer, Path]) -> None:
    reference, folder = qwen
    ours = load_tokenizer(model_files(reference))
    from_directory = load_tokenizer(model_files(reference), folder)
    for text in [*TEXTS, CORPUS, *random_texts()]:
        expected = reference.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == expected, repr(text)
        assert from_directory.encode(text) == expected, repr(text)
        normal = reference.normalizer.normalize_str(text)
        assert ours.decode(expected) == normal
        assert b"".join(map(ours.token_bytes, expected)) == normal.encode()


def test_special_tokens(qwen: tuple[Tokenizer, Path]) -> None:
    reference, folder = qwen
    start = reference.token_to_id("<|im_start|>")
    end = reference.token_to_id("<|im_end|>")
    think = reference.token_to_id("<think>")
    text = "<|im_start|>user\nhi<think><|im_end|>"
    for ours in (
        load_tokenizer(model_files(reference)),
        load_tokenizer(model_files(reference), folder),
    ):
        ids = ours.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False).ids
        assert (ids[0], ids[-2:]) == (start, [think, end])
        assert ours.decode(ids) == text
        literal = ours.encode(text, parse_special=False)
        assert not {start, end} & set(literal)
        assert think in literal  # part of the text, not of the conversation's frame
        assert ours.decode(literal) == text
        assert ours.is_special(start)
        assert ours.is_special(end)
        assert not ours.is_special(think)
        assert not ours.is_special(ids[1])
        assert ours.token_bytes(start) == b"<|im_start|>"


def test_begin_and_end_of_text(qwen: tuple[Tokenizer, Path]) -> None:
    reference, folder = qwen
    ours = load_tokenizer(model_files(reference))
    bos, end = (reference.token_to_id(t) for t in ("<|endoftext|>", "<|im_end|>"))
    assert (ours.bos_id, ours.add_bos, ours.eos_ids) == (bos, False, {bos, end})
    assert ours.encode("a", add_bos=True) == [bos, *ours.encode("a")]
    assert ours.encode("<|endoftext|>a", add_bos=True) == [bos, *ours.encode("a")]
    assert ours.encode("", add_bos=True) == [bos]
    assert load_tokenizer(model_files(reference, add_bos_token=True)).add_bos
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    from_directory = load_tokenizer(model_files(reference), folder)
    (folder / "generation_config.json").unlink()
    assert from_directory.eos_ids == {3, 4, end}
    assert from_directory.bos_id is None
    assert not from_directory.add_bos
    assert from_directory.encode("a", add_bos=True) == ours.encode("a")


def test_padding_is_unused(qwen: tuple[Tokenizer, Path]) -> None:
    size = qwen[0].get_vocab_size()
    ours = load_tokenizer(model_files(qwen[0]))
    assert ours.vocab_size == size + 2
    assert ours.used_vocab_size == size
    assert ours.unused_ids == {size, size + 1}  # one of them was marked as a normal token
    assert ours.token_bytes(-1) == ours.token_bytes(10**6) == b""


def test_demo_vocabulary_round_trips(tmp_path: Path) -> None:
    ours = load_tokenizer(open_model(demo_model_path(tmp_path)))
    for text in [*TEXTS, *random_texts(50)]:
        assert ours.decode(ours.encode(text, parse_special=False)) == (
            normalizers.NFC().normalize_str(text)
        )
    assert len(ours.encode("What is the capital of France?")) <= 9


def test_byte_alphabet_is_complete() -> None:
    assert sorted(BYTES.values()) == list(range(256))
    assert set(BYTES) == set(pre_tokenizers.ByteLevel.alphabet())
    assert token_to_bytes("Ġa") == b" a"
    assert token_to_bytes("a今") == "a今".encode()


@pytest.mark.parametrize("family", _FAMILIES)
def test_every_family_loses_nothing(qwen: tuple[Tokenizer, Path], family: str) -> None:
    ours = load_tokenizer(model_files(qwen[0], pre=family))
    for text in [*TEXTS, CORPUS]:
        nfc = normalizers.NFC().normalize_str(text)
        expected = nfc if _FAMILIES[family].nfc else text
        assert ours.decode(ours.encode(text)) == expected


def pieces(family: str, text: str) -> list[str]:
    """How a family cuts text before merging."""
    raw = text.encode()
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(rule), "isolated") for rule in _FAMILIES[family].splits]
    )
    assert "".join(part for part, _ in split.pre_tokenize_str(text)).encode() == raw
    return [part for part, _ in split.pre_tokenize_str(text)]


def test_families_cut_differently() -> None:
    assert pieces("qwen2", "a 1234") == ["a", " ", "1", "2", "3", "4"]
    assert pieces("llama3", "a 1234") == ["a", " ", "123", "4"]
    assert pieces("deepseek-v3", "a 1234今日x") == ["a", " ", "123", "4", "今日", "x"]
    assert pieces("deepseek-llm", "ab cd12今日") == ["ab", " cd", "1", "2", "今日"]
    assert pieces("kimi-k2", "Hello今日World 1234") == ["Hello", "今日", "World", " ", "123", "4"]
    assert pieces("kimi-k2", "helloWorld it's") == ["hello", "World", " it's"]
    assert pieces("gpt-2", "it's 1234 x") == ["it", "'s", " 1234", " x"]


def test_unknown_family_warns_and_guesses(
    qwen: tuple[Tokenizer, Path], caplog: pytest.LogCaptureFixture
) -> None:
    files = model_files(qwen[0], pre="something-new")
    expected = load_tokenizer(model_files(qwen[0]))
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        ours = load_tokenizer(files)
    assert "unknown pre-tokeniser 'something-new'; using qwen2" in caplog.text
    assert ours.encode(CORPUS) == expected.encode(CORPUS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "holds no tokenizer"),
        ({"model": "bert"}, "tokenizer kind 'bert' is not supported"),
        ({"tokens": None}, "vocabulary (tokenizer.ggml.tokens) is empty"),
        ({"merges": None}, "merges (tokenizer.ggml.merges) are missing"),
        ({"merges": ["zzz qqq"]}, "vocabulary and its merges disagree"),
        ({"token_type": np.zeros(3, np.int32)}, "token_type has 3 values"),
        ({"eos_token_id": 10**6}, "tokenizer.ggml.eos_token_id is 1000000"),
        ({"model": "llama"}, "has no scores"),
        ({"pre": 3}, "tokenizer.ggml.pre is not a string"),
    ],
)
def test_broken_vocabularies_are_one_sentence(
    qwen: tuple[Tokenizer, Path], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(model_files(qwen[0], **changes))
    assert str(caught.value).startswith("m.gguf: ")
    assert message in str(caught.value)


def test_broken_directories_are_one_sentence(qwen: tuple[Tokenizer, Path], tmp_path: Path) -> None:
    files = model_files(qwen[0])
    assert load_tokenizer(files, tmp_path).encode("abc")  # an empty one overrides nothing
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.json: cannot be read as JSON"):
        load_tokenizer(files, tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "?"}}')
    with pytest.raises(ConfigError, match=r"tokenizer\.json: is not a usable tokenizer"):
        load_tokenizer(files, tmp_path)
    content = json.loads((qwen[1] / "tokenizer.json").read_text())
    for entry, message in (
        ({"id": 1}, "is not an added token"),
        ({"id": -1, "content": "x"}, "-1"),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"added_tokens": [entry]}))
        with pytest.raises(ConfigError, match=rf"tokenizer\.json: .*{message}"):
            load_tokenizer(files, tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    for wrong in (10**6, "x", [1.5]):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id names"):
            load_tokenizer(files, tmp_path)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\xff")
    with pytest.raises(ConfigError, match=r"tokenizer\.model: sentencepiece refuses"):
        load_tokenizer(files, tmp_path)


def test_large_vocabulary_is_built_quickly() -> None:
    alphabet = list(BYTES)
    tokens = [*alphabet, *(a + b for a in alphabet for b in alphabet)]
    merges = [f"{a} {b}" for a in alphabet for b in alphabet]
    third = [a + b for a in tokens[256 : 256 + 342] for b in alphabet][: 151_000 - len(tokens)]
    merges += [f"{token[:2]} {token[2]}" for token in third]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens + third,
        "tokenizer.ggml.merges": merges,
    }
    assert len(tokens + third) == 151_000
    start = time.perf_counter()
    ours = load_tokenizer(SimpleNamespace(metadata=metadata, path=Path("m.gguf")))
    took = time.perf_counter() - start
    assert ours.decode(ours.encode("hello there")) == "hello there"
    assert took < 1.5 * 2, f"{took:.2f} s"  # 0.4 s on an idle core; the margin is for busy ones


# ---- SentencePiece ----


@pytest.fixture(scope="module")
def pieces_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spm")
    (folder / "corpus.txt").write_text(CORPUS)
    sentencepiece.SentencePieceTrainer.Train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<think>"],
        num_threads=1,
        minloglevel=2,
    )
    return folder


def spm_files(reference: Any, **changes: Any) -> Any:
    count = reference.GetPieceSize()
    kinds = []
    for i in range(count):
        flags = (reference.IsUnknown(i), reference.IsControl(i), reference.IsByte(i))
        kinds.append({0: 2, 1: 3, 2: 6}[flags.index(True)] if any(flags) else 1)
        if reference.IdToPiece(i) == "<think>":
            kinds[-1] = 4
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [reference.IdToPiece(i) for i in range(count)],
        "tokenizer.ggml.scores": np.array([reference.GetScore(i) for i in range(count)], "<f4"),
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.bos_token_id": reference.bos_id(),
        "tokenizer.ggml.eos_token_id": reference.eos_id(),
    } | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return SimpleNamespace(metadata=metadata, path=Path("m.gguf"))


def test_sentencepiece_equals_the_original(pieces_model: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(
        model_file=str(pieces_model / "tokenizer.model")
    )
    files = spm_files(reference)
    ours = load_tokenizer(files)
    from_directory = load_tokenizer(files, pieces_model)
    for text in [*TEXTS, CORPUS, "a<think>b", *random_texts()]:
        expected = reference.EncodeAsIds(text)
        assert ours.encode(text) == expected, repr(text)
        assert from_directory.encode(text) == expected, repr(text)
        assert ours.decode(expected) == text
        assert from_directory.decode(expected) == text
    assert 6 in files.metadata["tokenizer.ggml.token_type"]
    assert any(ours.token_bytes(i) == b"\x01" for i in ours.encode("\x01"))


def test_sentencepiece_special_tokens(pieces_model: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(
        model_file=str(pieces_model / "tokenizer.model")
    )
    ours = load_tokenizer(spm_files(reference))
    assert ours.encode("</s>x") == [reference.eos_id(), *reference.EncodeAsIds("x")]
    literal = ours.encode("</s>x", parse_special=False)
    assert reference.eos_id() not in literal
    assert literal == reference.EncodeAsIds("</s>x")
    assert (ours.add_bos, ours.bos_id, ours.eos_ids) == (
        True,
        reference.bos_id(),
        {reference.eos_id()},
    )
    bare = load_tokenizer(spm_files(reference, add_space_prefix=False))
    assert bare.decode(bare.encode(" x")) == " x"
    assert bare.encode("x") != ours.encode("x")


def test_types_are_the_file_formats_own() -> None:
    gguf = pytest.importorskip("gguf")
    for name in ("NORMAL", "UNKNOWN", "CONTROL", "USER_DEFINED", "UNUSED", "BYTE"):
        assert getattr(module, name) == gguf.TokenType[name]
