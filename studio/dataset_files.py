"""The files of a dataset: found, read and written without following links.

datasets/robot/         images and captions, in folders too; what `zeroprior train` reads
  .studio/              of this server alone: thumbs/, parts/, images.jsonl, undo.jsonl
"""

import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from adapters.files.containers import is_junk
from inference.image_decoding import READABLE
from studio.folder import (
    Studio,
    absent,
    checked_name,
    checked_path,
    entry_name,
    entry_path,
    folder_fd,
    open_file,
)
from studio.replies import Problem
from trainer.data import (
    CAPTION_SUFFIXES,
    HEAD_BYTES,
    IMAGE_SUFFIXES,
    MAX_CAPTION_BYTES,
    MAX_TABLE_BYTES,
    TABLE_SUFFIXES,
    Checked,
    Measures,
    Unusable,
    can_be_image,
    check,
    is_image,
    probe,
    stem_of,
    suffix_of,
)

OWN = ".studio"
# Files that may contain captions, and how much of them is read.
TEXTS = {
    **dict.fromkeys(CAPTION_SUFFIXES, MAX_CAPTION_BYTES + 1),
    **dict.fromkeys(TABLE_SUFFIXES, MAX_TABLE_BYTES + 1),
}
Files = dict[str, os.stat_result]


def place_of(studio: Studio, name: str) -> Path:
    """The folder of a dataset. Raises `Problem` 400 or 404."""
    name = entry_name(name, "dataset")
    places = [each / name for each in studio.dataset_folders]
    place = next((each for each in places if os.path.lexists(each)), places[0])
    with folder_fd(place.parent, [name]):
        return place


def dataset_names(studio: Studio) -> list[str]:
    """The datasets in all folders."""
    found = set[str]()
    for folder in studio.dataset_folders:
        with suppress(FileNotFoundError), os.scandir(folder) as entries:
            found |= {
                each.name
                for each in entries
                if not each.name.startswith(".") and each.is_dir(follow_symlinks=False)
            }
    return sorted(found)


def new_name(name: str) -> str:
    """A name for a dataset. Raises `Problem` (400)."""
    if name.lower().endswith(".zip"):
        raise Problem(400, "the name of a dataset must not end with .zip", "name")
    return checked_name(name)


def find(root: Path) -> Files:
    """All regular files of a dataset by name, such as `a.jpg` or `sub/a.jpg`; no links."""
    found: Files = {}
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        with os.scandir(root / folder) as entries:
            for entry in entries:
                name = f"{folder}{entry.name}"
                if is_junk([entry.name]):
                    continue
                facts = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(facts.st_mode):
                    waiting.append(f"{name}/")
                elif stat.S_ISREG(facts.st_mode):
                    found[name] = facts
    return dict(sorted(found.items()))


def images_of(root: Path, files: Files) -> Files:
    """The images among the files, as the trainer finds them: where the suffix does not say it, by
    the first bytes."""
    return {
        name: facts
        for name, facts in files.items()
        if suffix_of(name) in IMAGE_SUFFIXES
        or (can_be_image(name) and is_image(name, read_file(root, name, HEAD_BYTES)))
    }


def image_parts(name: str) -> list[str]:
    """The parts of the name of an image that exists. Raises `Problem` 400, 404 or 415."""
    return _image_parts(entry_path(name, "image"))


def new_image_parts(name: str) -> list[str]:
    """The checked parts of a new image's name. Raises `Problem` 400 or 415."""
    return _image_parts(checked_path(name, "image"))


def _image_parts(parts: list[str]) -> list[str]:
    if not can_be_image(parts[-1]):
        raise not_supported(parts[-1])
    return parts


def not_supported(name: str) -> Problem:
    """The refusal of a file that is not an image."""
    return Problem(415, f"{name}: only {READABLE} are supported", "name")


def version_of(name: str, facts: os.stat_result) -> str:
    """The version of an image: another one for each change of the file."""
    text = f"{name}\0{facts.st_mtime_ns}\0{facts.st_size}".encode(errors="backslashreplace")
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def read_file(root: Path, name: str, most: int) -> bytes:
    """At most `most` bytes of a file. Raises `Problem`."""
    with open(open_file(root, name.split("/")), "rb") as file:
        return file.read(most)


def write_file(root: Path, name: str, content: bytes) -> None:
    """Writes a small file whole or not at all; replaces a link instead of following it."""
    *folders, last = name.split("/")
    part = f".{secrets.token_hex(6)}.part"
    with folder_fd(root, folders, create=True) as folder:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with open(os.open(part, flags, 0o644, dir_fd=folder), "wb") as file:
                file.write(content)
            os.rename(part, last, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with absent(part):
                os.unlink(part, dir_fd=folder)
            raise


# ---- Captions ------------------------------------------------------------------------------------


def caption_file(name: str, files: Mapping[str, object]) -> str:
    """The name of an image's caption file, which may not exist."""
    stem = stem_of(name)
    found = (f"{stem}{suffix}" for suffix in (".txt", ".TXT", ".Txt"))
    return next((each for each in found if each in files), f"{stem}.txt")


def captions_beside(name: str, files: Mapping[str, object]) -> list[str]:
    """The files that are named after an image and may contain its caption."""
    stems, suffixes = (stem_of(name), name), (*CAPTION_SUFFIXES, ".json")
    return [each for each in files if suffix_of(each) in suffixes and stem_of(each) in stems]


def texts_of(root: Path, files: Files) -> dict[str, bytes]:
    """The content of all files that may contain captions."""
    kinds = {name: suffix_of(name) for name in files}
    return {n: read_file(root, n, TEXTS[kind]) for n, kind in kinds.items() if kind in TEXTS}


def contents_of(root: Path, files: Files, texts: Mapping[str, bytes]) -> dict[str, bytes]:
    """What the trainer reads to know the role of each file: texts, and of other files the first
    bytes; of an image by its suffix nothing."""

    def content(name: str) -> bytes:
        if name in texts:
            return texts[name]
        return b"" if suffix_of(name) in IMAGE_SUFFIXES else read_file(root, name, HEAD_BYTES)

    return {name: content(name) for name in files}


def member_name(name: str, controls: Sequence[str]) -> str:
    """The name by which the trainer knows a file: folders of control images are `control_1/` and
    so on (`trainer.data.file_lists.opener`)."""
    for number, folder in enumerate(controls, start=1):
        if name.startswith(f"{folder}/"):
            return f"control_{number}/{name.removeprefix(f'{folder}/')}"
    return name


def caption_version(content: bytes | None) -> str:
    """The version of a caption file; `none` if there is none."""
    return "none" if content is None else hashlib.sha256(content).hexdigest()[:16]


def caption_content(root: Path, file: str) -> bytes | None:
    """The content of a caption file, or None."""
    try:
        return read_file(root, file, MAX_CAPTION_BYTES + 1)
    except Problem as problem:
        if problem.status == 404:
            return None
        raise


# ---- What is known of the images -----------------------------------------------------------------


def known_images(root: Path) -> dict[str, Checked | str]:
    """Properties of checked images by version, or why one cannot be used."""
    known: dict[str, Checked | str] = {}
    try:
        lines = read_file(root, f"{OWN}/images.jsonl", 64 << 20).splitlines()
    except Problem:
        return known
    for line in lines:
        try:
            row = json.loads(line)
            known[row["version"]] = row.get("refused") or _checked(row["checked"])
        except (ValueError, KeyError, TypeError):
            continue  # cut off by a power failure
    return known


def _checked(row: dict[str, Any]) -> Checked:
    """Raises TypeError for a row without measures, which an older version wrote."""
    return Checked(**row | {"measures": Measures(*row.get("measures", ()))})


def check_image(root: Path, name: str, facts: os.stat_result) -> Checked | str:
    """Decodes an image as a check, and notes the result."""
    with open(open_file(root, name.split("/")), "rb") as file:
        data = file.read()
    try:
        probe(data)
        found: Checked | str = check(data)
    except Unusable as error:
        found = str(error)
    note_image(root, version_of(name, facts), found)
    return found


def note_image(root: Path, version: str, found: Checked | str) -> None:
    """Adds a line to images.jsonl."""
    row = {"refused": found} if isinstance(found, str) else {"checked": found._asdict()}
    append(root, "images.jsonl", {"version": version, **row})


def append(root: Path, name: str, row: Mapping[str, object], sync: bool = False) -> None:
    """Appends a line of JSON to a file in `.studio`."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with folder_fd(root, [OWN], create=True) as folder, absent(name):
        with open(os.open(name, flags, 0o644, dir_fd=folder), "ab") as file:
            file.write(b"\n" * (file.tell() > 0) + json.dumps(row).encode())
            if sync:
                file.flush()
                os.fsync(file.fileno())


def own_folder(root: Path, name: str) -> Path:
    """A folder in `.studio`, created if it is missing."""
    with folder_fd(root, [OWN, name], create=True):
        return root / OWN / name


def sweep(studio: Studio) -> None:
    """Removes the partial files of a server that was killed."""
    roots = [place_of(studio, name) for name in dataset_names(studio)]
    for root in (*roots, studio.input_images):
        parts = root / OWN / "parts"
        if not (root / OWN).is_symlink() and not parts.is_symlink():
            shutil.rmtree(parts, ignore_errors=True)
    shutil.rmtree(studio.weights / ".parts", ignore_errors=True)


def is_safe(name: str) -> bool:
    """Whether a member of an archive can be stored by its name."""
    try:
        checked_path(str(PurePosixPath(name)))
    except Problem:
        return False
    return True
