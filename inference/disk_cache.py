"""Downloaded files on disk, each under the hash of its content, the least recently used go first.

    files/<sha256 of the content>     the file; its modification time says when it was last used
    names/<sha256 of a name>          JSON: which content a name led to, and when that was asked

A name is whatever tells two downloads apart. Equal files under different names lie here once.
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

from adapters.atomic import FULL

BUDGET = 32 << 30  # bytes


@dataclass(frozen=True)
class Entry:
    """What a name led to when it was last asked."""

    sha256: str
    etag: str | None  # with which its server can tell whether it has changed
    asked: float  # seconds since the epoch


class DiskCache:
    """A folder of downloads within a budget of bytes. Processes may share it."""

    def __init__(self, folder: Path, budget: int = BUDGET) -> None:
        self.folder, self.budget = folder, budget

    def find(self, name: str) -> Entry | None:
        """What the name led to, if that is still here."""
        try:
            entry = Entry(**json.loads(self._name(name).read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return entry if self.file(entry.sha256).is_file() else None

    def file(self, sha256: str) -> Path:
        """Where the content lies."""
        return self.folder / "files" / sha256

    def use(self, name: str, entry: Entry) -> Path:
        """The file of an entry, now the most recently used; the entry is noted under the name."""
        path = self.file(entry.sha256)
        os.utime(path)
        self._note(name, entry)
        return path

    @contextmanager
    def part(self) -> Iterator[Path]:
        """A file to write to, removed at the end of the block unless it was kept.

        Raises OSError naming the folder where there is no room.
        """
        files = self.folder / "files"
        files.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=files, suffix=".part")
        os.close(handle)
        try:
            yield Path(part)
        except OSError as error:
            if error.errno not in FULL:
                raise
            said = f"no room for the weights ({error.strerror}); free some, or set XDG_CACHE_HOME"
            raise OSError(error.errno, said, str(self.folder)) from error
        finally:
            Path(part).unlink(missing_ok=True)

    def keep(self, name: str, part: Path, etag: str | None) -> Path:
        """Keeps a whole `part` as what the name leads to."""
        from adapters.archive import content_hash  # late: it imports PyTorch

        entry = Entry(content_hash(part), etag, time.time())
        os.replace(part, self.file(entry.sha256))
        path = self.use(name, entry)
        self._evict(keep=path)
        return path

    def _evict(self, keep: Path) -> None:
        files = [(path.stat(), path) for path in keep.parent.iterdir() if path.suffix != ".part"]
        total = sum(stat.st_size for stat, _ in files)
        for stat, path in sorted(files, key=lambda each: each[0].st_mtime_ns):
            if total <= self.budget:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                total -= stat.st_size

    def _note(self, name: str, entry: Entry) -> None:
        path = self._name(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
        with os.fdopen(handle, "w") as file:
            json.dump(asdict(entry), file)
        os.replace(part, path)

    def _name(self, name: str) -> Path:
        return self.folder / "names" / hashlib.sha256(name.encode()).hexdigest()
