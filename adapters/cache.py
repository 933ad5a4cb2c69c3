"""An LRU cache of adapters in CPU memory, by the content of their files."""

import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from adapters.archive import Archive, Check, read_archive
from adapters.files.atomic import content_hash
from adapters.formats import Delta, Layout, as_delta, bytes_of, config_beside

MOST_NOTES = 64  # of one archive, one for each scale and model
DEFAULT_BUDGET = 8 << 30  # bytes; a rank 32 LoRA of the 20 B model takes 1 GiB
BYTES_PER_TENSOR = 2000  # of the Python objects around a tensor: 1,800 measured


@dataclass
class _Entry:
    archive: Archive
    size: int  # bytes, with the notes
    fitted: tuple[Layout, dict[str, Delta]] | None = None  # to the model used last
    notes: dict[object, list[str]] = field(default_factory=dict)  # see `AdapterCache.noted`


class AdapterCache:
    """Read and checked archives; the least recently used are evicted beyond a budget of bytes.

    Thread-safe. A file is identified by its SHA-256, not by its name; a file that is unchanged on
    disk is not hashed again. The last one read is kept even if it is larger than the budget.
    """

    def __init__(self, budget: int = DEFAULT_BUDGET) -> None:
        self.budget = budget  # bytes
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._hashes: OrderedDict[tuple[object, ...], str] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """Bytes of memory of all archives, by `memory_of`."""
        return sum(entry.size for entry in self._entries.values())

    def get(
        self, path: str | PathLike[str], check: Check | None = None, config: Path | None = None
    ) -> Archive:
        """The checked archive of a weights file; the same object for the same content.

        `check` is for a file that has to be read, `config` its adapter_config.json: see
        `read_archive`. Raises `BrokenArchive` with the reason.
        """
        with self._lock:
            if not Path(path).is_file():
                return read_archive(path)  # raises with the reason
            config = config or config_beside(Path(path))
            key = self._hash(Path(path)) + (self._hash(config) if config else "")
            entry = self._entries.get(key)
            if entry is None:
                archive = read_archive(path, check, config)
                # Without the file's name: another file may have the same content.
                archive = replace(archive, names=archive.names[1:])
                entry = self._entries[key] = _Entry(archive, memory_of(archive))
            self._entries.move_to_end(key)
            while self.size > self.budget and len(self._entries) > 1:
                self._entries.popitem(last=False)
            return entry.archive

    def fit(self, archive: Archive, layout: Layout, source: str = "weights") -> dict[str, Delta]:
        """`layout.fit` of an archive's deltas, computed once for each cached archive.

        Raises `LoraMismatch` with the reason.
        """
        with self._lock:
            entry = self._entry(archive)
            if entry is None:
                return layout.fit(archive.deltas, source)
            if entry.fitted is None or entry.fitted[0] is not layout:
                entry.fitted = layout, layout.fit(archive.deltas, source)
            return entry.fitted[1]

    def noted(self, archive: Archive, key: object, find: Callable[[], list[str]]) -> list[str]:
        """The result of `find`, cached under `key` as long as the archive is."""
        with self._lock:
            entry = self._entry(archive)
            if entry is None:
                return find()
            if key not in entry.notes:
                if len(entry.notes) >= MOST_NOTES:
                    entry.size -= sum(map(_json, entry.notes.values()))
                    entry.notes.clear()
                entry.notes[key] = find()
                entry.size += _json(entry.notes[key])
            return entry.notes[key]

    def drop(self, archive: Archive) -> None:
        """Removes an archive of a refused request, unless it has been used before."""
        with self._lock:
            for key, entry in list(self._entries.items()):
                if entry.archive.deltas is archive.deltas and entry.fitted is None:
                    del self._entries[key]

    def forget(self, sha256: str) -> None:
        """Removes the archive of a file with this content."""
        with self._lock:
            for key in [each for each in self._entries if each.startswith(sha256)]:
                del self._entries[key]

    def _entry(self, archive: Archive) -> _Entry | None:
        """The entry of an archive, also if names were added to it."""
        entries = self._entries.values()
        return next((each for each in entries if each.archive.deltas is archive.deltas), None)

    def _hash(self, path: Path) -> str:
        status = os.stat(path)
        seen = (
            status.st_dev,
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
        )
        if seen not in self._hashes:
            self._hashes[seen] = content_hash(path)
            if len(self._hashes) > 1000:
                self._hashes.popitem(last=False)
        return self._hashes[seen]


def memory_of(archive: Archive) -> int:
    """Bytes of memory of an archive: tensors, Python objects, meta.json and names."""
    tensors = sum(len(as_delta(delta).tensors()) for delta in archive.deltas.values())
    vectors = sum(each.vectors.nbytes for each in archive.placeholders)
    text = _json(archive.meta) + sum(map(sys.getsizeof, archive.names))
    return bytes_of(archive.deltas) + BYTES_PER_TENSOR * tensors + vectors + text


def _json(value: Any) -> int:
    """Bytes of memory of a JSON value; it is nested at most 50 levels deep."""
    size = sys.getsizeof(value)
    if isinstance(value, dict):
        size += sum(_json(key) + _json(each) for key, each in value.items())
    elif isinstance(value, list):
        size += sum(map(_json, value))
    return size
