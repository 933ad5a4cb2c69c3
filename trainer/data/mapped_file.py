"""Temporary files on disk, so that memory does not grow with the number of images."""

import mmap
import tempfile

Content = bytes | memoryview


class NoSpace(OSError):
    """The folder of temporary files is full."""


class MappedFile:
    """An unnamed temporary file that is written first and then memory-mapped.

    Pages that are read are in the system's page cache, which can be freed. The file disappears with
    its last reference, also if the process is killed.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._file = tempfile.TemporaryFile()

    def add(self, data: Content) -> slice:
        """Appends bytes; returns their position in `mapped`. Raises `NoSpace`."""
        start = self._file.tell()
        try:
            self._file.write(data)
        except OSError as error:
            raise self._no_space(error) from error
        return slice(start, self._file.tell())

    def mapped(self) -> memoryview:
        """Everything that was added, memory-mapped. Add nothing afterwards. Raises `NoSpace`."""
        try:
            self._file.flush()
        except OSError as error:
            raise self._no_space(error) from error
        return memoryview(mmap.mmap(self._file.fileno(), 0) if self._file.tell() else b"")

    def _no_space(self, error: OSError) -> NoSpace:
        return NoSpace(
            error.errno,
            f"{error.strerror}: {self._file.tell():,} bytes of {self._what} in "
            f"{tempfile.gettempdir()}; free disk space, or set TMPDIR to a folder with more",
        )
