"""A disk cache of downloads by the hash of their content, with LRU eviction.

    files/<sha256 of the content>     the file; its modification time is the time of its last use
    files/<random>.part               an incomplete download
    names/<sha256 of a name>          JSON: the content of a name, its ETag, and when it was checked

A name identifies a download (URL and token). Equal files with different names are stored once.
Several processes may share the folder, so every file in it may disappear at any moment.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from adapters.files.atomic import FULL, content_hash

BUDGET = 32 << 30  # bytes of files, incomplete ones included
MOST_NAMES = 10_000
STALE_SECONDS = 3600  # four times the longest download: the process was killed


@dataclass(frozen=True)
class Entry:
    """The content of a name when it was last revalidated."""

    sha256: str
    etag: str | None  # for revalidation
    asked: float  # seconds since the epoch


class DiskCache:
    """A folder of downloads within a budget of bytes. Processes may share it."""

    def __init__(self, folder: Path, budget: int = BUDGET) -> None:
        self.folder, self.budget = folder, budget

    def find(self, name: str) -> Entry | None:
        """The entry of a name, if its file still exists."""
        entry = _read(self._name(name))
        return entry if entry is not None and self.file(entry.sha256).is_file() else None

    def file(self, sha256: str) -> Path:
        """The path of a content."""
        return self.folder / "files" / sha256

    def use(self, name: str, entry: Entry) -> Path | None:
        """The file of an entry, now the most recently used; None if it has been removed."""
        path = self.file(entry.sha256)
        try:
            os.utime(path)
        except FileNotFoundError:
            return None
        self._note(name, entry)
        return path

    @contextmanager
    def part(self) -> Iterator[Path]:
        """A file for writing, removed at the end of the context unless `keep` was called.

        Leftover files of killed processes are removed first. Raises OSError naming the folder if
        the disk is full.
        """
        part = None
        try:
            files = self.folder / "files"
            files.mkdir(parents=True, exist_ok=True)
            self._clean()
            handle, part = tempfile.mkstemp(dir=files, suffix=".part")
            os.close(handle)
            yield Path(part)
        except OSError as error:
            if error.errno not in FULL:
                raise
            reason = f"no space for the weights ({error.strerror}); free some, or set "
            reason += "XDG_CACHE_HOME to a folder with more"
            raise OSError(error.errno, reason, str(self.folder)) from error
        finally:
            if part is not None:
                Path(part).unlink(missing_ok=True)

    def keep(self, name: str | None, part: Path, etag: str | None) -> Path:
        """Stores a complete `part`; with a name, `find` finds it."""
        entry = Entry(content_hash(part), etag, time.time())
        path = self.file(entry.sha256)
        os.replace(part, path)
        os.utime(path)
        if name is not None:
            self._note(name, entry)
        self._evict(keep=path)
        return path

    def _clean(self) -> None:
        """Removes leftover files of killed processes, and names whose files no longer exist."""
        now = time.time()
        for folder in ("files", "names"):
            for path, status in _listed(self.folder / folder):
                if path.suffix == ".part" and now - status.st_mtime > STALE_SECONDS:
                    path.unlink(missing_ok=True)
        names = sorted(_listed(self.folder / "names"), key=lambda each: -each[1].st_mtime_ns)
        for number, (path, _) in enumerate(names):
            if path.suffix == ".part":
                continue
            entry = _read(path)
            if number >= MOST_NAMES or entry is None or not self.file(entry.sha256).is_file():
                path.unlink(missing_ok=True)

    def _evict(self, keep: Path) -> None:
        """Removes the least recently used files beyond the budget; incomplete ones count too."""
        files = _listed(keep.parent)
        total = sum(status.st_size for _, status in files)
        for path, status in sorted(files, key=lambda each: each[1].st_mtime_ns):
            if total <= self.budget:
                return
            if path != keep and path.suffix != ".part":
                path.unlink(missing_ok=True)
                total -= status.st_size

    def _note(self, name: str, entry: Entry) -> None:
        path = self._name(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(asdict(entry), file)
            os.replace(part, path)
        finally:
            Path(part).unlink(missing_ok=True)

    def _name(self, name: str) -> Path:
        return self.folder / "names" / hashlib.sha256(name.encode()).hexdigest()


def _read(path: Path) -> Entry | None:
    try:
        return Entry(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _listed(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """The files in a folder, except those that another process removes meanwhile."""
    found = []
    try:
        for each in os.scandir(folder):
            try:
                found.append((Path(each.path), each.stat(follow_symlinks=False)))
            except OSError:
                continue
    except OSError:  # the folder does not exist yet
        pass
    return found
