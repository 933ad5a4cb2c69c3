"""Drafts of the page's forms, so that they survive a reload, an error and another browser."""

import json

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from adapters.files.atomic import atomic_file
from studio.folder import Studio, checked_name
from studio.replies import Problem, read_body, reply

MAX_BYTES = 64 << 10


def _get(request: Request) -> Response:
    studio: Studio = request.app.state.studio
    path = studio.folder / "drafts" / f"{checked_name(request.path_params['name'])}.json"
    try:
        return reply(json.loads(path.read_bytes()))
    except (OSError, ValueError):
        return reply({})


async def _put(request: Request) -> Response:
    studio: Studio = request.app.state.studio
    path = studio.folder / "drafts" / f"{checked_name(request.path_params['name'])}.json"
    body = await read_body(request, MAX_BYTES)
    try:
        json.loads(body)
    except (ValueError, RecursionError):
        raise Problem(400, "the body is not JSON") from None
    with atomic_file(path) as file:
        file.write(body)
    return reply({})


ROUTES = [
    Route("/api/drafts/{name}", _get),
    Route("/api/drafts/{name}", _put, methods=["PUT"]),
]
