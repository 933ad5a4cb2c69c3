"""Weights by their content: in the disk cache of each machine, and in a store that all can read.

The store is any folder of fsspec: `file:///shared/weights`, `s3://bucket/weights`. It has one file
for each content, named by its SHA-256. Without a store, all replicas must be on one machine.
"""

import os
import shutil
import threading
from pathlib import Path
from typing import Any, BinaryIO

from adapters.files.atomic import content_hash
from inference.fetch import DiskCache, SourceError

MOST_HASHES = 10_000  # of files that were hashed


class Contents:
    """Finds files by their SHA-256. Thread-safe."""

    def __init__(self, cache: DiskCache, store: str | None = None) -> None:
        self._cache = cache
        self._hashes: dict[tuple[object, ...], str] = {}
        self._stored: set[str] = set()
        self._files: Any = None
        if store is not None:
            import fsspec

            self._files, self._root = fsspec.core.url_to_fs(store)

    def add(self, path: Path) -> str:
        """Makes a file available to all machines; returns its SHA-256."""
        sha256 = self._hash(path)
        kept = self._cache.file(sha256)
        if not kept.is_file():
            with self._cache.part() as part:
                shutil.copyfile(path, part)
                self._cache.keep(None, part, None)
        if self._files is not None and sha256 not in self._stored:
            target = f"{self._root}/{sha256}"
            if not self._files.exists(target):
                with path.open("rb") as file:
                    write_whole(self._files, file, target)
            self._stored.add(sha256)
        return sha256

    def get(self, sha256: str) -> Path:
        """The file on this machine. Raises `SourceError` if it is nowhere, or damaged."""
        path = self._cache.file(sha256)
        try:
            os.utime(path)  # the most recently used
            return path
        except FileNotFoundError:
            pass
        if self._files is None:
            raise SourceError(
                "the weights are not on this machine; a fleet of several machines needs a store"
            )
        with self._cache.part() as part:
            try:
                self._files.get_file(f"{self._root}/{sha256}", str(part))
            except FileNotFoundError:
                raise SourceError(
                    "the weights are no longer in the store; send them again"
                ) from None
            kept = self._cache.keep(None, part, None)
        if kept.name != sha256:
            raise SourceError("the weights in the store are damaged; send them again")
        return kept

    def _hash(self, path: Path) -> str:
        if path.parent == self._cache.file("").parent:  # named by its content
            return path.name
        status = os.stat(path)
        key = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        if key not in self._hashes:
            if len(self._hashes) >= MOST_HASHES:
                self._hashes.clear()
            self._hashes[key] = content_hash(path)
        return self._hashes[key]


_WRITING = threading.Lock()  # a transaction belongs to the file system, which threads share


def write_whole(files: Any, source: BinaryIO, target: str) -> None:
    """Writes a file of fsspec's `files`, which is visible only when it is complete."""
    with _WRITING:
        files.makedirs(target.rpartition("/")[0], exist_ok=True)
        with files.transaction, files.open(target, "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
