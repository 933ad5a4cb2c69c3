"""Server-sent events: the snapshot of the whole studio, and the lines of one run's events.jsonl.

Only lines of the file have an id, the byte offset behind the line. The server keeps nothing for a
client: a stream begins behind its `Last-Event-ID`, or `after`, and reads on.
"""

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from studio import gpu
from studio.jobs import Jobs, jobs_of
from studio.replies import Problem, reply
from studio.summaries import LIVE
from trainer.events import event_in
from trainer.run_files import EVENTS

LOOK = 0.2  # seconds between two looks at the file
STATUS = 0.5  # seconds between two snapshots
SILENCE = 15.0  # seconds until a comment
MOST = 1 << 20  # bytes that are read at once
SHOWN = 50  # runs in the snapshot, besides those that are live or queued


def _version() -> str:
    try:
        return version("zeroprior")
    except PackageNotFoundError:  # not installed, but started from its folder
        return ""


def snapshot(jobs: Jobs) -> dict[str, Any]:
    """The state of everything, as /api/status."""
    runs = jobs.runs.all()
    shown = [
        each
        for number, each in enumerate(runs)
        if number < SHOWN or each["state"] in (*LIVE, "queued") or jobs.queue.waits(each["id"])
    ]
    disk = shutil.disk_usage(jobs.studio.folder)
    tasks = [*jobs.studio.tasks.shown()]
    generator = {"state": "off", "base_model": None}
    if jobs.generator is not None:
        generator, tasks = jobs.generator.shown(), tasks + jobs.generator.tasks()
    if jobs.captions is not None:
        tasks += jobs.captions.tasks()
    return {
        "version": _version(),
        "runs": shown,
        "queue": {"order": jobs.queue.order(runs), "held": jobs.queue.held},
        "gpu": gpu.gpu(),
        "disk": {"free": disk.free >> 24 << 24, "total": disk.total},
        "generator": generator,
        "tasks": tasks,
    }


class _Snapshots:
    """The snapshot as text, made at most twice a second for all streams together."""

    def __init__(self) -> None:
        self._made, self._text = 0.0, ""

    def text(self, jobs: Jobs) -> str:
        if time.monotonic() - self._made >= STATUS:
            self._text = json.dumps(snapshot(jobs), separators=(",", ":"))
            self._made = time.monotonic()
        return self._text


_SNAPSHOTS: dict[Path, _Snapshots] = {}


def lines_after(path: Path, offset: int) -> Iterator[tuple[int, bytes]]:
    """The complete lines behind an offset, at most `MOST` bytes, each with the offset behind it.

    An offset behind the end belongs to an earlier file of this name: all lines are given.
    """
    try:
        file = path.open("rb")
    except OSError:
        return
    with file:
        if offset > file.seek(0, 2):
            offset = 0
        file.seek(offset)
        data = file.read(MOST)
    whole, _, rest = data.rpartition(b"\n")
    if not whole and len(rest) == MOST:  # no event is so long
        yield offset + MOST, b""
    for line in whole.split(b"\n") if whole or data.startswith(b"\n") else ():
        offset += len(line) + 1
        yield offset, line


async def _stream(request: Request) -> Response:
    jobs, run = jobs_of(request.app.state.studio), request.query_params.get("run")
    path = jobs.runs.folder(run) / EVENTS if run else None
    given = request.headers.get("last-event-id") or request.query_params.get("after") or "0"
    if not (given.isascii() and given.isdecimal() and len(given) < 19):
        raise Problem(400, "after must be a byte offset", "after")
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    parts = _events(jobs, path, int(given))
    return StreamingResponse(parts, headers=headers, media_type="text/event-stream")


async def _events(jobs: Jobs, path: Path | None, offset: int) -> AsyncIterator[bytes]:
    """The text of the stream; it ends only with the server."""
    snapshots = _SNAPSHOTS.setdefault(jobs.studio.folder, _Snapshots())
    yield b"retry: 500\n\n"
    shown, spoken, size = "", time.monotonic(), -1
    while not jobs.studio.ending.is_set():
        said = False
        text = snapshots.text(jobs)
        if text != shown:
            shown, said = text, True
            content = text[:-1] + f',"time":{time.time():.3f}}}'
            yield f"event: status\ndata: {content}\n\n".encode()
        more = False
        if path is not None and (now := _size(path)) != size:
            size = now
            parts = []
            for offset, line in lines_after(path, offset):  # noqa: B020
                more = True
                if event_in(line + b"\n") is not None:
                    parts.append(b"event: run\nid: %d\ndata: %s\n\n" % (offset, line))
            if parts:
                said = True
                yield b"".join(parts)
            if more:
                size = -1  # maybe more than was read at once
        if said:
            spoken = time.monotonic()
        elif time.monotonic() - spoken > SILENCE:
            spoken = time.monotonic()
            yield b": still here\n\n"
        await asyncio.sleep(0 if more else LOOK)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


async def _status(request: Request) -> Response:
    return reply(snapshot(jobs_of(request.app.state.studio)) | {"time": round(time.time(), 3)})


ROUTES = [Route("/api/status", _status), Route("/api/events", _stream)]
