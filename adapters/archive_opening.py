"""Opens a weights.zip, a folder of the same files, or a LoRA file of any program, with its headers
checked.

The kind is detected by content, not by name. Only the members that are read are unpacked, into
unnamed temporary files.
"""

import errno
import logging
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import IO, Any

from adapters.archive_members import (
    META,
    BrokenArchive,
    Members,
    check_named,
    lora_member,
    read_meta,
    read_placeholders,
    unpacked,
)
from adapters.comfyui import embedding_names
from adapters.files.containers import (
    Limits,
    Unusable,
    folder_members,
    is_container,
    open_container,
    printable,
)
from adapters.files.tensor_file import BrokenTensors, TensorFile
from adapters.formats import (
    CHECKPOINT_HEADER,
    MAX_BYTES,
    BrokenLora,
    Shapes,
    config_beside,
    config_member,
    config_text,
    open_lora,
    open_tensors,
    refuse_other_kinds,
)
from adapters.placeholder import Placeholder

log = logging.getLogger(__name__)

WEIGHTS = "weights.zip"  # in the folder of a run
LIMITS = Limits(members=1000, total_bytes=2 * MAX_BYTES)

# Raised by the standard library for damaged, encrypted or unusually packed archives.
_DAMAGE = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError),
    *(EOFError, OSError, ValueError, RuntimeError, LookupError, ArithmeticError, struct.error),
)


class Unwanted(Exception):
    """Wraps an error of the caller's check, which is not a damaged file."""

    def __init__(self, reason: Exception) -> None:
        self.reason = reason


@dataclass(frozen=True)
class OpenArchive:
    """A weights.zip or a LoRA file whose headers have been checked; tensors are not read yet."""

    source: str  # its name in messages
    tensors: TensorFile  # of the LoRA; each access reads a tensor again
    file: IO[bytes]  # the LoRA's safetensors file
    config: bytes | None  # the text of its adapter_config.json
    meta: dict[str, Any]
    placeholders: Callable[[], tuple[Placeholder, ...]]  # reads and checks them
    lora_name: str = ""  # of the LoRA in an archive


@contextmanager
def open_archive(path: str | PathLike[str], config: Path | None = None) -> Iterator[OpenArchive]:
    """Opens the files that `read_archive` reads, for those who need the tensors as stored.

    Raises `BrokenArchive` with the reason, also for errors of the reader within the context.
    """
    path = Path(path)
    if not path.exists():
        raise BrokenArchive(f"{path}: no such file")
    if (inner := path / WEIGHTS).is_file():
        raise BrokenArchive(f"{path} is a folder; give {inner}")
    try:
        with _opened(path, config) as opened:
            yield opened
    except (BrokenArchive, Unwanted):
        raise
    except BrokenLora as error:
        raise BrokenArchive(str(error)) from error
    except Unusable as error:
        raise BrokenArchive(f"{path.name} {error}") from error
    except BrokenTensors as error:
        raise BrokenArchive(f"{path.name} {error}") from error
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # an error of the disk, not a damaged file
        raise BrokenArchive(f"{path.name} is damaged ({error}); download it again") from error


@contextmanager
def _opened(path: Path, config: Path | None) -> Iterator[OpenArchive]:
    if path.is_dir():
        files = Members(folder_members(path, LIMITS), str(path))
        with _opened_members(files, str(path)) as opened:
            yield opened
        return
    with path.open("rb") as file:
        start = file.read(tarfile.BLOCKSIZE)
    if start.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise BrokenArchive(f"{path.name} is a truncated zip; download it again")
    if is_container(start):
        with (
            open_container(path, LIMITS) as members,
            _opened_members(Members(members, path.name), path.name) as opened,
        ):
            yield opened
        return
    with path.open("rb") as file:
        try:
            tensors = open_tensors(file, path.stat().st_size, path.name, partial(_lora, path.name))
        except _Checkpoint:
            tensors = None
        if tensors is not None:
            beside = config or config_beside(path)
            meta = _meta_in_header(tensors)
            yield OpenArchive(path.name, tensors, file, _config(beside), meta, tuple)
            return
    with _opened(_weights_of_checkpoint(path), None) as opened:
        yield opened


@contextmanager
def _opened_members(members: Members, source: str) -> Iterator[OpenArchive]:
    if any(name.endswith("/data.pkl") for name in members.sizes):
        raise BrokenArchive(f"{source} is a pickle, which may run code; convert it to safetensors")
    meta = read_meta(members, source)
    lora_name, embeddings = lora_member(members, source)
    settings, config = None, config_member(members.sizes, lora_name)
    if config is not None:
        with members.open(config) as opened:
            settings = config_text(opened)

    with unpacked(members, lora_name, source) as file:
        shown = f"{source}: {lora_name}"
        tensors = open_lora(file, members.sizes[lora_name], shown)
        if META not in members.sizes:
            meta = _meta_in_header(tensors)
        tokens = str(meta.get("placeholder_token") or "").split()
        folder = "".join(lora_name.rpartition("/")[:2])
        names = embedding_names(tokens)
        named = {f"{folder}{name}.safetensors": token for token, name in names.items()}

        def placeholders() -> tuple[Placeholder, ...]:
            beside = {name: named[name] for name in embeddings if name in named}
            found = read_placeholders(members, source, beside)
            if META in members.sizes:
                check_named(found, meta, source)
            for name in embeddings:
                if name not in named:
                    log.warning(
                        "%s: the embedding %s is not used, since the LoRA has no token of this "
                        "name; give the weights.zip, which contains it",
                        source,
                        printable(name),
                    )
            return found

        yield OpenArchive(shown, tensors, file, settings, meta, placeholders, lora_name)


def _meta_in_header(tensors: TensorFile) -> dict[str, Any]:
    """What a LoRA's own header says, of what is in meta.json."""
    start = "zeroprior."
    found = tensors.metadata.items()
    return {key.removeprefix(start): value for key, value in found if key.startswith(start)}


def _config(file: Path | None) -> bytes | None:
    if file is None:
        return None
    with file.open("rb") as opened:
        return config_text(opened)


class _Checkpoint(Exception):
    """The file is a training checkpoint of zeroprior."""


def _lora(source: str, shapes: Shapes, metadata: Mapping[str, str]) -> None:
    if CHECKPOINT_HEADER in metadata:
        raise _Checkpoint
    refuse_other_kinds(shapes, metadata, source)


def _weights_of_checkpoint(path: Path) -> Path:
    """The weights of the same step, which a run writes next to each checkpoint.

    Raises `BrokenArchive` if there are none: the tensors in a checkpoint are numbered, and only a
    run that resumes from it knows their layers.
    """
    weights = path.with_suffix(".zip")
    if weights == path or not weights.is_file():
        raise BrokenArchive(
            f"{path.name} is a training checkpoint, which can only be resumed (resume_from); pass "
            f"the weights of that step, {path.stem}.zip, or the run's weights.zip"
        )
    log.info("%s is a training checkpoint; using the weights of that step, %s", path.name, weights)
    return weights
