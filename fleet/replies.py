"""Requests and replies of the fleet's HTTP interface."""

import asyncio
import base64
import json
import logging
import mimetypes
from collections.abc import AsyncIterator
from datetime import UTC, datetime

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from fleet.ask import Event
from serving import runs
from serving.fetching import in_thread
from serving.front import BODY_SECONDS, MAX_BODY, TOO_LARGE, TOO_SLOW
from serving.inputs import reason
from serving.openapi import Json
from serving.runs import Reply
from serving.validation import Inputs, parse

log = logging.getLogger(__name__)


async def received(request: Request, run_id: str | None, inputs: Inputs) -> runs.Ask | Response:
    """The checked request, or the reply to one that is too large or too slow. Raises `Refused`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        return PlainTextResponse("Expected request with `Content-Type: application/json`", 415)
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                content += chunk
                if len(content) > MAX_BODY:
                    return _answer(TOO_LARGE)
    except TimeoutError:
        return _answer(TOO_SLOW)
    body = await in_thread(lambda: parse(bytes(content)))
    return await in_thread(lambda: runs.Ask.of(body, run_id, inputs))


def _answer(found: Reply) -> Response:
    return JSONResponse(found.body, found.status)


async def one(event: Event) -> AsyncIterator[Event]:
    """The events of a request that is answered at once."""
    yield event


def reply(last: Event, envelope: Json) -> Json:
    """Cog's reply to a prediction."""
    found = dict(envelope) | {"completed_at": datetime.now(UTC).isoformat()}
    found |= {key: last[key] for key in ("status", "error", "logs", "metrics") if key in last}
    if "files" in last:
        found["output"] = [_data_url(name, content) for name, content in last["files"]]
    return found


def _data_url(name: str, content: bytes) -> str:
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


async def server_sent(
    first: Event, events: AsyncIterator[Event], envelope: Json
) -> AsyncIterator[bytes]:
    """Server-sent events `step` and `preview`, and at the end `done` with Cog's reply."""
    event = first
    try:
        while "status" not in event:
            facts: Json = {key: event[key] for key in ("image", "done", "of") if key in event}
            if "preview" in event:
                facts["preview"] = _data_url("preview.jpg", event["preview"])
            if facts:
                yield _sent("preview" if "preview" in event else "step", facts)
            event = await anext(events)
        yield _sent("done", reply(event, envelope))
    except Exception as error:
        log.exception("the stream of a request failed")
        failed: Event = {"status": "failed", "error": reason(error, {})}
        yield _sent("done", reply(failed, envelope))


def _sent(kind: str, facts: Json) -> bytes:
    return f"event: {kind}\ndata: {json.dumps(facts, separators=(',', ':'))}\n\n".encode()
