"""Finds, checks and reads the members of a weights.zip."""

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import IO, Any

import torch

from adapters.files import bounded_json
from adapters.files.atomic import temporary_space
from adapters.files.containers import Member, Unpacked, Unusable, is_junk, printable, safe_parts
from adapters.files.tensor_file import BrokenTensors, TensorFile
from adapters.formats import MAX_BYTES, is_embedding, open_tensors
from adapters.placeholder import Placeholder
from adapters.placeholder_token import (
    MAX_TOKENS,
    PlaceholderError,
    check_distinct,
    check_token,
)

FORMAT_VERSION = 1
LORA = "lora/lora_weights.safetensors"
PLACEHOLDER = "embeddings/placeholder.safetensors"  # of the first token
META = "meta.json"
COMFYUI = "comfyui"  # the folder for ComfyUI, which is never read here
EMBEDDING = "emb_params"  # the tensor in an embedding for ComfyUI

MAX_META_BYTES = 16 << 20
MAX_META_VALUES = 200_000
MAX_PLACEHOLDER_BYTES = 64 << 20  # 2,000 vectors of the widest text encoder; all tokens together

_NUMBERED = re.compile(r"embeddings/placeholder-([0-9]{1,9})\.safetensors", re.ASCII)


class BrokenArchive(ValueError):
    """Weights that are damaged, incomplete, or of an unknown kind."""


class Members:
    """The files of an archive by their checked names. Nothing is read yet."""

    def __init__(self, members: Iterable[Member], source: str) -> None:
        self._files: dict[str, Member] = {}
        for member in members:
            try:
                parts = safe_parts(member.name)
                if member.name.endswith("/") or is_junk(parts):
                    continue
                name = "/".join(parts)
                if member.refusal:
                    raise Unusable(member.refusal)
                if name in self._files:
                    raise Unusable("is in the archive twice; rename or remove one")
            except Unusable as error:
                shown = printable(member.name[:200])
                raise BrokenArchive(f"{source}: {shown} {error}") from error
            self._files[name] = member
        self.sizes = {name: member.size for name, member in self._files.items()}

    def open(self, name: str) -> IO[bytes]:
        return self._files[name].open()


def read_meta(members: Members, source: str) -> dict[str, Any]:
    if META not in members.sizes:
        return {}
    if members.sizes[META] > MAX_META_BYTES:
        raise BrokenArchive(f"{source}: {META} has {members.sizes[META]:,} bytes; it is damaged")
    with members.open(META) as file:
        text = b"".join(iter(lambda: file.read(1 << 20), b""))  # containers refuse large reads
    try:
        meta = bounded_json.loads(text, MAX_META_VALUES)
    except bounded_json.TooLarge as error:
        raise BrokenArchive(f"{source}: {META} is too large: {error}") from error
    except ValueError as error:
        raise BrokenArchive(f"{source}: {META} is not JSON ({error})") from error
    if not isinstance(meta, dict):
        raise BrokenArchive(f"{source}: {META} is not a JSON object")
    version = meta.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise BrokenArchive(
            f"{source}: format version {version!r} is unknown (this is version {FORMAT_VERSION}); "
            "update zeroprior, or train again"
        )
    if not isinstance(meta.get("base_model"), str | None):
        raise BrokenArchive(f"{source}: {META} has a base_model that is not a name")
    return meta


def placeholder_name(number: int) -> str:
    """The member with the embedding of a token, by its number from 0: placeholder-2 is number 1."""
    path = PurePosixPath(PLACEHOLDER)
    return str(path.with_stem(f"{path.stem}-{number + 1}")) if number else PLACEHOLDER


def lora_member(members: Members, source: str) -> tuple[str, list[str]]:
    """The LoRA of an archive, and embeddings next to it of a form that has no token's name."""
    if LORA in members.sizes:
        return LORA, []
    others = [
        name
        for name in members.sizes
        if name.endswith(".safetensors")
        and name != PLACEHOLDER
        and not _NUMBERED.fullmatch(name)
        and not name.startswith(f"{COMFYUI}/")
    ]
    embeddings = []
    if len(others) > 1:  # such as the files for ComfyUI
        embeddings = [name for name in others if _has_embedding(members, name)]
        others = [name for name in others if name not in embeddings]
    if len(others) == 1:
        return others[0], embeddings
    found = ", ".join(others[:5]) or "none"
    raise BrokenArchive(
        f"{source}: expected {LORA} or exactly one other .safetensors, found {found}"
        f"; give {'one of these files' if others else 'a weights.zip or a LoRA .safetensors'}"
    )


def _has_embedding(members: Members, name: str) -> bool:
    """Whether a .safetensors file has a token's embedding, by its header."""
    if (size := members.sizes[name]) > MAX_PLACEHOLDER_BYTES:
        return False
    try:
        with members.open(name) as file:
            return is_embedding(TensorFile(file, size).shapes())
    except BrokenTensors:
        return False


@contextmanager
def unpacked(members: Members, name: str, source: str) -> Iterator[IO[bytes]]:
    """One member within the context, unpacked to a temporary file if it is packed."""
    size = members.sizes[name]
    if size > MAX_BYTES:
        raise BrokenArchive(f"{source}: {name} has {size:,} bytes; {MAX_BYTES:,} is the limit")
    try:
        with members.open(name) as packed, temporary_space("the unpacked weights"):
            if isinstance(getattr(packed, "raw", None), io.FileIO):  # a file of a folder
                yield packed
                return
            with io.BufferedReader(Unpacked(packed, size)) as file:
                yield file
    except Unusable as error:
        raise BrokenArchive(f"{source}: {name} {error}") from error


def read_placeholder(
    file: IO[bytes], size: int, source: str, token: str | None = None
) -> Placeholder:
    """`token`: of a file for ComfyUI, which does not contain it."""
    if size > MAX_PLACEHOLDER_BYTES:
        raise BrokenArchive(f"{source} has {size:,} bytes; {MAX_PLACEHOLDER_BYTES:,} is the limit")
    tensors = open_tensors(file, size, source)
    if len(tensors) != 1:
        raise BrokenArchive(f"{source} contains {len(tensors)} tensors; one is expected")
    key = next(iter(tensors))
    planned = tensors.planned()[key]
    if planned.ndim != 2 or not len(planned):
        raise BrokenArchive(f"{source}: shape {tuple(planned.shape)} is not [vectors, hidden]")
    if not planned.is_floating_point():
        raise BrokenArchive(f"{source} contains {planned.dtype}, not floating point numbers")
    token = token if token is not None and key == EMBEDDING else key
    try:
        check_token(token)
        vectors = tensors[key]
    except (PlaceholderError, BrokenTensors) as error:
        raise BrokenArchive(f"{source}: {error}") from error
    vectors = vectors.to(torch.float32, copy=True)
    if not vectors.isfinite().all():
        raise BrokenArchive(f"{source} contains NaN or infinity")
    return Placeholder(token, vectors)


def read_placeholders(
    members: Members, source: str, beside: Mapping[str, str] | None = None
) -> tuple[Placeholder, ...]:
    """The tokens of an archive with their embeddings, in order.

    `beside`: the token of each embedding for ComfyUI, by its name in an archive without others.
    """
    numbers = {int(match[1]) - 1 for name in members.sizes if (match := _NUMBERED.fullmatch(name))}
    names = [placeholder_name(number) for number in range(len(numbers) + 1)]
    files: dict[str, str | None] = dict.fromkeys(names)
    if not numbers and PLACEHOLDER not in members.sizes:
        files = dict(beside or {})
    if len(files) > MAX_TOKENS:
        raise BrokenArchive(
            f"{source} contains {len(files)} placeholder tokens; at most {MAX_TOKENS} are accepted"
        )
    if missing := [name for name in files if name not in members.sizes]:
        raise BrokenArchive(f"{source}: {missing[0]} is missing; the embeddings are numbered")
    total = sum(members.sizes[name] for name in files)
    if len(files) > 1 and total > MAX_PLACEHOLDER_BYTES:
        raise BrokenArchive(
            f"{source}: the embeddings have {total:,} bytes; {MAX_PLACEHOLDER_BYTES:,} is the limit"
        )
    found = []
    for name, token in files.items():
        with unpacked(members, name, source) as file:
            found.append(read_placeholder(file, members.sizes[name], f"{source}: {name}", token))
    check_together(found, source)
    return tuple(found)


def check_together(placeholders: Sequence[Placeholder], source: str) -> None:
    """Raises `BrokenArchive` for tokens or embeddings that cannot be those of one LoRA."""
    try:
        check_distinct([each.token for each in placeholders])
    except PlaceholderError as error:
        raise BrokenArchive(f"{source}: {error}") from error
    widths = {each.vectors.shape[1] for each in placeholders}
    if len(widths) > 1:
        shown = " and ".join(map(str, sorted(widths)))
        raise BrokenArchive(f"{source}: the embeddings have different widths, {shown}")


def check_named(placeholders: Sequence[Placeholder], meta: dict[str, Any], source: str) -> None:
    """Raises `BrokenArchive` if meta.json names other tokens than the embeddings."""
    found = [each.token for each in placeholders]
    expected = meta.get("placeholder_token")
    if meta.get("train_placeholder_token") and not found:
        raise BrokenArchive(
            f"{source}: {META} names the placeholder {expected!r}, but {PLACEHOLDER} is missing"
        )
    if expected is not None and found and expected != found[0]:
        raise BrokenArchive(
            f"{source}: {META} names the placeholder {expected!r}, {PLACEHOLDER} contains "
            f"{found[0]!r}"
        )
    listed = meta.get("placeholder_tokens")
    if listed is not None and listed != found:
        raise BrokenArchive(
            f"{source}: {META} names the placeholders {repr(listed)[:200]}, the embeddings are "
            f"those of {found}"
        )
