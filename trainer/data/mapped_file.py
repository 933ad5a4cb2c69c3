"""What is put aside on disk, so that memory does not grow with the number of pictures."""

import mmap
import tempfile

Content = bytes | memoryview


class NoRoom(OSError):
    """The folder of temporary files is full."""


class MappedFile:
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
