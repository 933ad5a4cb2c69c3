"""Qwen's own tokenizers, rebuilt from the rank file that the `dashscope` package carries.

Qwen2.5 (Qwen-Image) and Qwen3 (Z-Image) share one byte-level BPE vocabulary of 151,643 tokens and
differ in the tokens added behind it. Rebuilding takes seconds, so the result is kept on disk.
"""

import base64
import hashlib
import importlib.util
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from transformers import AddedToken, Qwen2Tokenizer

from families import components
from families.base import Base
from families.repository import component_folder

# In the order of their ids, from 151643 on. Special ones vanish in `decode(skip_special_tokens)`.
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
QWEN25_PLAIN_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
    "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
QWEN3_PLAIN_TOKENS = (
    *QWEN25_PLAIN_TOKENS, "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip

# Renders system, user and assistant messages without tools as Qwen3's own template does.
QWEN3_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{% if not enable_thinking | default(true) %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)


def qwen25_tokenizer() -> Qwen2Tokenizer:
    """A fresh Qwen2.5 tokenizer, as Qwen-Image's: 151,665 tokens."""
    return Qwen2Tokenizer.from_pretrained(qwen25_folder())


def qwen3_tokenizer() -> Qwen2Tokenizer:
    """A fresh Qwen3 tokenizer with its chat template, as Z-Image's: 151,669 tokens."""
    return Qwen2Tokenizer.from_pretrained(qwen3_folder())


def qwen25_folder() -> Path:
    """The folder where the Qwen2.5 tokenizer is kept, built if need be. Copy it; never edit it."""
    return _kept("qwen2.5", QWEN25_PLAIN_TOKENS, None)


def qwen3_folder() -> Path:
    """The folder where the Qwen3 tokenizer is kept, built if need be. Copy it; never edit it."""
    return _kept("qwen3", QWEN3_PLAIN_TOKENS, QWEN3_CHAT_TEMPLATE)


def read_once(patch: pytest.MonkeyPatch) -> None:
    """Lets families share one tokenizer of equal files: reading Qwen's takes a second.

    Families never change their tokenizer. Copies of files keep the time of their last change.
    """
    kept: dict[Any, Any] = {}
    load = components.load_tokenizer

    def load_once(base: Base, name: str) -> Any:
        files = sorted(component_folder(base, name).iterdir())
        stats = {file.name: file.stat() for file in files if "processor" not in file.name}
        key = tuple((name, each.st_size, each.st_mtime_ns) for name, each in stats.items())
        if key not in kept:
            kept[key] = load(base, name)
        return kept[key]

    patch.setattr(components, "load_tokenizer", load_once)


def rank_file() -> Path:
    """Qwen's published rank file inside the installed `dashscope`.

    The package is located but not imported: importing it needs packages that we do not. Raises
    `ModuleNotFoundError` with the command that installs it.
    """
    spec = importlib.util.find_spec("dashscope")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(folder) / "resources" / "qwen.tiktoken"
        if file.is_file():
            return file
    problem = "is not installed" if spec is None else "has no resources/qwen.tiktoken"
    raise ModuleNotFoundError(
        f"dashscope {problem}; the tests rebuild Qwen's tokenizers from that file: "
        "pip install --no-deps --upgrade dashscope"
    )


def read_ranks(file: Path) -> dict[bytes, int]:
    """Token bytes to rank, from a file of `BASE64 RANK` lines."""
    lines = (line.split() for line in file.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def byte_alphabet() -> list[str]:
    """GPT-2's reversible table: the printable character that stands for each byte 0..255."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(substitutes)) for byte in range(256)]


def split_in_two(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The pair that was merged into `token`: BPE stopped before the token's own rank.

    A rank file keeps the results of the merges but not their halves; this is the recovery that
    Qwen published with its first tokenizer.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        merged = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:], strict=False)]
        i = min(range(len(merged)), key=merged.__getitem__)
        if merged[i] >= ranks[token]:
            raise ValueError(f"{token!r}, rank {ranks[token]}, is not the merge of two tokens")
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def build(plain_tokens: tuple[str, ...], chat_template: str | None) -> Qwen2Tokenizer:
    """A Qwen tokenizer from the rank file, with these tokens behind the special ones."""
    ranks = read_ranks(rank_file())
    alphabet = byte_alphabet()

    def text(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    vocabulary = {text(token): rank for token, rank in ranks.items()}
    pairs = (split_in_two(token, ranks) for token in ranks if len(token) > 1)
    options: dict[str, Any] = {  # Any: the class takes more than its annotations say
        "merges": [(text(a), text(b)) for a, b in pairs],
        "unk_token": None,
        "extra_special_tokens": list(SPECIAL_TOKENS[1:]),
        "model_max_length": 131072,
    }
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, **options)
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in plain_tokens])
    # Only now: as a constructor's argument it would be given <|im_start|>'s id.
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = chat_template
    return tokenizer


@cache
def _kept(name: str, plain_tokens: tuple[str, ...], chat_template: str | None) -> Path:
    """The built tokenizer's folder, named by a hash of all that it is made from."""
    made_from = hashlib.sha256(rank_file().read_bytes())
    made_from.update(Path(__file__).read_bytes())
    made_from.update(f"{transformers.__version__} {tokenizers.__version__}".encode())
    shelf = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "zeroprior-tests"
    folder = shelf / f"{name}-{made_from.hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    shelf.mkdir(parents=True, exist_ok=True)
    # Renamed when complete, so that another process sees the whole folder or none.
    unfinished = tempfile.mkdtemp(prefix=f".{name}-", dir=shelf)
    try:
        build(plain_tokens, chat_template).save_pretrained(unfinished)
        os.rename(unfinished, folder)
    except OSError:
        if not folder.is_dir():  # else another process was first, with the same content
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder
