"""A TLS connection with a deadline for every step, which can be cancelled.

Python raises a cancellation as an exception between two bytecodes of the thread, so a call that
blocks in C delays it. No call here blocks for longer than `POLL_SECONDS`.
"""

import io
import os
import select
import socket
import ssl
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from inference.fetch.addresses import POLL_SECONDS

IDLE_SECONDS = 30.0  # the longest wait for a connection, a handshake or the next byte
_BUFFER = 1 << 16  # bytes


class DeadlinePassed(Exception):
    """The deadline of the whole download has passed."""


class Deadline:
    """The deadline of a download, with all redirects and attempts."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """The seconds until then, more than 0. Raises `DeadlinePassed`."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise DeadlinePassed
        return left

    def step(self) -> float:
        """The timeout of one step in seconds: look-up, connection, handshake or read."""
        return min(IDLE_SECONDS, self.left())


def connect_to(address: tuple[str, int], seconds: float) -> socket.socket:
    """A TCP connection to an IP address. Raises OSError, TimeoutError after `seconds`."""
    host, port = address
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    plain = socket.socket(family, socket.SOCK_STREAM)
    try:
        plain.setblocking(False)
        try:
            plain.connect((host, port))
        except BlockingIOError:
            ready = select.poll()
            ready.register(plain, select.POLLOUT)
            end = time.monotonic() + seconds
            while not ready.poll(int(1000 * min(POLL_SECONDS, seconds))):
                if time.monotonic() >= end:
                    raise TimeoutError(f"no connection within {seconds:.0f} seconds") from None
        failed = plain.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if failed:
            raise OSError(failed, os.strerror(failed))
    except BaseException:
        plain.close()
        raise
    return plain


class Wire(io.RawIOBase):
    """A TLS socket for `http.client`, with a deadline for all reads."""

    def __init__(
        self, plain: socket.socket, context: ssl.SSLContext, host: str, deadline: Deadline
    ) -> None:
        self._socket, self._deadline = plain, deadline
        try:
            plain.settimeout(POLL_SECONDS)
            secure = context.wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)
            self._socket = secure
            self._patiently(secure.do_handshake, "no TLS handshake")
        except BaseException:
            self._socket.close()
            raise

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Reads the available bytes, at least one unless the stream has ended."""
        return int(self._patiently(lambda: self._socket.recv_into(buffer), "no byte"))

    def sendall(self, data: bytes) -> None:
        """Sends all data, in parts."""
        left = memoryview(data)
        while left:
            send = partial(self._socket.send, left)
            left = left[self._patiently(send, "no byte taken") :]

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self, _BUFFER)

    def close(self) -> None:
        """Does nothing: `http.client` closes its socket while the response is still being read."""

    def hang_up(self) -> None:
        """Closes the connection."""
        self._socket.close()

    def _patiently(self, step: Callable[[], Any], missed: str) -> Any:
        allowed = self._deadline.step()
        end = time.monotonic() + allowed
        while True:
            self._socket.settimeout(min(POLL_SECONDS, self._deadline.left()))
            try:
                return step()
            except TimeoutError:
                if time.monotonic() >= end:
                    self._deadline.left()
                    raise TimeoutError(f"{missed} within {allowed:.0f} seconds") from None
