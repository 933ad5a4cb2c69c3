"""Runs a call in a separate thread, for calls that may block forever or start threads themselves.

A request is cancelled by an exception in its thread. Python raises it only between two
instructions, and it must not arrive while a thread starts: the new thread can receive the
exception, and the thread that started it then waits forever. So one thread, started at import,
starts all threads here, and waiting is interrupted several times a second.
"""

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

_INTERVAL = 0.1  # seconds between two points at which a cancellation can be raised

_waiting: SimpleQueue[Callable[[], None]] = SimpleQueue()


def _start_threads() -> None:
    while True:
        threading.Thread(target=_waiting.get(), daemon=True).start()


def _starter() -> threading.Thread:
    thread = threading.Thread(target=_start_threads, name="starts threads", daemon=True)
    thread.start()
    return thread


_thread = _starter()


class InThread:
    """A call that starts immediately. `result` waits for its end."""

    def __init__(self, call: Callable[[], object]) -> None:
        global _thread
        self._call, self._ended = call, threading.Event()
        self._error: BaseException | None = None
        if not _thread.is_alive():  # after a fork
            _thread = _starter()
        _waiting.put(self._run)

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self._error = error
        finally:
            self._ended.set()

    @property
    def ended(self) -> bool:
        """Whether the call has returned or raised."""
        return self._ended.is_set()

    def result(self, timeout: float = float("inf")) -> None:
        """Waits at most `timeout` seconds. Raises the call's exception, or `TimeoutError`."""
        until = time.monotonic() + timeout
        while not self._ended.wait(max(0.0, min(_INTERVAL, until - time.monotonic()))):
            if time.monotonic() >= until:
                raise TimeoutError
        if self._error is not None:
            raise self._error
