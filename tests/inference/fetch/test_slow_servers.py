"""A download ends in its time and when it is cancelled, whatever the server does.

A real TLS server on this machine that is slow at each stage of an answer.
"""

import ctypes
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme
from web_server import PUBLIC

from inference.fetch.connection import connect_to
from inference.fetch.disk_cache import DiskCache
from inference.fetch.download import Downloader, DownloadError
from inference.fetch.sources import Sources

HOST = "slow.example"
URL = f"https://{HOST}/weights.zip"
Talk = Callable[[socket.socket], None]  # what the server does with a connection


def drip(data: bytes) -> Talk:
    """Sends byte after byte, without end."""

    def talk(line: socket.socket) -> None:
        for number in range(1 << 30):
            line.sendall(data[number % len(data) :][:1])
            time.sleep(0.02)

    return talk


def after(start: bytes, rest: Talk) -> Talk:
    def talk(line: socket.socket) -> None:
        line.sendall(start)
        rest(line)

    return talk


def silence(line: socket.socket) -> None:
    while line.recv(1000):
        pass


def flood(line: socket.socket) -> None:
    while True:
        line.sendall(bytes(1 << 16))


OK = b"HTTP/1.1 200 OK\r\n"
SLOW: dict[str, Talk] = {
    "no answer": silence,
    "a slow status line": drip(b"HTTP/1.1 200 " + b"a" * 1000),
    "a slow header": after(OK, drip(b"X: " + b"a" * 1000)),
    "informational answers without end": drip(b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a slow body": after(OK + b"Content-Length: 1000000\r\n\r\n", drip(b"a")),
    "a slow body of unknown length": after(OK + b"\r\n", drip(b"a")),
    "slow chunks": after(OK + b"Transfer-Encoding: chunked\r\n\r\n", drip(b"1\r\na\r\n")),
    "a slow length of a chunk": after(OK + b"Transfer-Encoding: chunked\r\n\r\n", drip(b"0")),
    "slow trailers": after(OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", drip(b"X: a\r\n")),
    "failures that may pass": after(b"HTTP/1.1 503 Busy\r\nX: ", drip(b"a")),
}


class Server:
    """Answers every connection in the same way, over TLS unless it is silent before that."""

    def __init__(self) -> None:
        self.talk: Talk | None = None  # None: not even a handshake
        authority = trustme.CA()
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(HOST).configure_cert(self._context)
        self.trust = ssl.create_default_context()
        authority.configure_trust(self.trust)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def downloader(self, most: int = 1 << 20) -> Downloader:
        address = self._listener.getsockname()
        return Downloader(
            lambda host, port, seconds: [PUBLIC],
            lambda _, seconds: socket.create_connection(address, seconds),
            self.trust,
            pause=0,
            max_bytes=most,
        )

    def close(self) -> None:
        self._listener.close()
        for line in self._open:
            line.close()

    def _accept(self) -> None:
        while True:
            try:
                line, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(line)
            threading.Thread(target=self._serve, args=(line,), daemon=True).start()

    def _serve(self, line: socket.socket) -> None:
        try:
            if self.talk is None:
                silence(line)
            else:
                with self._context.wrap_socket(line, server_side=True) as secure:
                    secure.recv(10_000)
                    self.talk(secure)
        except OSError:
            pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def left_behind(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("talk", [None, *SLOW.values()], ids=["no handshake", *SLOW])
def test_a_slow_answer_is_given_up_when_the_time_is_over(
    talk: Talk | None, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inference.fetch.download.MAX_SECONDS", 0.3)
    server.talk = talk
    start = time.monotonic()
    with pytest.raises(DownloadError, match="slow.example/weights.zip was not complete within 0.3"):
        Sources(server.downloader(), DiskCache(tmp_path)).file(URL)
    assert time.monotonic() - start < 2
    assert left_behind(tmp_path) == []


def test_the_hub_has_less_time_for_its_list_of_files(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inference.fetch.download.MAX_JSON_SECONDS", 0.3)
    server.talk = SLOW["a slow body"]
    start = time.monotonic()
    with pytest.raises(DownloadError, match="was not complete within 0.3 seconds"):
        server.downloader().json(URL)
    assert time.monotonic() - start < 2


def test_a_file_without_end_is_given_up_at_the_limit_of_its_size(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.talk = after(OK + b"\r\n", flood)
    written: list[int] = []
    unlink = Path.unlink

    def watch(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".part" and path.exists():
            written.append(path.stat().st_size)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", watch)
    with pytest.raises(DownloadError, match="more than 1,000,000 bytes, which is the limit"):
        Sources(server.downloader(most=1_000_000), DiskCache(tmp_path)).file(URL)
    assert written and max(written) <= 1_000_000
    assert left_behind(tmp_path) == []


class Cancelled(BaseException):
    """Raised in the thread of a download, as the runtime does it."""


def test_a_cancellation_is_noticed_at_every_stage(tmp_path: Path) -> None:
    """All stages at once, since each takes up to a second."""
    talks = {"no handshake": None} | SLOW
    servers, threads, ends = [], [], {}
    for number, (name, talk) in enumerate(talks.items()):
        server = Server()
        server.talk = talk
        servers.append(server)
        sources = Sources(server.downloader(), DiskCache(tmp_path / str(number)))

        def download(name: str = name, sources: Sources = sources) -> None:
            try:
                sources.file(URL)
            except Cancelled:
                ends[name] = time.monotonic()

        threads.append(threading.Thread(target=download))
        threads[-1].start()
    time.sleep(0.5)
    start = time.monotonic()
    for thread in threads:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident or 0), ctypes.py_object(Cancelled)
        )
    for thread in threads:
        thread.join(10)
    for server in servers:
        server.close()
    assert ends.keys() == talks.keys()
    assert max(ends.values()) - start < 3
    assert left_behind(tmp_path) == []


def test_a_connection_that_is_not_answered_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        address = listener.getsockname()[:2]
        lines = [connect_to(address, 1)]  # nobody accepts, so the queue is full after one or two
        start = time.monotonic()
        with pytest.raises(OSError, match="no connection within 0 seconds"):
            for _ in range(10):
                lines.append(connect_to(address, 0.2))
        assert time.monotonic() - start < 2
        for line in lines:
            line.close()
    with pytest.raises(ConnectionRefusedError):
        connect_to(address, 1)
