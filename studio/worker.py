"""A process of the server that loads PyTorch: JSON lines in, JSON lines out.

It ends with the server: also after kill -9, since its input ends then.
"""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from studio.processes import environment

log = logging.getLogger(__name__)

MOST_LINE = 8 << 20  # bytes of an answer


class WorkerEnded(Exception):
    """The process has ended; the message says how."""


class Worker:
    """Starts a module as a process when it is needed, and again after it has ended."""

    def __init__(self, module: str, folder: Path) -> None:
        """folder: the working folder, where its output goes to `MODULE.log`."""
        self._module, self._folder = module, folder
        self._process: asyncio.subprocess.Process | None = None
        self._killed: asyncio.subprocess.Process | None = None  # may not have ended yet
        self._turn: asyncio.Lock | None = None
        self._closed = False
        self._log = folder / f".{module.rpartition('.')[2]}.log"

    @property
    def runs(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.returncode is None

    async def ask(
        self,
        request: dict[str, Any],
        progress: Callable[[dict[str, Any]], Awaitable[None] | None] = lambda _: None,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        """The answer to a request, the first line with `answer`; other lines go to `progress`.

        What `progress` returns is awaited before the next line is read.

        One request after another. Raises `WorkerEnded`.
        """
        if self._turn is None:
            self._turn = asyncio.Lock()
        async with self._turn:
            process = await self._started()
            assert process.stdin is not None and process.stdout is not None
            try:
                self.send(request)
                while True:
                    line = await asyncio.wait_for(process.stdout.readline(), timeout)
                    if not line:
                        break
                    found = json.loads(line)
                    if "answer" in found:
                        answer: dict[str, Any] = found["answer"]
                        return answer
                    if (waiting := progress(found)) is not None:
                        await waiting
            except (OSError, ValueError) as error:
                self.kill()
                raise WorkerEnded(f"its answer cannot be read ({error})") from None
            except BaseException:  # a timeout or a cancelled request: its answer would come next
                self.kill()
                raise
            code = await process.wait()
            raise WorkerEnded(self._why(code))

    def send(self, request: dict[str, Any]) -> None:
        """Sends a request without an answer, if the process runs."""
        if self.runs and self._process is not None and self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.write(json.dumps(request).encode() + b"\n")

    def kill(self) -> None:
        """Ends the process at once."""
        if self.runs and self._process is not None:
            self._killed = self._process
            with suppress(ProcessLookupError):
                self._process.kill()

    async def stop(self, for_good: bool = False) -> None:
        """Ends the process and waits for it. `for_good`: requests that wait do not start it."""
        self._closed = for_good
        self.kill()
        if self._process is not None:
            if self._process.stdin is not None:
                self._process.stdin.close()
            await self._process.wait()

    async def _started(self) -> asyncio.subprocess.Process:
        if self._closed:
            raise WorkerEnded("the studio is ending")
        if self._process is not None and self._process is self._killed:
            await self._process.wait()
        if self.runs and self._process is not None:
            return self._process
        with self._log.open("wb") as errors:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", self._module),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=self._folder,
                env=environment() | {"TQDM_DISABLE": "1"},
                limit=MOST_LINE,
                start_new_session=True,
            )
        return self._process

    def _why(self, code: int) -> str:
        try:
            last = self._log.read_text(errors="replace").strip().splitlines()[-1:]
        except OSError:
            last = []
        how = f"signal {-code}" if code < 0 else f"code {code}"
        hint = ", maybe because the machine had no free memory" if code == -signal.SIGKILL else ""
        return f"the process ended by {how}{hint}{': ' if last else ''}{''.join(last)[:500]}"


# ---- Inside of the process -----------------------------------------------------------------------


class Pipe:
    """The process's side: requests in order, and answers."""

    def __init__(self, on_request: Callable[[dict[str, Any]], bool] = lambda _: False) -> None:
        """on_request: called at once in another thread; true if it has dealt with the request."""
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # what libraries print goes to the log
        self._requests: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._on_request = on_request
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin:
            request = json.loads(line)
            if not self._on_request(request):
                self._requests.put(request)
        os._exit(0)  # the server has ended

    def requests(self, timeout: float | None = None) -> Iterator[dict[str, Any]]:
        """The requests; ends if there is none for `timeout` seconds."""
        from queue import Empty

        while True:
            try:
                yield self._requests.get(timeout=timeout)
            except Empty:
                return

    def write(self, **content: Any) -> None:
        """Writes one line."""
        print(json.dumps(content), file=self._out, flush=True)
