"""Runs the front and Cog's runtime together."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

import uvicorn

from inference.console import log_to_console
from inference.fetch import Downloader
from serving.fetching import Folder
from serving.front import Front
from serving.schema import SCHEMA_FILE
from serving.supervisor import Supervisor

log = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are handled in `_serve`, which also ends the runtime."""
        yield


def run(
    mode: str,
    listener: socket.socket,
    environment: Mapping[str, str],
    downloader: Downloader | None = None,
) -> int:
    """Serves on `listener` until SIGTERM or Ctrl-C. Returns the exit code.

    The working folder is that of Cog's runtime, with the entry points and the schema.

    It is 1 if the model cannot be loaded. `downloader` downloads files and sends webhooks of
    requests; tests pass another one.
    """
    log_to_console()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    folder = Folder()
    try:
        return asyncio.run(_serve(mode, listener, environment, folder, downloader))
    finally:
        folder.remove()


async def _serve(
    mode: str,
    listener: socket.socket,
    environment: Mapping[str, str],
    folder: Folder,
    downloader: Downloader | None,
) -> int:
    stop, code = asyncio.Event(), 1
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)

    # For the runtime's webhooks, independent of the address that the server listens on.
    inside = socket.create_server(("127.0.0.1", 0))
    allowed = [environment.get("ZEROPRIOR_FILES", ""), str(folder.path)]
    files = os.pathsep.join(filter(None, allowed))
    hosts = ",".join(filter(None, [environment.get("NO_PROXY", ""), "127.0.0.1"]))
    supervisor = Supervisor(
        mode,
        {**environment, "ZEROPRIOR_FILES": files, "NO_PROXY": hosts, "no_proxy": hosts},
    )
    document = json.loads(Path(SCHEMA_FILE).read_text(encoding="utf-8"))
    address = f"http://127.0.0.1:{inside.getsockname()[1]}"
    front = Front(mode, document, supervisor, folder, address)
    if downloader is not None:
        front.downloader = downloader
    config = uvicorn.Config(
        front.app(), log_level="warning", lifespan="off", timeout_graceful_shutdown=2
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve([listener, inside]))
    supervised = asyncio.create_task(supervisor.run())
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([stopped, serving, supervised], return_when=asyncio.FIRST_COMPLETED)
        if supervised.done():
            log.error("%s", supervised.result())
        elif stopped.done():
            code = 0
            await front.stop()
        return code
    finally:
        supervised.cancel()
        await supervisor.stop()
        server.should_exit = True
        await asyncio.wait([serving], timeout=5)
