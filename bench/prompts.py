"""Prompts of a wanted length: English text from a small grammar, or random token ids.

Every seed gives another prompt, so that a server's prefix cache does not answer for its prefill.
Pure and reproducible: the same seed gives the same prompt everywhere.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

_SUBJECTS = (
    "the ferry pilot", "a retired surveyor", "the night baker", "our neighbour", "the choir",
    "a young botanist", "the station clerk", "the glass blower", "an old cartographer",
    "the lighthouse crew", "my grandmother", "the apprentice", "a visiting engineer",
)  # fmt: skip
_VERBS = (
    "repaired", "described", "measured", "forgot", "painted", "carried", "compared", "sold",
    "borrowed", "counted", "discovered", "recorded", "rebuilt", "questioned", "photographed",
)  # fmt: skip
_OBJECTS = (
    "the copper kettle", "three wooden boats", "a map of the delta", "the broken clock",
    "every seed in the drawer", "an account of the flood", "the tall windows", "a basket of pears",
    "the second bridge", "two letters from the north", "the garden wall", "a box of lenses",
)  # fmt: skip
_TIMES = (
    "before sunrise", "during the long winter", "in the spring of that year", "after the storm",
    "on a quiet Tuesday", "while the market was closed", "towards evening", "for eleven days",
)  # fmt: skip
_REASONS = (
    "because the river had risen", "although nobody had asked", "so that the road could open",
    "since the old plan had failed", "as the council had promised", "until the lamp went out",
    "when the first train arrived", "even though the price was high",
)  # fmt: skip
_TAILS = (
    "and wrote the result in a small green book", "and told no one about it",
    "and was thanked with bread and salt", "and began again from the other side",
    "and found that the figures agreed", "and left the tools beside the door",
)  # fmt: skip

DEFAULT_TOKENS_PER_WORD = 1.25  # English prose with a vocabulary of 100k or more tokens


def _sentence(rng: random.Random) -> str:
    parts = [rng.choice(_SUBJECTS), rng.choice(_VERBS), rng.choice(_OBJECTS)]
    if rng.random() < 0.6:
        parts.append(rng.choice(_TIMES))
    if rng.random() < 0.5:
        parts.append(rng.choice(_REASONS))
    if rng.random() < 0.4:
        parts.append(rng.choice(_TAILS))
    text = " ".join(parts)
    return text[0].upper() + text[1:] + "."


def words(num_words: int, seed: int) -> str:
    """Exactly num_words words of prose, a line break after every sixth sentence."""
    rng = random.Random(seed)  # noqa: S311 - prose, not secrets
    out: list[str] = []
    sentences = 0
    while len(out) < num_words:
        new = _sentence(rng).split(" ")
        sentences += 1
        if sentences % 6 == 0:
            new[-1] += "\n"
        out += new
    return " ".join(out[:num_words]).replace("\n ", "\n").strip()


@dataclass(frozen=True, slots=True)
class Scale:
    """How many tokens a server makes of prose: fixed (template) + per_word * words."""

    fixed: float = 0.0
    per_word: float = DEFAULT_TOKENS_PER_WORD

    @staticmethod
    def fit(short: tuple[int, int], long: tuple[int, int]) -> Scale:
        """From two (words, tokens) measurements. Raises ValueError when they cannot be prose."""
        per_word = (long[1] - short[1]) / (long[0] - short[0])
        if per_word <= 0:
            raise ValueError(f"{long[0]} words gave no more tokens than {short[0]} words")
        return Scale(max(0.0, short[1] - per_word * short[0]), per_word)

    def num_words(self, num_tokens: int) -> int:
        """Words that come closest to num_tokens; at least one."""
        return max(1, round((num_tokens - self.fixed) / self.per_word))


def text_of_tokens(num_tokens: int, seed: int, scale: Scale) -> str:
    """Prose of about num_tokens tokens on the server that `scale` was measured on."""
    return words(scale.num_words(num_tokens), seed)


def token_ids(num_tokens: int, seed: int, vocab_size: int) -> list[int]:
    """Exactly num_tokens random ids from the middle of the vocabulary.

    The first and last tenth are left out: special tokens live there.
    """
    if num_tokens < 1 or vocab_size < 2:
        raise ValueError(f"cannot draw {num_tokens} ids from a vocabulary of {vocab_size}")
    low, high = vocab_size // 10, max(vocab_size // 10 + 1, vocab_size * 9 // 10)
    rng = random.Random(seed)  # noqa: S311 - prose, not secrets
    return [rng.randrange(low, high) for _ in range(num_tokens)]
