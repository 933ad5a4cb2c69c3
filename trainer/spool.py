"""What is put aside on disk, so that memory does not grow with the number of pictures."""

import mmap
import tempfile
from typing import Generic, TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key")
Content = bytes | memoryview


class NoRoom(OSError):
    """The folder of temporary files is full."""


class Spool:
    """A nameless temporary file that is written in full and then mapped into memory.

    What is read of it lies in the system's cache, which shrinks when others need the memory. The
    file is gone with the last who looks into it, however the process ends.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._file = tempfile.TemporaryFile()

    def add(self, data: Content) -> slice:
        """Where in `mapped` the bytes will be found. Raises `NoRoom`."""
        start = self._file.tell()
        try:
            self._file.write(data)
        except OSError as error:
            raise self._no_room(error) from error
        return slice(start, self._file.tell())

    def mapped(self) -> memoryview:
        """All that was added; nothing is added afterwards. Raises `NoRoom`."""
        try:
            self._file.flush()
        except OSError as error:
            raise self._no_room(error) from error
        return memoryview(mmap.mmap(self._file.fileno(), 0) if self._file.tell() else b"")

    def _no_room(self, error: OSError) -> NoRoom:
        return NoRoom(
            error.errno,
            f"{error.strerror}: {self._file.tell():,} bytes of {self._what} in "
            f"{tempfile.gettempdir()}; make room there, or set TMPDIR to a folder that has more",
        )


class Tensors(Generic[Key]):
    """Tensors of any device, shape and type, in a `Spool`."""

    def __init__(self, what: str) -> None:
        self._spool = Spool(what)
        self._kept: dict[Key, tuple[slice, torch.dtype, torch.Size]] = {}

    def add(self, key: Key, value: Tensor) -> None:
        """Copies it. Raises `NoRoom`."""
        data = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        self._kept[key] = self._spool.add(data), value.dtype, value.shape

    def mapped(self) -> dict[Key, Tensor]:
        """All of them on the CPU, where they are read as they are used. Raises `NoRoom`."""
        mapped = self._spool.mapped()
        return {
            key: torch.frombuffer(mapped[place], dtype=dtype).view(shape)
            for key, (place, dtype, shape) in self._kept.items()
        }
