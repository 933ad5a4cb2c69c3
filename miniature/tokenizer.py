"""A byte-level BPE tokenizer like Qwen's, with a vocabulary of about a thousand tokens.

Everything except the vocabulary is as in Qwen3: byte alphabet, NFC, split pattern, the 26 added
tokens with their flags, and the chat template for one user message.
"""

from collections import Counter
from functools import cache
from typing import Any

from transformers import AddedToken, Qwen2Tokenizer

from miniature.lexicon import GENERAL_WORDS, world_words

MERGES = 742  # with 256 bytes and 26 added tokens: 1,024 ids
PAD_TOKEN = "<|endoftext|>"

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
PLAIN_ADDED_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
    "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>",
    "<think>", "</think>",
)  # fmt: skip

# Equal to Qwen3's template for messages without tools.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}"
    "{%- endif %}"
)


@cache
def byte_alphabet() -> tuple[str, ...]:
    """GPT-2's reversible table: a printable character for each byte 0..255."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return tuple(chr(b) if b in printable else chr(next(spare)) for b in range(256))


def train_bpe(word_counts: dict[str, int], merges: int) -> list[tuple[str, str]]:
    """Byte-pair encoding: merges the most frequent pair `merges` times, ties by lexical order.

    Not a library's, because the result must never change.
    """
    alphabet = byte_alphabet()
    words = {w: [alphabet[b] for b in w.encode()] for w in word_counts}
    learned: list[tuple[str, str]] = []
    while len(learned) < merges:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, pieces in words.items():
            for pair in zip(pieces, pieces[1:], strict=False):
                pairs[pair] += word_counts[word]
        if not pairs:
            raise ValueError(f"the words give only {len(learned)} of {merges} merges; add words")
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        learned.append(best)
        for pieces in words.values():
            i = 0
            while i < len(pieces) - 1:
                if (pieces[i], pieces[i + 1]) == best:
                    pieces[i : i + 2] = ["".join(best)]
                i += 1
    return learned


@cache
def _merges() -> tuple[tuple[str, str], ...]:
    counts: Counter[str] = Counter({"user": 10_000, "assistant": 10_000})
    for word in world_words():  # high counts, so that each becomes one token
        counts[" " + word] += 1000
        counts[word] += 100
    for word in GENERAL_WORDS:
        counts[" " + word] += 2
        counts[word] += 1
    return tuple(train_bpe(counts, MERGES))


def build_tokenizer() -> Qwen2Tokenizer:
    """The miniature's tokenizer, `len(tokenizer) == 1024`; always the same."""
    vocab = {piece: i for i, piece in enumerate(byte_alphabet())}
    for pair in _merges():
        vocab["".join(pair)] = len(vocab)
    merges: Any = list(_merges())  # pairs, although the annotation is strings
    # The constructor registers <|endoftext|> first, as id 998; the others follow in Qwen's order.
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, model_max_length=131072)
    tokenizer.add_special_tokens(
        {
            "extra_special_tokens": [
                AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS[1:]
            ]
        }
    )
    tokenizer.add_tokens(
        [AddedToken(token, special=False, normalized=False) for token in PLAIN_ADDED_TOKENS]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
