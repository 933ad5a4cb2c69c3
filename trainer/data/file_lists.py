"""Datasets that are a table of image files in any places, as of sd-scripts and musubi-tuner.

{"image_path": "/photos/2026/01.jpg", "caption": "TOK on a beach", "mask_path": "masks/a.png"}

Only for tables of the user of this machine: one in a request to a server could name the server's
own files. So readers take them only with `members_of_any`, and servers use `members_of`.
"""

import io
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any

from families.redact import bare_address, looks_like_address
from trainer.data.auxiliary_images import MASKS, auxiliary, kind_of_folder, masks_of
from trainer.data.caption_tables import NoCaptions, image_rows
from trainer.data.members import (
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    LIMITS,
    MAX_MEMBERS,
    MAX_TABLE_BYTES,
    Member,
    Opener,
    Unusable,
    members_of,
    printable,
    safe_parts,
    suffix_of,
    within,
)
from trainer.dataset_names import LIST_SUFFIXES

_BESIDE = (*CAPTION_SUFFIXES, ".json")  # captions of an image whose row has none
_MASK_SUFFIXES = (*IMAGE_SUFFIXES, ".mask", ".masklabel")


def opener(controls: Sequence[Path] = ()) -> Opener:
    """`members_of_any`, with other folders of control images as `control_1/` and so on.

    A folder in the dataset is read only as such. For the user of this machine, too.
    """

    @contextmanager
    def opened(path: Path) -> Iterator[Iterator[Member]]:
        inside = tuple(name for each in controls if (name := _inside(each, path)))
        with members_of_any(path) as members:
            own = (each for each in members if not each.name.startswith(inside))
            yield within(chain(own, _control_members(controls)), LIMITS)

    return opened if controls else members_of_any


def _inside(folder: Path, dataset: Path) -> str:
    """How the names of a folder's files begin in the dataset; empty if it is elsewhere."""
    folder, dataset = Path(os.path.abspath(folder)), Path(os.path.abspath(dataset))
    return f"{folder.relative_to(dataset).as_posix()}/" if dataset in folder.parents else ""


def _control_members(folders: Sequence[Path]) -> Iterator[Member]:
    for number, folder in enumerate(folders, start=1):
        try:
            with members_of(folder) as members:
                for each in members:
                    yield replace(each, name=f"control_{number}/{each.name}")
        except Unusable as error:
            raise Unusable(f"controls, {folder.name}: {error}") from error


@contextmanager
def members_of_any(path: Path) -> Iterator[Iterator[Member]]:
    """`members_of`, and the images of a table with their captions. Raises `Unusable`."""
    if path.suffix.lower() in LIST_SUFFIXES and os.path.isfile(path):
        yield within(_listed_members(path), LIMITS)
        return
    with members_of(path) as members:
        yield members


def _listed_members(table: Path) -> Iterator[Member]:
    """The images, a table of their captions by the members' names, and for images whose row has
    none, the caption files and masks next to them."""
    with table.open("rb") as opened:
        data = opened.read(MAX_TABLE_BYTES + 1)
    try:
        rows = image_rows(table.name, data)
    except NoCaptions as error:
        raise Unusable(f"is not a list of images: {error}") from error
    if not rows:
        raise Unusable(
            "has no row with the path of an image; write a line for each: "
            '{"image_path": "photos/1.jpg", "caption": "TOK on a beach"}'
        )
    find = _Finder(table.parent)
    written: dict[Path, str] = {}  # each file as it is in the table
    texts: dict[Path, list[str]] = {}
    masks: dict[Path, str] = {}  # as in the table
    controls: dict[Path, list[Path]] = {}
    for name, row in rows.items():
        file = find(name)
        written.setdefault(file, name)
        texts.setdefault(file, []).extend(row.captions)
        if row.mask:
            masks.setdefault(file, row.mask)
        controls.setdefault(file, []).extend(find(each) for each in row.controls)
    for each in chain(*(row.controls for row in rows.values())):
        written.setdefault(find(each), each)
    top = Path(os.path.commonpath([file.parent for file in written]))
    names = {file: file.relative_to(top).as_posix() for file in written}
    lines: list[dict[str, Any]] = []
    beside: dict[Path, None] = {}
    for file in written:
        name = names[file]
        yield _member(name, file, written[file])
        if file in masks:
            suffix = suffix_of(masks[file])
            own = f"{name}.mask{suffix if suffix in IMAGE_SUFFIXES else ''}"
            yield _member(own, find(masks[file]), masks[file])
        known = {
            "captions": texts.get(file),
            "control_path": [_name(each, top) for each in controls.get(file, ())],
        }
        if any(known.values()):
            lines.append({"file_name": _name(file, top), **{k: v for k, v in known.items() if v}})
        if file in texts and not texts[file]:
            beside |= dict.fromkeys(file.with_suffix(suffix) for suffix in _BESIDE)
    without = [names[file] for file in texts if file not in masks]
    beside |= dict.fromkeys(top / mask for mask in _masks_beside(without, top))
    for file in beside:
        if os.path.isfile(file) and file not in written:
            yield _member(file.relative_to(top).as_posix(), file, file.name)
    if lines:
        text = _as_jsonl(lines)
        yield Member(f"{table.stem}.jsonl", len(text), None, lambda: io.BytesIO(text))


def _masks_beside(images: Collection[str], top: Path) -> Iterator[str]:
    """The masks of images, in their folders, by the names that they have in a folder."""
    files: list[str] = []
    for folder in {PurePosixPath(image).parent for image in images}:
        for parent, inner, names in islice(os.walk(top / folder), MAX_MEMBERS):
            here = PurePosixPath(Path(parent).relative_to(top).as_posix())
            inner[:] = [each for each in inner if kind_of_folder(each) == MASKS]
            files += [str(here / name) for name in names]
    candidates = {*images, *(name for name in files if suffix_of(name) in _MASK_SUFFIXES)}
    yield from masks_of(auxiliary(candidates, candidates), images).values()


class _Finder:
    """Finds the file that a row means."""

    def __init__(self, folder: Path) -> None:
        """folder: the table's."""
        self._folder = folder
        self._below: dict[str, list[Path]] | None = None  # by name

    def __call__(self, written: str) -> Path:
        """A path relative to the table or the working folder; one of another machine is the only
        file below the table's folder with this name. Else the path, which does not exist."""
        path = Path(written.replace("\\", "/"))
        if written.startswith("~/"):
            path = path.expanduser()
        for place in (self._folder / path, path):
            if os.path.lexists(place):
                return Path(os.path.abspath(place))
        if self._below is None:
            self._below = {}
            for parent, _, names in islice(os.walk(self._folder), MAX_MEMBERS):
                for name in names:
                    self._below.setdefault(name, []).append(Path(parent, name))
        found = self._below.get(path.name, [])
        return Path(os.path.abspath(found[0] if len(found) == 1 else self._folder / path))


def _member(name: str, file: Path, written: str) -> Member:
    refusal = None
    if not os.path.isfile(file):
        refusal = f"is not a file ({_shown(written)}); correct or remove its row"
    size = 0 if refusal else file.stat().st_size
    return Member(name, size, refusal, lambda: file.open("rb"))


def _shown(written: str) -> str:
    if looks_like_address(written):
        return f"{printable(bare_address(written)[:200])} is a URL, which is not downloaded"
    return printable(written[:200])


def _name(file: Path, top: Path) -> str:
    """The name of a file's member, as it is read."""
    return printable("/".join(safe_parts(file.relative_to(top).as_posix())))


def _as_jsonl(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()
