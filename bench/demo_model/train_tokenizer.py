"""Train the demo model's byte-level BPE on generated text, with Qwen's pre-tokenisation.

The result has Qwen's special tokens at the end of the vocabulary, so that the ids of a ChatML
conversation and the GGUF keys are those of a real Qwen3 model, only smaller.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

# The split of Qwen2 and Qwen3 (`tokenizer.ggml.pre = qwen2`): single digits, words with their space.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROL = (END_OF_TEXT, IM_START, IM_END)
USER_DEFINED = ("<think>", "</think>")

# Our wording of ChatML: what Qwen's template renders for plain messages, nothing more.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with vocab_size tokens in all, special ones last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    specials = len(CONTROL) + len(USER_DEFINED)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - specials,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in USER_DEFINED])
    missing = vocab_size - tokenizer.get_vocab_size()
    if missing:
        raise ValueError(
            f"The text gives {missing} tokens too few for {vocab_size}; use more text."
        )
    return tokenizer
