"""One call in a thread of its own, for calls that may wait for ever or start threads themselves.

A cancelled request is told by an exception in its thread, which Python delivers only between two
instructions, and which must not come while a thread starts: the new thread can take the exception,
and whoever started it then waits for ever. So a thread that exists from the import on starts all
threads here, and whoever waits looks up several times a second.
"""

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

_LOOK = 0.1  # seconds between two moments at which a cancellation is heard

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
    """A call that begins at once. `result` waits for its end."""

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

    def result(self, patience: float = float("inf")) -> None:
        """Raises what the call raised, or `TimeoutError` where it takes longer, in seconds."""
        until = time.monotonic() + patience
        while not self._ended.wait(max(0.0, min(_LOOK, until - time.monotonic()))):
            if time.monotonic() >= until:
                raise TimeoutError
        if self._error is not None:
            raise self._error
