"""Answers of the server: JSON, and errors as JSON."""

import errno
import json
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO
from urllib.parse import quote

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

log = logging.getLogger(__name__)

MAX_JSON_BYTES = 1 << 20
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Only these types are sent; never HTML or SVG, which could contain scripts.
TYPES = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp"), "image/jpeg"),
    ".png": "image/png",
    ".webp": "image/webp",
    ".avif": "image/avif",
    ".gif": "image/gif",
    ".bmp": "image/bmp",
    ".zip": "application/zip",
    ".safetensors": "application/octet-stream",
    **dict.fromkeys((".txt", ".yaml", ".log"), "text/plain; charset=utf-8"),
    **dict.fromkeys((".json", ".jsonl"), "application/json"),
}


class Problem(Exception):
    """A request that is refused, with the words for the user."""

    def __init__(
        self,
        status: int,
        error: str,
        field: str | None = None,
        what_to_do: str | None = None,
        **facts: Any,
    ) -> None:
        super().__init__(error)
        named = {"error": error, "field": field, "what_to_do": what_to_do, **facts}
        self.status, self.content = status, {k: v for k, v in named.items() if v is not None}


def reply(content: Any, status: int = 200) -> Response:
    """A JSON answer that no cache keeps."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Response(
        text.encode(errors="backslashreplace"),
        status,
        {"Cache-Control": "no-store"},
        media_type="application/json",
    )


async def refused(request: Request, problem: Exception) -> Response:
    """The answer to a request that raised `Problem`."""
    assert isinstance(problem, Problem)
    return reply(problem.content, problem.status)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return reply({"error": str(error.detail)}, error.status_code)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _disk(request: Request, error: Exception) -> Response:
    assert isinstance(error, OSError)
    if error.errno in FULL:
        return reply({"error": "the disk is full", "what_to_do": "free disk space"}, 507)
    log.error("%s %s", request.method, request.url.path, exc_info=error)
    return reply({"error": f"the disk reports an error ({error.strerror})"}, 500)


async def _failed(request: Request, error: Exception) -> Response:
    return reply({"error": "an error in the server; its console shows the details"}, 500)


HANDLERS: Mapping[Any, Any] = {
    Problem: refused,
    HTTPException: _no_route,
    ClientDisconnect: _gone,
    OSError: _disk,
    Exception: _failed,
}


async def read_body(request: Request, most: int) -> bytes:
    """The body of at most `most` bytes. Raises `Problem` (413)."""
    too_large = Problem(413, f"the body is larger than {most:,} bytes")
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or int(announced) > most:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise too_large
    return bytes(body)


async def read_json(request: Request, most: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The body, a JSON object. Raises `Problem` (400, 413)."""
    try:
        value = json.loads(await read_body(request, most), parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise Problem(400, "the body is not JSON") from None
    if not isinstance(value, dict):
        raise Problem(400, "the body is not a JSON object")
    return value


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def is_shown(name: str) -> bool:
    """Whether browsers show images with this suffix."""
    return TYPES.get(os.path.splitext(name)[1].lower(), "").startswith("image/")


def send_file(fd: int, name: str, headers: Mapping[str, str] = {}, save: bool = False) -> Response:
    """A file that is open for reading, with a type from our table; closes `fd`.

    `save` makes the browser save it instead of showing it.
    """
    suffix = os.path.splitext(name)[1].lower()
    kind = TYPES.get(suffix, "application/octet-stream")
    shown = "inline" if kind.startswith("image/") and not save else "attachment"
    facts = {
        "Content-Length": str(os.fstat(fd).st_size),
        "Content-Disposition": f"{shown}; filename*=UTF-8''{quote(name, safe='')}",
        "Cache-Control": "no-cache",
    }
    return StreamingResponse(_chunks(open(fd, "rb")), headers={**facts, **headers}, media_type=kind)


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    # A file and not a descriptor: it is also closed if the generator is never started, since the
    # browser has gone away.
    with file:
        while chunk := file.read(1 << 18):
            yield chunk
