"""Writes and reads weights.zip, the result of a training run and the input of a prediction.

    lora/lora_weights.safetensors        the LoRA (`adapters.formats.lora_file`)
    embeddings/placeholder.safetensors   one tensor, named as the token, [vectors, hidden] float32;
                                         only with a trained placeholder token
    embeddings/placeholder-2.safetensors …   the same for each further token of several subjects
    meta.json                            base model, settings and results of the run
    comfyui/                             how to use it in ComfyUI (`adapters.comfyui`); only with a
                                         placeholder token

Other programs' LoRAs may have PEFT's adapter_config.json next to them, in an archive or a folder:
it contains alpha, which the LoRA may lack.
Members are not compressed: weights hardly shrink, and compressing them takes seconds.
"""

import json
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from adapters.archive_members import (
    FORMAT_VERSION,
    LORA,
    META,
    PLACEHOLDER,
    BrokenArchive,
    check_together,
    placeholder_name,
    read_placeholder,
)
from adapters.archive_opening import OpenArchive, Unwanted, open_archive
from adapters.comfyui import comfyui_files
from adapters.files.atomic import atomic_file
from adapters.files.tensor_file import hash_of_tensors
from adapters.formats import (
    BrokenLora,
    Deltas,
    Factors,
    lora_size,
    plain_factors,
    read_deltas,
    titles,
    without_idle,
    write_lora,
)
from adapters.placeholder import Placeholder
from adapters.placeholder_token import MAX_TOKENS

_IN_HEADER = ("base_model", "training_mode", "placeholder_token", "steps")  # of the weights' file
_LICENSE = ("license", "license_notice", "license_url")  # `Base.license_facts`
MAX_WRITTEN_META_BYTES = 8 << 20  # all our readers accept this size


@dataclass(frozen=True)
class Archive:
    """The content of a weights.zip, or of any LoRA file."""

    deltas: Deltas  # by the file's layer names: see `adapters.formats.layout.Layout.fit`
    placeholders: tuple[Placeholder, ...]  # one for each subject; empty without a trained token
    meta: dict[str, Any]
    lora_sha256: str | None = None  # `tensor_file.tensors_hash` of its file
    names: tuple[str, ...] = ()  # of the LoRA: file name, and titles in its header
    # The folder of a whole transformer (`adapters.trained_model`), in place of a LoRA.
    model: Path | None = None

    @property
    def factors(self) -> Factors:
        """The pairs (A, B) of a plain LoRA. Raises `BrokenArchive` for other adapters."""
        try:
            return plain_factors(self.deltas, "the LoRA")
        except BrokenLora as error:
            raise BrokenArchive(str(error)) from error

    @property
    def placeholder(self) -> Placeholder | None:
        """That of the first subject."""
        return next(iter(self.placeholders), None)

    @property
    def tokens(self) -> tuple[str, ...]:
        """The tokens of all subjects, the first one first."""
        return tuple(each.token for each in self.placeholders)

    @property
    def vectors(self) -> dict[str, Tensor]:
        """The embedding vectors of each token, as for `Family.encode_prompts`."""
        return {each.token: each.vectors for each in self.placeholders}

    @property
    def base_model(self) -> str | None:
        """Hub id of the base it was trained on; None if the file does not contain it."""
        return self.meta.get("base_model")


Check = Callable[[Archive], None]


def header_of(meta: Mapping[str, Any]) -> dict[str, str]:
    """What the header of a file of weights says, of what is in meta.json."""
    return {f"zeroprior.{key}": str(meta[key]) for key in (*_IN_HEADER, *_LICENSE) if key in meta}


def write_archive(archive: Archive, path: str | PathLike[str]) -> Path:
    """Writes weights.zip atomically: on an error, an existing file is unchanged.

    Raises ValueError if `meta` is larger than can be read back.
    """
    path = Path(path)
    meta = {"format_version": FORMAT_VERSION, **archive.meta}
    text = json.dumps(meta, indent=2, sort_keys=True, ensure_ascii=False)
    content = text.encode(errors="backslashreplace")  # lone surrogates, as JSON escapes them
    if len(content) > MAX_WRITTEN_META_BYTES:
        raise ValueError(
            f"{META} would have {len(content):,} bytes; {MAX_WRITTEN_META_BYTES:,} is the limit"
        )
    with atomic_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as zipped:
        info = zipfile.ZipInfo(LORA, time.localtime()[:6])
        info.file_size = lora_size(archive.deltas)  # a large one needs another header
        with zipped.open(info, "w") as lora:
            write_lora(lora, archive.deltas, header_of(meta))
        for number, each in enumerate(archive.placeholders):
            tensor = each.vectors.detach().float().cpu().contiguous()
            zipped.writestr(placeholder_name(number), save({each.token: tensor}))
        zipped.writestr(META, content)
        for name, data in comfyui_files(archive.deltas, archive.placeholders).items():
            zipped.writestr(name, data)
    return path


def read_archive(
    path: str | PathLike[str], check: Check | None = None, config: Path | None = None
) -> Archive:
    """Reads and checks a weights.zip, a .tar of the same, or a bare LoRA `.safetensors`.

    For a training checkpoint, the weights of the same step are read from the file next to it.

    The kind is detected by content, not by name. An archive with its LoRA in another place is read
    if it has exactly one other `.safetensors`. Names, dtypes and shapes are checked by the headers
    before a tensor is read; then `check` is called with the archive, with changes on the meta
    device, and may raise to refuse it. `config` is the adapter_config.json of a bare LoRA, by
    default the one in its folder. Raises `BrokenArchive` with the reason. Only the members that are
    read are unpacked, into unnamed temporary files.
    """
    path = Path(path)
    try:
        with open_archive(path, config) as opened:
            archive = _read(opened, check)
    except Unwanted as error:
        raise error.reason from None
    return replace(archive, names=(path.name, *archive.names))


def _read(opened: OpenArchive, check: Check | None) -> Archive:
    check_meta = _of(opened.meta, check)
    deltas = without_idle(read_deltas(opened.tensors, opened.source, check_meta, opened.config))
    meta = opened.meta
    if not opened.lora_name:  # a bare file, which says its rank nowhere else
        ranks = [len(delta[0]) for delta in deltas.values() if isinstance(delta, tuple)]
        meta = {**meta, **({"rank": max(ranks)} if ranks else {})}
    names = filter(None, (opened.lora_name.rpartition("/")[2], *titles(opened.tensors.metadata)))
    return Archive(deltas, opened.placeholders(), meta, hash_of_tensors(opened.file), tuple(names))


def _of(meta: dict[str, Any], check: Check | None) -> Callable[[Deltas], None] | None:
    """Wraps a check of an archive as a check of its changes."""

    def checked(deltas: Deltas) -> None:
        try:
            check(Archive(deltas, (), meta))  # type: ignore[misc]
        except Exception as error:
            raise Unwanted(error) from None

    return checked if check else None


def read_loose(lora: str | PathLike[str], token: str) -> Archive:
    """A bare LoRA file with the placeholders next to it, as in an unpacked weights.zip.

    The embedding of `token` is in `placeholder.safetensors` next to the LoRA or in
    `../embeddings/placeholder.safetensors`; those of further subjects are in `placeholder-2`, and
    so on, in the same folder. Raises `BrokenArchive` if none exists or none contains the token.
    """
    archive = read_archive(lora)
    source, folder = str(lora), Path(lora).parent
    if not archive.placeholders:  # it is neither a weights.zip nor the checkpoint of a run
        places = [folder / Path(PLACEHOLDER).name, folder.parent / PLACEHOLDER]
        first = next((place for place in places if place.is_file()), None)
        if first is None:
            looked = " nor ".join(map(str, places))
            raise BrokenArchive(
                f"the embedding of {token} was not found: neither {looked} exists; pass the "
                "weights.zip, which contains it"
            )
        source = str(first)
        archive = replace(archive, placeholders=read_loose_placeholders(first))
    if token not in archive.tokens:
        found = " and ".join(map(repr, archive.tokens))
        raise BrokenArchive(f"{source} contains the placeholder {found}, not {token!r}")
    return archive


def read_loose_placeholders(first: Path) -> tuple[Placeholder, ...]:
    """The placeholder in a file, and those in the numbered files next to it."""
    names = (Path(placeholder_name(number)).name for number in range(MAX_TOKENS))
    files = takewhile(Path.is_file, (first.with_name(name) for name in names))
    found = []
    try:
        for file in files:
            with file.open("rb") as opened:
                found.append(read_placeholder(opened, file.stat().st_size, str(file)))
    except BrokenLora as error:
        raise BrokenArchive(str(error)) from error
    check_together(found, str(first))
    return tuple(found)
