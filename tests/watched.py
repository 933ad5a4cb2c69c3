"""Watches what a piece of code writes, and bounds what it may cost."""

import gc
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MOST_MEMORY = 128 << 20  # bytes of address space, beyond what the process had
MOST_FILE = 64 << 20  # bytes of the largest file
MOST_SECONDS = 30  # of the processor; the most that was seen is under 2

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = {"os.mkdir", "os.rename", "os.symlink", "os.link", "os.chmod", "os.truncate"}
_written: list[str] | None = None  # None while nobody watches
_installed = False
_collected: str | None = None  # the test of the last full collection


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook (PEP 578): hears of every file that Python opens, makes or moves."""
    if _written is None:
        return
    if event == "open" and isinstance(arguments[0], str | bytes) and arguments[2] & _WRITES:
        _written.append(os.fsdecode(arguments[0]))
    elif event in _CHANGES:
        _written.extend(os.fsdecode(each) for each in arguments if isinstance(each, str | bytes))


def _address_space() -> int:
    pages = Path("/proc/self/statm").read_text().split()[0]
    return int(pages) * resource.getpagesize()


@contextmanager
def watched(own: Path) -> Iterator[None]:
    """Asserts that what runs within writes below `own` alone, leaves it empty, and costs little.

    `own` becomes the folder for temporary files meanwhile. More memory or a larger file than
    allowed is a MemoryError or an OSError to the code within.
    """
    global _installed, _written, _collected
    if not _installed:
        sys.addaudithook(_hook)
        _installed = True
    own.mkdir(exist_ok=True)
    # Else garbage of earlier tests may be freed within, and make room. A full collection takes up
    # to half a second, so a test that watches many times has one.
    test = os.environ.get("PYTEST_CURRENT_TEST")
    gc.collect(1 if test and test == _collected else 2)
    _collected = test
    before, tempfile.tempdir = tempfile.tempdir, str(own)
    bounds = {resource.RLIMIT_FSIZE: MOST_FILE, resource.RLIMIT_AS: _address_space() + MOST_MEMORY}
    limits = {each: resource.getrlimit(each) for each in bounds}
    started = time.process_time()
    for each, most in bounds.items():
        resource.setrlimit(each, (most, limits[each][1]))
    _written = written = []
    try:
        yield
    finally:
        _written = None
        for each, limit in limits.items():
            resource.setrlimit(each, limit)
        seconds = time.process_time() - started
        tempfile.tempdir = before
    outside = [name for name in written if not Path(name).is_relative_to(own)]
    left = list(own.iterdir())
    assert not outside, f"written elsewhere: {outside}"
    assert not left, f"left behind: {left}"
    assert seconds < MOST_SECONDS, f"took {seconds:.0f} s"
