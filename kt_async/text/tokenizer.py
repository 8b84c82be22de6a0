"""Text to token ids and back: one interface over byte-level BPE and SentencePiece vocabularies.

`load_tokenizer` reads the vocabulary from GGUF metadata, or from a Hugging Face directory that
overrides it. Special tokens are found here, by one pattern, and the libraries only ever see the
text between them: so text that must not be parsed for them (`parse_special=False`) needs no
second tokeniser. Everything is immutable after construction and may be used from any thread.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kt_async.errors import ConfigError
from kt_async.text import pretokenize, spm
from kt_async.text.metadata import Metadata

# Token types, numbered as in GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# Tokens that end an answer in chat formats; many files name only one of theirs.
_ENDINGS = frozenset(
    {
        "<|im_end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|EOT|>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "[EOS]",
        "[EOT]",
    }
)
_LONG_TEXT = 2048  # characters, about 1 ms
_PADDING = re.compile(r"\[PAD\d+\]")


class HasMetadata(Protocol):
    """What this needs of an opened model (weights.source.ModelFiles)."""

    @property
    def metadata(self) -> Mapping[str, Any]: ...

    @property
    def path(self) -> Path: ...


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token matched in text as it stands. control: not part of an answer's text, and only
    matched when parse_special; lstrip, rstrip: swallows the white space before or after it."""

    text: str
    id: int
    control: bool
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """All that a Tokenizer is made of.

    encode: text without special tokens -> ids. token_bytes: id -> bytes. types: token type per
    id. space_prefix: encode puts a space in front, which decode takes away.
    """

    encode: Callable[[str], list[int]]
    token_bytes: Callable[[int], bytes]
    tokens: Sequence[str]
    types: Sequence[int]
    added: Sequence[AddedToken]
    bos_id: int | None
    eos_ids: frozenset[int]
    add_bos: bool
    space_prefix: bool = False


class Tokenizer:
    """Encodes prompts and decodes answers.

    eos_ids: tokens that end an answer. bos_id: begin-of-text token or None. add_bos: whether
    prompts should begin with it. vocab_size: number of ids the tokeniser knows, padding included;
    used_vocab_size: one more than the highest id that means something. unused_ids: padding.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._cache: dict[int, bytes] = {}
        self.eos_ids = vocabulary.eos_ids
        self.bos_id = vocabulary.bos_id
        self.add_bos = vocabulary.add_bos and vocabulary.bos_id is not None
        self.vocab_size = len(vocabulary.tokens)
        types = np.asarray(vocabulary.types)
        self.unused_ids = frozenset(np.flatnonzero(types == UNUSED).tolist())
        self._control = frozenset(np.flatnonzero(types == CONTROL).tolist()) | self.eos_ids
        used = np.flatnonzero(types != UNUSED)
        self.used_vocab_size = int(used[-1]) + 1 if used.size else 0
        self._ids = {token.text: token.id for token in vocabulary.added}
        self._all = _pattern(vocabulary.added)
        self._plain = _pattern(token for token in vocabulary.added if not token.control)

    def encode(self, text: str, *, add_bos: bool = False, parse_special: bool = True) -> list[int]:
        """Return the token ids of `text`.

        add_bos: begin with bos_id, unless the text itself already does. parse_special: False
        keeps what looks like a control token as plain text.
        """
        pattern = self._all if parse_special else self._plain
        encode = self._vocabulary.encode
        ids: list[int] = []
        start = 0
        for match in pattern.finditer(text) if pattern else ():
            if match.start() > start:
                ids += encode(text[start : match.start()])
            found = match.group()
            token = self._ids.get(found)
            ids.append(self._ids[found.strip()] if token is None else token)
            start = match.end()
        if start < len(text):
            ids += encode(text[start:])
        if add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, special tokens included; broken UTF-8 becomes U+FFFD."""
        data = b"".join(self.token_bytes(token) for token in ids)
        if self._vocabulary.space_prefix:
            data = data.removeprefix(b" ")
        return data.decode(errors="replace")

    def token_bytes(self, token: int, /) -> bytes:
        """Return the bytes that one token stands for; b"" for ids outside the vocabulary."""
        known = self._cache.get(token)
        if known is None:
            inside = 0 <= token < self.vocab_size
            known = self._vocabulary.token_bytes(token) if inside else b""
            self._cache[token] = known
        return known

    def token_text(self, token: int, /) -> str:
        """Return the vocabulary's own spelling of a token, "" outside it."""
        return self._vocabulary.tokens[token] if 0 <= token < self.vocab_size else ""

    def is_special(self, token: int, /) -> bool:
        """Return whether the token controls the conversation and is no part of an answer."""
        return token in self._control


def _pattern(added: Iterable[AddedToken]) -> re.Pattern[str] | None:
    """Return a pattern that finds the longest of these tokens at each place."""
    parts = [
        (r"\s*" if token.lstrip else "") + re.escape(token.text) + (r"\s*" if token.rstrip else "")
        for token in sorted(added, key=lambda token: -len(token.text))
        if token.text
    ]
    return re.compile("|".join(parts)) if parts else None


def load_tokenizer(files: HasMetadata, model_path: Path | None = None) -> Tokenizer:
    """Build the tokeniser of an opened model.

    model_path: directory with tokenizer.json or tokenizer.model (and their config files), which
    then replaces what the GGUF carries. Raises ConfigError naming the file at fault.
    """
    if model_path is not None:
        from kt_async.text.hf_files import read_vocabulary  # noqa: PLC0415 - needs this module

        vocabulary = read_vocabulary(model_path)
        if vocabulary is not None:
            return Tokenizer(vocabulary)
    return Tokenizer(_from_gguf(files.metadata, str(files.path)))


def _from_gguf(values: Mapping[str, Any], source: str) -> Vocabulary:
    metadata = Metadata(values, source)
    kind = metadata.text("model")
    if not kind:
        raise ConfigError(f"{source}: holds no tokenizer; name a directory with --model_path.")
    if kind not in ("gpt2", "llama"):
        raise ConfigError(
            f"{source}: tokenizer kind '{kind}' is not supported; "
            "supported are gpt2 (byte-level BPE) and llama (SentencePiece)."
        )
    tokens = metadata.strings("tokens")
    if not tokens:
        raise ConfigError(f"{source}: the tokenizer's vocabulary (tokenizer.ggml.tokens) is empty.")
    types = _types(metadata, tokens)
    if kind == "gpt2":
        return _byte_level(metadata, str(values.get("general.architecture", "")), tokens, types)
    return _sentencepiece(metadata, tokens, types)


def _types(metadata: Metadata, tokens: list[str]) -> list[int]:
    """Token types; padding rows count as unused whatever the file says."""
    raw = metadata.numbers("token_type", len(tokens))
    types = [NORMAL] * len(tokens) if raw is None else raw.astype(np.int64).tolist()
    for index, token in enumerate(tokens):
        if token.startswith("[PAD") and _PADDING.fullmatch(token):
            types[index] = UNUSED
    return types


def _byte_level(
    metadata: Metadata, architecture: str, tokens: list[str], types: list[int]
) -> Vocabulary:
    source = metadata.source
    merges = metadata.strings("merges")
    if merges is None:
        raise ConfigError(f"{source}: the tokenizer's merges (tokenizer.ggml.merges) are missing.")
    family = pretokenize.choose_family(metadata.text("pre"), architecture, len(tokens), source)
    vocab = {
        token: index
        for index, token in enumerate(tokens)
        if types[index] != CONTROL and types[index] != UNUSED
    }
    tokenizer = pretokenize.byte_level_bpe(family, vocab, merges, source)
    added = _added(tokens, types, (CONTROL, USER_DEFINED))

    def token_bytes(token: int) -> bytes:
        text = tokens[token]
        literal = types[token] in (CONTROL, USER_DEFINED, UNUSED)
        return text.encode() if literal else pretokenize.token_to_bytes(text)

    return Vocabulary(
        encode=bpe_encoder(tokenizer),
        token_bytes=token_bytes,
        tokens=tokens,
        types=types,
        added=added,
        bos_id=metadata.token_id("bos", len(tokens)),
        eos_ids=_endings(metadata, added, len(tokens)),
        add_bos=metadata.flag("add_bos_token", default=family.startswith("llama")),
    )


def bpe_encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """Return text -> ids over a tokenizers.Tokenizer without special tokens."""

    def encode(text: str) -> list[int]:
        # The batch call lets other Python threads run meanwhile, the plain one does not: 200 kB
        # stopped them for 80 ms. It costs more for short texts.
        if len(text) < _LONG_TEXT:
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        else:
            ids = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    return encode


def _sentencepiece(metadata: Metadata, tokens: list[str], types: list[int]) -> Vocabulary:
    processor = spm.processor_from_gguf(metadata, tokens, types)
    # User-defined pieces are matched by sentencepiece itself.
    added = _added(tokens, types, (CONTROL,))

    def token_bytes(token: int) -> bytes:
        return spm.piece_to_bytes(tokens[token], types[token])

    return Vocabulary(
        encode=processor.EncodeAsIds,
        token_bytes=token_bytes,
        tokens=tokens,
        types=types,
        added=added,
        bos_id=metadata.token_id("bos", len(tokens)),
        eos_ids=_endings(metadata, added, len(tokens)),
        add_bos=metadata.flag("add_bos_token", default=True),
        space_prefix=metadata.flag("add_space_prefix", default=True),
    )


def _added(tokens: list[str], types: list[int], kinds: tuple[int, ...]) -> list[AddedToken]:
    return [
        AddedToken(tokens[index], index, control=kind == CONTROL)
        for index, kind in enumerate(types)
        if kind in kinds
    ]


def _endings(metadata: Metadata, added: Sequence[AddedToken], limit: int) -> frozenset[int]:
    ids = {metadata.token_id(name, limit) for name in ("eos", "eot", "eom")}
    ids |= {token.id for token in added if token.text in _ENDINGS}
    return frozenset(token for token in ids if token is not None)
