"""Starts Cog's runtime, watches it, and restarts it if its worker has crashed."""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping
from typing import Any

import httpx

from inference.console import clean
from serving.openapi import Json

log = logging.getLogger(__name__)

POLL = 0.25  # seconds between two health checks
TRIES = 3  # failed starts in a row before giving up
PAUSE = 2.0  # seconds before a restart, times the number of failed starts
UNRESPONSIVE = 30.0  # seconds without an answer before a restart
PATIENCE = 2.0  # seconds for a clean exit of the runtime, when no request is running
LONGEST_LINE = 4000  # bytes of a line in the server's log
FAILED = ("SETUP_FAILED", "UNHEALTHY", "DEFUNCT")


class Supervisor:
    """The runtime as a child process, on a free port of 127.0.0.1."""

    def __init__(self, mode: str, environment: Mapping[str, str]) -> None:
        self._mode, self._environment = mode, dict(environment)
        self.client = httpx.AsyncClient(trust_env=False, timeout=httpx.Timeout(None, connect=5))
        self._process: asyncio.subprocess.Process | None = None
        self._output: asyncio.Task[None] | None = None
        self._restarted: asyncio.Future[str] | None = None
        self.url = ""
        self.ready = self._was_ready = False
        self.health: Json = {}
        self.reason = "the model is being loaded"  # why it is not ready

    async def run(self) -> str:
        """Keeps the runtime running. Returns the reason if it cannot be started."""
        failed = 0
        while True:
            self._was_ready = False
            reason = await self._live()
            failed = 0 if self._was_ready else failed + 1
            self.ready = False
            log.error("%s", reason)
            await self._end(signal.SIGKILL)
            if failed >= TRIES:
                return f"the model cannot be loaded: {failed} attempts failed"
            self.reason = f"{reason}; it is being restarted"
            await asyncio.sleep(PAUSE * failed)

    def restart(self, reason: str) -> None:
        """Restarts the runtime."""
        self.ready = False
        self.reason = f"{reason}; it is being restarted"
        if self._restarted is not None and not self._restarted.done():
            self._restarted.set_result(reason)

    async def stop(self) -> None:
        """Ends the runtime with all its processes."""
        self.ready = False
        await self._end(signal.SIGTERM)
        await self.client.aclose()

    async def _live(self) -> str:
        """Starts the runtime and watches it until it fails. Returns the reason."""
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._restarted = asyncio.get_running_loop().create_future()
        command = [sys.executable, "-m", "serving.runtime", "--host", "127.0.0.1"]
        # In a new process group, so that Ctrl-C only reaches the front, which ends the runtime.
        self._process = await asyncio.create_subprocess_exec(
            *command,
            "--x-mode",
            self._mode,
            env=self._environment | {"PORT": str(port)},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            process_group=0,
        )
        assert self._process.stdout is not None
        self._output = asyncio.create_task(_relay(self._process.stdout))
        answered = asyncio.get_running_loop().time()
        while True:
            await asyncio.wait([self._restarted], timeout=POLL)
            if self._restarted.done():
                return self._restarted.result()
            if (code := self._process.returncode) is not None:
                return f"the runtime ended with exit code {code}"
            now = asyncio.get_running_loop().time()
            try:
                answer = await self.client.get(f"{self.url}/health-check", timeout=UNRESPONSIVE)
                self.health, answered = answer.json(), now
            except (httpx.HTTPError, ValueError):
                if self.ready and now - answered > UNRESPONSIVE:
                    return f"the runtime did not answer for {UNRESPONSIVE:.0f} seconds"
                continue
            status = self.health.get("status")
            if status == "SETUP_FAILED":
                return f"loading the model failed: {self._setup_error()}"
            if status in FAILED:
                return "the model's process ended unexpectedly"
            if status in ("READY", "BUSY") and not self._restarted.done():
                self.ready = self._was_ready = True

    def _setup_error(self) -> str:
        logs = str((self.health.get("setup") or {}).get("logs") or "")
        return " ".join(logs.split())[-500:]

    async def _end(self, number: signal.Signals) -> None:
        process = self._process
        if process is None:
            return
        if number != signal.SIGKILL and process.returncode is None:
            process.send_signal(number)
            try:
                await asyncio.wait_for(process.wait(), PATIENCE)
            except TimeoutError:
                pass
        # The worker and its child processes.
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        await process.wait()
        if self._output is not None:
            await asyncio.wait([self._output], timeout=2)
            self._output.cancel()
        self._process = None


async def _relay(stream: asyncio.StreamReader) -> None:
    """Prints the runtime's output, without control characters and URL queries."""
    rest = b""
    while chunk := await stream.read(1 << 16):
        *lines, rest = (rest + chunk).replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            _print(line)
        if len(rest) > 16 * LONGEST_LINE:
            _print(rest)
            rest = b""
    if rest:
        _print(rest)


def _print(line: bytes) -> None:
    text = clean(line[:LONGEST_LINE].decode(errors="replace"))
    if text.strip():
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: Any = probe.getsockname()[1]
        return int(port)
