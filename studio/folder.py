"""The studio's folder and the folders in it: safe names, trash, the server's lock."""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import threading
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.files.atomic import atomic_file
from studio.replies import Problem
from studio.tasks import Tasks

MAX_NAME_BYTES = 120  # of a new name
MAX_ENTRY_BYTES = 255  # Linux
TRASH_SECONDS = 30 * 24 * 3600
KEPT = "item"  # subfolder of an item in the trash, with the deleted files
_RESERVED = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?", re.IGNORECASE)


@dataclass(frozen=True)
class Studio:
    """The folders that the server reads and writes; nothing outside of them."""

    folder: Path  # absolute
    more_datasets: Path | None = None  # a folder of datasets beside our own; absolute
    resume: bool = False  # resume runs at the start that ended without a final event
    tasks: Tasks = field(default_factory=Tasks)  # background work on datasets
    writing: threading.Lock = field(default_factory=threading.Lock)  # changes of dataset files
    ending: threading.Event = field(default_factory=threading.Event)  # the server ends; streams do

    @property
    def datasets(self) -> Path:
        """One folder for each dataset, as `zeroprior train` reads it; new ones are made here."""
        return self.folder / "datasets"

    @property
    def dataset_folders(self) -> list[Path]:
        """The folders that contain datasets; of two with one name, the first is used."""
        return [self.datasets, *([] if self.more_datasets is None else [self.more_datasets])]

    @property
    def outputs(self) -> Path:
        """One folder for each run, also of runs that were started elsewhere."""
        return self.folder / "outputs"

    @property
    def images(self) -> Path:
        """Generated images, by day."""
        return self.outputs / "images"

    @property
    def input_images(self) -> Path:
        """Reference images, start images and masks for generation."""
        return self.folder / "input_images"

    @property
    def weights(self) -> Path:
        """Uploaded LoRAs."""
        return self.folder / "weights"

    @property
    def trash(self) -> Path:
        """Deleted items, until they are restored or expire."""
        return self.folder / "trash"


# ---- Names ---------------------------------------------------------------------------------------
# What is created here gets a name that is safe anywhere. What is there already, from a Mac or from
# other programs, has its own name, which is used exactly as it is.


def entry_name(name: str, what: str = "name") -> str:
    """The name of something that exists. Raises `Problem` 400 if it leads elsewhere or is hidden.

    404 for a name that cannot exist.
    """
    if not name or name.startswith(".") or any(each in name for each in "/\\\0"):
        text = f"{what}: {name[:60]!r} must not be empty, begin with a dot, or contain a separator"
        raise Problem(400, text, "name")
    try:
        if len(os.fsencode(name)) <= MAX_ENTRY_BYTES:
            return name
    except UnicodeEncodeError:  # half of a character, in JSON
        pass
    raise Problem(404, f"{what}: {name[:60]!r} does not exist")


def entry_path(path: str, what: str = "name") -> list[str]:
    """The parts of the relative path of something that exists. Raises `Problem` (400, 404)."""
    return [entry_name(part, what) for part in _parts(path, what)]


def checked_name(name: str, what: str = "name") -> str:
    """A new name, in NFC. Raises `Problem` (400) for names that are unsafe anywhere."""
    name = unicodedata.normalize("NFC", name)
    reason = None
    if not name or len(name.encode(errors="surrogatepass")) > MAX_NAME_BYTES:
        reason = f"must have 1 to {MAX_NAME_BYTES} bytes"
    elif any(c in "/\\:" or unicodedata.category(c) in ("Cc", "Cs") for c in name):
        reason = "must not contain /, \\, : or control characters"
    elif name.startswith(".") or name.endswith((".", " ")) or name.startswith(" "):
        reason = "must not begin with a dot or a space, or end with one"
    elif _RESERVED.fullmatch(name):
        reason = "is reserved on Windows"
    if reason:
        raise Problem(400, f"{what}: {name[:60]!r} {reason}", "name", "choose another name")
    return name


def checked_path(path: str, what: str = "name") -> list[str]:
    """The parts of a new relative path such as `masks/01.png`. Raises `Problem` (400)."""
    return [checked_name(part, what) for part in _parts(path, what)]


def _parts(path: str, what: str) -> list[str]:
    parts = path.split("/")
    if len(parts) > 8:
        raise Problem(400, f"{what}: more than 8 folders deep", "name")
    return parts


@contextmanager
def folder_fd(root: Path, parts: Sequence[str], create: bool = False) -> Iterator[int]:
    """The descriptor of a folder below `root`, reached without following any link.

    Raises `Problem` 404 if there is none and 400 if one part is a link. `create` makes it.
    """
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts:
            with absent(part):
                if create:
                    try:
                        os.mkdir(part, dir_fd=fd)
                    except FileExistsError:
                        pass
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                inner = os.open(part, flags, dir_fd=fd)
            os.close(fd)
            fd = inner
        yield fd
    finally:
        os.close(fd)


def open_file(root: Path, parts: Sequence[str]) -> int:
    """The descriptor of a regular file below `root`, for reading; follows no link.

    Raises `Problem` 404 if there is none, and 400 for links, folders and devices.
    """
    with folder_fd(root, parts[:-1]) as folder, absent(parts[-1]):
        # Not blocking: opening a named pipe would wait for its writer.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        fd = os.open(parts[-1], flags, dir_fd=folder)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise Problem(400, f"{parts[-1]} is not a file")
    return fd


@contextmanager
def absent(name: str) -> Iterator[None]:
    """Turns errors of opening `name` into `Problem`s."""
    try:
        yield
    except FileNotFoundError:
        raise Problem(404, f"{name} does not exist") from None
    except (NotADirectoryError, IsADirectoryError):
        raise Problem(400, f"{name} is a link or not of the right kind") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Problem(400, f"{name} is a link; links are not followed") from None
        raise


# ---- Trash ---------------------------------------------------------------------------------------


def to_trash(studio: Studio, *paths: Path) -> str:
    """Moves files or folders to the trash; returns the id to restore them."""
    identity = f"{time.strftime('%Y-%m-%d')}-{secrets.token_hex(4)}"
    place = studio.trash / identity
    (place / KEPT).mkdir(parents=True)
    facts = {"t": time.time(), "from": [str(path) for path in paths]}
    with atomic_file(place / "trash.json") as file:
        file.write(json.dumps(facts).encode(errors="backslashreplace"))
    for number, path in enumerate(paths):
        shutil.move(path, place / KEPT / str(number))
    return identity


def restore(studio: Studio, identity: str) -> list[Path]:
    """Moves an item from the trash back to its place. Raises `Problem` 404 or 409."""
    place = studio.trash / checked_name(identity)
    try:
        places = [Path(each) for each in json.loads((place / "trash.json").read_bytes())["from"]]
    except (OSError, ValueError, KeyError):
        raise Problem(404, "this item is no longer in the trash") from None
    for path in places:
        if os.path.lexists(path):
            raise Problem(409, f"{path.name} exists again", None, "rename or delete it first")
        if not path.parent.is_dir():  # a new one would be in the way of the deleted one
            text = f"{path.parent.name}, which contained {path.name}, does not exist now"
            raise Problem(409, text, None, "restore it first")
    for number, path in enumerate(places):
        if os.path.lexists(place / KEPT / str(number)):
            shutil.move(place / KEPT / str(number), path)
    shutil.rmtree(place, ignore_errors=True)
    return places


def empty_trash(studio: Studio, older_than: float = TRASH_SECONDS) -> None:
    """Removes items that were deleted long ago."""
    for place in studio.trash.iterdir() if studio.trash.is_dir() else ():
        try:
            deleted = json.loads((place / "trash.json").read_bytes())["t"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not put there by us
        if time.time() - deleted > older_than:
            shutil.rmtree(place, ignore_errors=True)


# ---- The server's lock ---------------------------------------------------------------------------


class InUse(Exception):
    """Another server has this folder. The message says where it is."""


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Holds studio.lock; yields its descriptor. Raises `InUse`."""
    path = folder / "studio.lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        for attempt in range(11):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == 10:
                    raise InUse(_where(folder, fd)) from None
                time.sleep(0.05)
        os.ftruncate(fd, 0)
        yield fd
    finally:
        os.close(fd)


def say_where(fd: int, address: str) -> None:
    """Writes the server's address into its lock, for messages."""
    os.pwrite(fd, json.dumps({"pid": os.getpid(), "address": address}).encode(), 0)


def _where(folder: Path, fd: int) -> str:
    facts: Any = {}
    try:
        facts = json.loads(os.pread(fd, 4096, 0))
        return (
            f"the studio in {folder} is already open at {facts['address']} (process "
            f"{facts['pid']}); open that address, or end that process first"
        )
    except (ValueError, KeyError, TypeError):
        return f"the studio in {folder} is being started by another process"
