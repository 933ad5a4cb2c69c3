"""A studio's server in a process of its own, and Chromium, for the tests of the page."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pages
from pages import program
from root import ROOT

if TYPE_CHECKING:
    from playwright.sync_api import Page

SECONDS = 60


def chromium() -> str | None:
    """The browser: $CHROMIUM, or that of Debian's package."""
    path = os.environ.get("CHROMIUM", "/usr/bin/chromium")
    return path if Path(path).is_file() else None


class Server:
    """`python -m studio` in a folder, at a port that stays the same after a restart."""

    def __init__(self, folder: Path, small: bool = False, **environment: str) -> None:
        """small: see `pages.program`."""
        self.folder, self._program, self._environment = folder, program(small), environment
        with socket.create_server(("127.0.0.1", 0)) as found:
            self.port = found.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}/"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        # Its output in a file: runs inherit it, and a pipe would keep the tests waiting for them.
        with (self.folder / "server.txt").open("ab") as output:
            words = [*self._program, "--folder", str(self.folder), "--port", str(self.port)]
            path = os.pathsep.join((str(ROOT), str(Path(pages.__file__).parent)))
            own = {"OMP_NUM_THREADS": "1", "BASE_MODEL": "miniature-turbo", "PYTHONPATH": path}
            self._process = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                env={**os.environ, **own, **self._environment},
                stdout=output,
                stderr=output,
            )
        for _ in range(SECONDS * 10):
            try:
                with urllib.request.urlopen(f"{self.address}api/status", timeout=5):
                    return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        raise AssertionError((self.folder / "server.txt").read_text())

    def end(self, how: int = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(SECONDS)
            self._process = None


@contextmanager
def serving(folder: Path, small: bool = False, **environment: str) -> Iterator[Server]:
    server = Server(folder, small, **environment)
    server.start()
    try:
        yield server
    finally:
        server.end()


@contextmanager
def small_page(folder: Path, height: int) -> Iterator[tuple[Server, "Page"]]:
    """A page of a server with small programs (`pages.program`); its scripts must not fail."""
    from playwright.sync_api import sync_playwright

    wrong: list[str] = []
    with serving(folder, small=True) as server, sync_playwright() as found:
        browser = found.chromium.launch(executable_path=chromium())
        page = browser.new_context(viewport={"width": 1280, "height": height}).new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.emulate_media(reduced_motion="reduce")
        yield server, page
        browser.close()
    assert wrong == []
