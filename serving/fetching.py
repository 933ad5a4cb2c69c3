"""Downloads the files in a request; can be cancelled at any time."""

import asyncio
import fcntl
import os
import re
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from inference.fetch import (
    Downloader,
    DownloadError,
    SourceError,
    allowed_file,
    data_content,
    is_data,
)
from serving.openapi import Json
from serving.validation import Refused, detail

T = TypeVar("T")
_PREFIX = "zeroprior-inputs-"


async def in_thread(call: Callable[[], T]) -> T:
    """The result of a blocking call in a thread, which is not joined on cancellation or at exit."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def finish(set_result: Callable[[Any], None], value: Any) -> None:
        if not done.done():
            set_result(value)

    def run() -> None:
        try:
            result = call()
        except BaseException as error:
            answer: tuple[Any, Any] = (done.set_exception, error)
        else:
            answer = (done.set_result, result)
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(finish, *answer)

    threading.Thread(target=run, daemon=True).start()
    return await done


class Connections:
    """A downloader whose connections can be closed at any time from another thread."""

    def __init__(self, downloader: Downloader) -> None:
        self._connect, self._lock = downloader.connect, threading.Lock()
        self._sockets: list[socket.socket] = []
        self._shut = False
        self.downloader = replace(downloader, connect=self._connected)

    def _connected(self, *address: Any) -> socket.socket:
        self._check()
        plain = self._connect(*address)
        with self._lock:
            # A second handle of the same connection, because TLS takes over the first.
            self._sockets.append(plain.dup())
        if self._shut:
            plain.close()
        self._check()
        return plain

    def _check(self) -> None:
        if self._shut:
            self.shut()
            raise DownloadError("the download was stopped")

    def shut(self) -> None:
        """Closes all connections, and refuses new ones."""
        self._shut = True
        with self._lock:
            for each in self._sockets:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
                each.close()
            self._sockets = []

    async def do(self, call: Callable[[Downloader], T]) -> T:
        """The result of a call with the downloader; closes its connections on cancellation."""
        try:
            return await in_thread(lambda: call(self.downloader))
        finally:
            self.shut()


class Folder:
    """A temporary folder for downloads; leftover folders of killed servers are removed first."""

    def __init__(self) -> None:
        self._sweep()
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._lock = os.open(self.path, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    @staticmethod
    def _sweep() -> None:
        for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
            with suppress(OSError):
                handle = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while it is in use
                    shutil.rmtree(left, ignore_errors=True)
                finally:
                    os.close(handle)


def is_address(text: str) -> bool:
    """Whether a text is a URL, not a path or a data URL."""
    return "://" in text[:4096] and not is_data(text)


def check_places(inputs: Json, names: frozenset[str], downloader: Downloader) -> None:
    """Raises `Refused` for URLs and paths that a request may not contain. Makes no connection."""
    faults = []
    for name in names & inputs.keys():
        for text in _strings(inputs[name]):
            try:
                if is_address(text):
                    downloader.check(text)
                elif not is_data(text):
                    allowed_file(text)
            except (DownloadError, SourceError) as error:
                faults.append(detail(["input", name], f"{name}: {error}"))
    if faults:
        raise Refused(*faults)


async def fetched(
    inputs: Json, names: frozenset[str], folder: Path, downloader: Downloader
) -> Json:
    """The inputs with URLs and data URLs replaced by files in `folder`.

    Raises `DownloadError` or `SourceError` with the reason. Always closes its connections.
    """

    async def local(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [await local(f"{name}-{place}", each) for place, each in enumerate(value)]
        if not isinstance(value, str):
            return value
        path = folder / name
        try:
            if is_data(value):
                await in_thread(lambda: path.write_bytes(data_content(value)))
                return str(path)
            if not is_address(value):
                return str(allowed_file(value))
            suffix = re.search(r"(\.tar)?\.\w{1,12}$", unquote(urlsplit(value).path))
            path = path.with_name(f"{name}{suffix[0] if suffix else ''}")
            await Connections(downloader).do(lambda ours: ours.file(value, path))
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise DownloadError(f"{name}: cannot be saved on the server ({reason})") from error
        except (DownloadError, SourceError) as error:
            raise DownloadError(f"{name}: {error}") from error
        return str(path)

    return {n: await local(n, v) if n in names else v for n, v in inputs.items()}


def _strings(value: Any) -> list[str]:
    if isinstance(value, list):
        return [text for each in value for text in _strings(each)]
    return [value] if isinstance(value, str) else []
