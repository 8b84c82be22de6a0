"""Tokenizer files of a Hugging Face directory, for `--model_path`.

Read as plain JSON: tokenizer.json or tokenizer.model for the vocabulary, tokenizer_config.json
for begin-of-text and the chat template, generation_config.json for the tokens that end an answer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from kt_async.errors import ConfigError
from kt_async.text import pretokenize, spm
from kt_async.text.tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    AddedToken,
    Vocabulary,
    bpe_encoder,
)

_MAX_ID = 1 << 24


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object, {} when the file does not exist; ConfigError when it is not one."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error}).") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds {type(value).__name__}, expected an object.")
    return value


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """Return the directory's vocabulary, None when it holds no tokenizer."""
    if (folder / "tokenizer.json").exists():
        return _from_tokenizer_json(folder)
    if (folder / "tokenizer.model").exists():
        return _from_sentencepiece(folder)
    return None


def _from_tokenizer_json(folder: Path) -> Vocabulary:
    """Load the tokeniser without its added tokens, which text.tokenizer finds by itself."""
    path = folder / "tokenizer.json"
    content = read_json(path)
    added = [_added(entry, path) for entry in content.get("added_tokens") or []]
    content |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    try:
        tokenizer = Tokenizer.from_str(json.dumps(content))
        plain = tokenizer.get_vocab(with_added_tokens=False)
    except Exception as error:  # noqa: BLE001 - the library raises nothing more specific
        raise ConfigError(f"{path}: is not a usable tokenizer ({error}).") from None
    if not plain:
        raise ConfigError(f"{path}: the vocabulary is empty.")
    size = 1 + max([*plain.values(), *(token.id for token in added)])
    tokens, types = [""] * size, [UNUSED] * size
    byte_level = "ByteLevel" in json.dumps([content.get("pre_tokenizer"), content.get("decoder")])
    for text, index in plain.items():
        tokens[index], types[index] = text, NORMAL
        if not byte_level and len(text) == 6 and text.startswith("<0x"):
            types[index] = BYTE
    for token in added:
        tokens[token.id] = token.text
        types[token.id] = CONTROL if token.control else USER_DEFINED

    def token_bytes(token: int) -> bytes:
        if types[token] in (CONTROL, USER_DEFINED, UNUSED):
            return tokens[token].encode()
        if byte_level:
            return pretokenize.token_to_bytes(tokens[token])
        return spm.piece_to_bytes(tokens[token], types[token])

    return _vocabulary(folder, bpe_encoder(tokenizer), token_bytes, tokens, types, added)


def _from_sentencepiece(folder: Path) -> Vocabulary:
    path = folder / "tokenizer.model"
    processor = spm.load_processor(path.read_bytes(), str(path))
    size = processor.GetPieceSize()
    tokens = [processor.IdToPiece(index) for index in range(size)]
    types = [_piece_type(processor, index) for index in range(size)]
    config_path = folder / "tokenizer_config.json"
    extra = read_json(config_path).get("added_tokens_decoder") or {}
    added = [AddedToken(tokens[i], i, control=True) for i in range(size) if types[i] == CONTROL]
    for key, entry in extra.items():
        token = _added({**entry, "id": key}, config_path)
        missing = token.id + 1 - len(tokens)
        tokens += [""] * missing
        types += [UNUSED] * missing
        tokens[token.id] = token.text
        types[token.id] = CONTROL if token.control else USER_DEFINED
        added = [*(known for known in added if known.id != token.id), token]

    def token_bytes(token: int) -> bytes:
        return spm.piece_to_bytes(tokens[token], types[token])

    return _vocabulary(folder, processor.EncodeAsIds, token_bytes, tokens, types, added, spm=True)


def _piece_type(processor: Any, index: int) -> int:
    if processor.IsControl(index):
        return CONTROL
    if processor.IsUnknown(index):
        return UNKNOWN
    if processor.IsByte(index):
        return BYTE
    return UNUSED if processor.IsUnused(index) else NORMAL


def _added(entry: Any, path: Path) -> AddedToken:
    try:
        token = AddedToken(
            text=str(entry["content"]),
            id=int(entry["id"]),
            control=bool(entry.get("special", False)),
            lstrip=bool(entry.get("lstrip", False)),
            rstrip=bool(entry.get("rstrip", False)),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ConfigError(f"{path}: {entry} is not an added token with id and content.") from None
    if not 0 <= token.id < _MAX_ID:
        raise ConfigError(f"{path}: added token '{token.text}' has the id {token.id}.")
    return token


def _vocabulary(
    folder: Path,
    encode: Any,
    token_bytes: Any,
    tokens: list[str],
    types: list[int],
    added: list[AddedToken],
    *,
    spm: bool = False,
) -> Vocabulary:
    """Add what the two config files say about the beginning and the end of texts."""
    config = read_json(folder / "tokenizer_config.json")
    generation = read_json(folder / "generation_config.json")
    ids = {token.text: token.id for token in added}
    bos = ids.get(token_name(config.get("bos_token")))
    named = generation.get("eos_token_id")
    ends: set[Any] = set(named if isinstance(named, list) else [named])
    ends.add(ids.get(token_name(config.get("eos_token"))))
    ends.discard(None)
    wrong = [end for end in ends if not isinstance(end, int) or not 0 <= end < len(tokens)]
    if wrong:
        raise ConfigError(
            f"{folder / 'generation_config.json'}: eos_token_id names {wrong[0]}, "
            f"but the vocabulary has {len(tokens)} tokens."
        )
    return Vocabulary(
        encode=encode,
        token_bytes=token_bytes,
        tokens=tokens,
        types=types,
        added=added,
        bos_id=bos,
        eos_ids=frozenset(ends),
        add_bos=bool(config.get("add_bos_token", spm)),
        space_prefix=spm,
    )


def token_name(value: Any) -> str:
    """Return a special token's text: configs write it plain or as an object."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""
