"""The ASGI application: the page, the routes of all parts, and their work in the background."""

import asyncio
import logging
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from starlette.applications import Starlette
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from studio import (
    captioner,
    captions,
    commands,
    datasets,
    drafts,
    images,
    input_images,
    planner,
    runs,
    schema,
    stream,
    thumbnails,
    uploads,
    weights,
)
from studio.dataset_files import sweep
from studio.folder import Studio, empty_trash, restore
from studio.guard import LOCAL, Guard
from studio.replies import HANDLERS, reply

log = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
# Each has ROUTES, and may have `async def work(studio)`, which runs until it is cancelled.
DATA = (datasets, uploads, captions, thumbnails, weights, drafts, input_images)
JOBS = (runs, commands, stream, schema, planner, images, captioner)
PARTS: tuple[ModuleType, ...] = DATA + JOBS


def application(
    studio: Studio, hosts: Collection[str] = LOCAL, token: str | None = None
) -> ASGIApp:
    """The guarded application. `hosts`, `token`: see `Guard`."""
    own = (studio.datasets, studio.outputs, studio.weights, studio.input_images, studio.trash)
    for folder in own:
        folder.mkdir(parents=True, exist_ok=True)
    routes = [route for part in PARTS for route in part.ROUTES]
    routes.append(Route("/api/trash/{id}/restore", _restore, methods=["POST"]))
    if PAGE.is_dir():
        routes.append(Mount("/", GZipMiddleware(_Page(directory=PAGE, html=True), compresslevel=6)))
    app = Starlette(routes=routes, exception_handlers=HANDLERS, lifespan=_lifespan)
    app.state.studio = studio
    return Guard(app, hosts, token)


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    studio: Studio = app.state.studio
    await asyncio.to_thread(empty_trash, studio)
    await asyncio.to_thread(sweep, studio)
    work = [asyncio.create_task(_kept(part, studio)) for part in PARTS if hasattr(part, "work")]
    try:
        yield
    finally:
        studio.tasks.stop()
        for each in work:
            each.cancel()
        await asyncio.gather(*work, return_exceptions=True)


async def _kept(part: ModuleType, studio: Studio) -> None:
    """Runs a part's work, and starts it again after an error."""
    while True:
        try:
            await part.work(studio)
            return
        except Exception:
            log.exception("%s failed; it is started again", part.__name__)
            await asyncio.sleep(1)


def _restore(request: Request) -> Response:
    restore(request.app.state.studio, request.path_params["id"])
    return reply({})


class _Page(StaticFiles):
    """The page's files; a browser asks each time whether they have changed."""

    def file_response(self, *arguments: Any, **named: Any) -> Response:
        response = super().file_response(*arguments, **named)
        response.headers["Cache-Control"] = "no-cache"
        return response
