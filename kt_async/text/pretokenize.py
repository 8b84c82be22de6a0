"""Byte-level BPE from a GGUF vocabulary, with the pre-tokeniser its family was trained with.

GGUF files name the pre-tokeniser (tokenizer.ggml.pre) instead of carrying it; the patterns below
are those of the families' published tokenizer.json files. A wrong one gives valid but unusual
tokens, which costs quality silently, so an unknown name is warned about.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from kt_async.errors import ConfigError

_log = logging.getLogger(__name__)

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDING = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _ENDING
_QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _ENDING
_DEEPSEEK3_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK3 = (r"\p{N}{1,3}", r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK3_WORDS)

# The letters DeepSeek-LLM joins into words: cased ones, without Armenian and Georgian small
# letters and whatever Unicode added later, so no property class says the same. Hexadecimal.
_DEEPSEEK_LETTERS = """
41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376 377 37b-37d 37f 386 388-38a
38c 38e-3a1 3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba 1cbd-1cbf
1d00-1d2b 1d6b-1d77 1d79-1d9a 1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d
1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe 1fc2-1fc4 1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4
1ff6-1ffc 2102 2107 210a-2113 2115 2119-211d 2124 2126 2128 212a-212d 212f-2134 2139 213c-213f
2145-2149 214e 2183 2184 2c00-2c7b 2c7e-2ce4 2ceb-2cee 2cf2 2cf3 a640-a66d a680-a69b a722-a76f
a771-a787 a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a ff41-ff5a 10400-1044f 104b0-104d3
104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df 1e900-1e943
"""
_LETTERS = "".join(
    "-".join(f"\\x{{{code}}}" for code in item.split("-")) for item in _DEEPSEEK_LETTERS.split()
)
_CJK = r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK = (
    r"[\r\n]",
    rf"\s?[{_LETTERS}]+",
    r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _CJK,
    r"\p{N}",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_KIMI = (
    rf"\p{{Han}}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}" + _ENDING
)


@dataclass(frozen=True, slots=True)
class _Family:
    """splits: patterns applied one after the other; whole_words: a piece that is a token as it
    stands is not built from merges; nfc: text is composed first."""

    splits: tuple[str, ...]
    whole_words: bool = False
    nfc: bool = False


_QWEN = _Family((_QWEN2,), nfc=True)
_LLAMA = _Family((_LLAMA3,), whole_words=True)
_PLAIN = _Family((_GPT2,))
_FAMILIES: dict[str, _Family] = {
    "qwen2": _QWEN,
    "deepseek-r1-qwen": _Family((_QWEN2,)),
    "qwen35": _Family((_QWEN35,), nfc=True),
    "deepseek-llm": _Family(_DEEPSEEK),
    "deepseek-coder": _Family(_DEEPSEEK_CODER),
    "deepseek-v3": _Family(_DEEPSEEK3),
    "kimi-k2": _Family((_KIMI,), whole_words=True),
    "llama3": _LLAMA,
    "llama-v3": _LLAMA,
    "llama-bpe": _LLAMA,
    "falcon3": _LLAMA,
    "pixtral": _LLAMA,
    "glm4": _LLAMA,
    "chatglm-bpe": _Family((_LLAMA3,)),
    "smaug-bpe": _Family((_LLAMA3,)),
    "dbrx": _Family((_LLAMA3,)),
    "gpt-2": _PLAIN,
    "phi-2": _PLAIN,
    "olmo": _PLAIN,
    "mpt": _PLAIN,
    "starcoder": _Family((r"\p{N}", _GPT2)),
    "refact": _Family((r"\p{N}", _GPT2)),
    "command-r": _Family((r"\p{N}", _GPT2)),
    "smollm": _Family((r"\p{N}", _GPT2)),
}


def _byte_alphabet() -> dict[str, int]:
    """Map the printable stand-ins that byte-level vocabularies use to the bytes they mean."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    alphabet = {chr(byte): byte for byte in plain}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTES = _byte_alphabet()


def token_to_bytes(token: str) -> bytes:
    """Return the bytes of a byte-level token; characters outside the alphabet stay themselves."""
    try:
        return bytes([BYTES[char] for char in token])
    except KeyError:
        return b"".join(bytes([BYTES[char]]) if char in BYTES else char.encode() for char in token)


def choose_family(name: str, architecture: str, num_tokens: int, source: str) -> str:
    """Return the pre-tokeniser to use: the named one, or with a warning the likeliest."""
    if name in _FAMILIES:
        return name
    if architecture.startswith("qwen"):
        guess = "qwen2"
    elif architecture.startswith("deepseek"):
        guess = "deepseek-v3" if num_tokens > 120_000 else "deepseek-llm"
    else:
        guess = "gpt-2"
    named = f"names the unknown pre-tokeniser '{name}'" if name else "names no pre-tokeniser"
    _log.warning("%s: %s; using %s, check the text it writes", source, named, guess)
    return guess


def byte_level_bpe(
    family: str, vocab: Mapping[str, int], merges: Sequence[str], source: str
) -> Tokenizer:
    """Build the tokeniser of plain text; special tokens are the caller's business.

    vocab: token in the byte alphabet -> id. merges: "left right", best first. Raises ConfigError
    when they contradict each other.
    """
    rules = _FAMILIES[family]
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    try:
        model = models.BPE(vocab=dict(vocab), merges=pairs, ignore_merges=rules.whole_words)
    except Exception as error:  # noqa: BLE001 - the library raises nothing more specific
        raise ConfigError(f"{source}: the vocabulary and its merges disagree ({error}).") from None
    tokenizer = Tokenizer(model)
    if rules.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), "isolated") for split in rules.splits),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer
