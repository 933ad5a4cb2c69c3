"""Runs to look at: list, one, series, files, log, report, comparison."""

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from studio.folder import entry_path, open_file
from studio.history import History
from studio.jobs import Jobs, jobs_of
from studio.replies import TYPES, Problem, reply, send_file
from studio.summaries import CONSOLE, facts_of, log_lines
from trainer.run_files import LOG, REPORT, RESULT, record_of

POINTS = 2000
MOST = 200  # runs in one answer
LOG_BYTES = 256_000  # of one answer
REPORT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; sandbox"
_RESULTS = {"passed": "passed", "doubtful": "warning", "failed": "failed"}


def _jobs(request: Request) -> Jobs:
    return jobs_of(request.app.state.studio)


def _number(request: Request, name: str, default: int, least: int, most: int) -> int:
    text = request.query_params.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 16):
        raise Problem(400, f"{name} must be a whole number", name)
    return min(max(int(text), least), most)


async def _list(request: Request) -> Response:
    """GET /api/runs: the newest first; `before` is the last run of the previous answer."""
    jobs, limit = _jobs(request), _number(request, "limit", 50, 1, MOST)
    ids, before = jobs.runs.ids(), request.query_params.get("before")
    if before in ids:
        ids = ids[ids.index(before) + 1 :]
    return reply(
        {"runs": [jobs.runs.summary(each) for each in ids[:limit]], "more": len(ids) > limit}
    )


async def _one(request: Request) -> Response:
    jobs, identity = _jobs(request), request.path_params["id"]
    folder = jobs.runs.folder(identity)
    summary, history = jobs.runs.summary(identity), jobs.runs.history(identity)
    record, facts = record_of(folder), facts_of(folder)
    settings, dataset = record.get("settings") or {}, record.get("dataset") or {}
    error = history.error
    return reply(
        summary
        | {
            "given": settings.get("given") or {},
            "used": settings.get("used") or {},
            "dataset_images": len(dataset.get("images") or ()) or facts.get("images") or 0,
            "checkpoints": _files_of_steps(folder, history.checkpoints),
            "saved": _files_of_steps(folder, history.saved),
            "files": _files(folder),
            "checks": [
                {
                    "name": each.get("name"),
                    "result": _RESULTS.get(str(each.get("state")), "passed"),
                    "text": each.get("sentence"),
                }
                for each in history.checks
            ],
            "warnings": [
                {"text": each.get("text"), "t": each.get("t")} for each in history.warnings[-200:]
            ],
            "error": None if error is None else {"text": error.get("text")},
            "plan": history.plan,
            "headline": _headline(folder),
            "log_tail": log_lines(folder, 50),
        }
    )


def _files_of_steps(folder: Path, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = ("step", "file", "bytes")
    last = {each["file"]: {name: each.get(name) for name in names} for each in events}
    return [each for each in last.values() if (folder / str(each["file"])).is_file()]


def _files(folder: Path) -> list[dict[str, Any]]:
    """The run's files, without hidden ones and its links to the dataset."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(
            each for each in folders if not each.startswith(".") and each not in ("dataset",)
        )
        for name in sorted(files):
            path = Path(place, name)
            if not name.startswith(".") and not path.is_symlink():
                with suppress(OSError):  # the run has removed it
                    size = path.stat().st_size
                    found.append({"path": path.relative_to(folder).as_posix(), "bytes": size})
    return found[:5000]


def _headline(folder: Path) -> list[dict[str, Any]] | None:
    try:
        found = json.loads((folder / RESULT).read_bytes()).get("headlines")
    except (OSError, ValueError, AttributeError):
        return None
    if not isinstance(found, list):
        return None
    names = {"name": "name", "value": "value", "text": "meaning", "unit": "unit", "state": "state"}
    return [{new: each.get(old) for new, old in names.items()} for each in found]


async def _series(request: Request) -> Response:
    points = _number(request, "points", POINTS, 10, 100_000)
    jobs, identity = _jobs(request), request.path_params["id"]
    folder = jobs.runs.folder(identity)
    # A history of its own, so that the event loop may read the shared one meanwhile.
    return reply(await asyncio.to_thread(lambda: History(folder).read().series(points)))


async def _log(request: Request) -> Response:
    folder = _jobs(request).runs.folder(request.path_params["id"])
    after = _number(request, "after", 0, 0, 1 << 60)
    name = LOG if (folder / LOG).is_file() else CONSOLE
    try:
        with (folder / name).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(after if after <= size else 0)
            data = file.read(LOG_BYTES)
            offset = file.tell()
    except OSError:
        return reply({"text": "", "offset": 0})
    return reply({"text": data.decode(errors="replace"), "offset": offset})


async def _file(request: Request) -> Response:
    """A file of a run, or the part of it that `Range` names."""
    folder = _jobs(request).runs.folder(request.path_params["id"])
    parts = entry_path(request.path_params["path"])
    fd, name = open_file(folder, parts), parts[-1]
    size = os.fstat(fd).st_size
    try:
        wanted = _range(request.headers.get("range"), size)
    except ValueError:
        os.close(fd)
        return Response(status_code=416, headers={"Content-Range": f"bytes */{size}"})
    headers = {"Accept-Ranges": "bytes"}
    if wanted is None:
        return send_file(fd, name, headers, "save" in request.query_params)
    first, last = wanted
    headers |= {
        "Content-Range": f"bytes {first}-{last}/{size}",
        "Content-Length": str(last - first + 1),
        "Content-Disposition": "attachment",
    }
    kind = TYPES.get(Path(name).suffix.lower(), "application/octet-stream")
    return StreamingResponse(_part(open(fd, "rb"), first, last), 206, headers, kind)


def _part(file: BinaryIO, first: int, last: int) -> Iterator[bytes]:
    with file:
        file.seek(first)
        left = last - first + 1
        while left > 0 and (chunk := file.read(min(1 << 18, left))):
            left -= len(chunk)
            yield chunk


def _range(header: str | None, size: int) -> tuple[int, int] | None:
    """First and last byte of a simple range; None: the whole file. Raises ValueError."""
    if header is None or not header.startswith("bytes=") or "," in header:
        return None
    first, dash, last = header.removeprefix("bytes=").strip().partition("-")
    if not dash:
        raise ValueError
    if not first:
        begin, end = max(0, size - int(last)), size - 1
    else:
        begin, end = int(first), min(int(last) if last else size - 1, size - 1)
    if begin > end or begin < 0:
        raise ValueError
    return begin, end


async def _report(request: Request) -> Response:
    folder = _jobs(request).runs.folder(request.path_params["id"])
    with open(open_file(folder, [REPORT]), "rb") as file:
        content = file.read()
    headers = {"Content-Security-Policy": REPORT_POLICY, "Cache-Control": "no-cache"}
    return Response(content, media_type="text/html; charset=utf-8", headers=headers)


async def _compare(request: Request) -> Response:
    jobs = _jobs(request)
    ids = [each for each in request.query_params.get("runs", "").split(",") if each]
    if not 1 <= len(ids) <= 8:
        raise Problem(400, "runs must name 1 to 8 runs", "runs")
    folders = [jobs.runs.folder(each) for each in ids]
    histories = await asyncio.to_thread(lambda: [History(each).read() for each in folders])
    used = [
        (record_of(jobs.runs.folder(each)).get("settings") or {}).get("used") or {} for each in ids
    ]
    names = sorted({name for each in used for name in each} - {"dataset", "output_dir", "name"})
    columns = {name: [each.get(name) for each in used] for name in names}
    differ = [
        {"name": name, "values": values}
        for name, values in columns.items()
        if any(value != values[0] for value in values)
    ]
    pairs: dict[tuple[str, Any], list[list[dict[str, Any]]]] = {}
    for number, history in enumerate(histories):
        for each in history.previews:
            key = str(each.get("prompt")), each.get("seed")
            files = pairs.setdefault(key, [[] for _ in ids])[number]
            files.append({"step": each["step"], "file": each["file"]})
    return reply(
        {
            "runs": [
                {"id": identity, "series": history.series(POINTS)}
                for identity, history in zip(ids, histories, strict=True)
            ],
            "differ": differ,
            "previews": [
                {"prompt": prompt, "seed": seed, "files": files}
                for (prompt, seed), files in pairs.items()
                if len(ids) == 1 or sum(map(bool, files)) > 1
            ],
        }
    )


ROUTES = [
    Route("/api/runs", _list),
    Route("/api/runs/{id}", _one),
    Route("/api/runs/{id}/series", _series),
    Route("/api/runs/{id}/log", _log),
    Route("/api/runs/{id}/report", _report),
    Route("/api/runs/{id}/files/{path:path}", _file),
    Route("/api/compare", _compare),
]
