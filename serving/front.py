"""The public HTTP server. Cog's runtime runs behind it, on 127.0.0.1.

Its routes are the runtime's, except for /shutdown. It checks every request before the runtime gets
it, downloads files, sends webhooks, and removes private details from the runtime's replies.
"""

import asyncio
import json
import secrets
from contextlib import suppress
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from inference.console import clean_for
from inference.fetch import Downloader, DownloadError
from serving.fetching import Folder, check_places, in_thread
from serving.openapi import Json
from serving.runs import Ask, Reply, Run
from serving.supervisor import Supervisor
from serving.validation import Inputs, Refused, detail, parse

MAX_BODY = 100 << 20  # bytes, as in the runtime
SMALL_BODY = 1 << 20  # bytes; accepted even when MOST_HELD is reached
MOST_HELD = 4 * MAX_BODY  # bytes of all bodies that are being received or parsed
BODY_SECONDS = 900.0  # for a client to send its body, as for a download
LOOKUP_SECONDS = 20.0  # for the names of all hosts in a request
BUSY = "At capacity: the server works on another request; send this one again later"
TOO_LARGE, TOO_SLOW, FULL = (
    Reply(status, {"error": message, "status": "failed"})
    for status, message in (
        (413, f"the body is larger than {MAX_BODY >> 20} MiB; send an https URL instead"),
        (408, f"the body did not arrive within {BODY_SECONDS:.0f} seconds; send it again"),
        (503, "too many large requests arrive at once; send this one again later"),
    )
)
ROUTES = {"predict": ("predictions", "Input"), "train": ("trainings", "TrainingInput")}


class Front:
    """The state of the server: the running request, or none."""

    def __init__(
        self, mode: str, document: Json, supervisor: Supervisor, folder: Folder, inside: str
    ) -> None:
        """`inside` is the base URL of this server for the runtime's webhooks."""
        self._route, component = ROUTES[mode]
        self._document, self._inputs = document, Inputs(document, component)
        self._supervisor, self._folder, self._inside = supervisor, folder, inside
        self.downloader = Downloader()
        self._run: Run | None = None
        self._hooks: dict[str, Run] = {}
        self._stopping = False
        self._held = 0  # bytes of bodies

    def app(self) -> Starlette:
        """The ASGI application."""
        one, many = f"/{self._route}/{{id:path}}", f"/{self._route}"
        return Starlette(
            routes=[
                Route("/", self._root),
                Route("/health-check", self._health),
                Route("/openapi.json", self._openapi),
                Route(f"{one}/cancel", self._cancel, methods=["POST"]),
                Route(many, self._post, methods=["POST"]),
                Route(one, self._put, methods=["PUT"]),
                Route("/webhook/{key}", self._hook, methods=["POST"]),
            ]
        )

    async def stop(self) -> None:
        """Cancels the running request and waits up to 8 seconds for its end."""
        self._stopping = True
        if (run := self._run) is not None:
            run.cancel()
            with suppress(TimeoutError):
                await asyncio.wait_for(run.done.wait(), 8)

    async def _root(self, request: Request) -> Response:
        route = self._route
        name = f"{route.removesuffix('s')}_id"
        return JSONResponse(
            {
                "cog_version": self._document["info"]["version"],
                "healthcheck_url": "/health-check",
                "openapi_url": "/openapi.json",
                f"{route}_url": f"/{route}",
                f"{route}_idempotent_url": f"/{route}/{{{name}}}",
                f"{route}_cancel_url": f"/{route}/{{{name}}}/cancel",
            }
        )

    async def _openapi(self, request: Request) -> Response:
        return JSONResponse(self._document)

    async def _health(self, request: Request) -> Response:
        """As the runtime's; also STARTING while the runtime is restarted."""
        health = dict(self._supervisor.health)
        if not self._supervisor.ready:
            health |= {"status": "STARTING", "reason": clean_for(self._supervisor.reason, ())}
        else:
            health["status"] = "BUSY" if self._run is not None else "READY"
        if isinstance(setup := health.get("setup"), dict):
            health["setup"] = setup | {"logs": clean_for(str(setup.get("logs", "")), ())}
        return JSONResponse(health)

    async def _hook(self, request: Request) -> Response:
        """Receives the runtime's webhooks; only the runtime knows the key."""
        run = self._hooks.get(request.path_params["key"])
        if run is None:
            return Response(status_code=404)
        content = await request.body()
        run.event(await in_thread(lambda: json.loads(content)))
        return Response(status_code=200)

    async def _cancel(self, request: Request) -> Response:
        run = self._run
        if run is None or run.ask.id != request.path_params["id"]:
            return JSONResponse({}, 404)
        run.cancel()
        return JSONResponse({})

    async def _post(self, request: Request) -> Response:
        return await self._accept(request, None)

    async def _put(self, request: Request) -> Response:
        return await self._accept(request, request.path_params["id"])

    async def _accept(self, request: Request, run_id: str | None) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            message = "Expected request with `Content-Type: application/json`"
            return PlainTextResponse(message, 415)
        if "text/event-stream" in request.headers.get("accept", ""):
            message = "This model does not support streaming responses."
            return JSONResponse({"error": message}, 406)
        try:
            ask = await self._received(request, run_id)
            if isinstance(ask, Reply):
                return self._answer(ask)
            if not self._is_running(run_id):
                await self._check_places(ask)
        except Refused as refused:
            return JSONResponse({"detail": refused.details}, 422)
        except ClientDisconnect:
            return Response(status_code=499)
        if (run := self._run) is not None and self._is_running(
            run_id
        ):  # may have started meanwhile
            return JSONResponse(run.shown(self._inputs), 202)
        if not self._supervisor.ready or self._stopping:
            return self._answer(Reply(503, {"error": self._supervisor.reason, "status": "failed"}))
        if self._run is not None:
            return JSONResponse({"error": BUSY, "status": "failed"}, 409)
        run = self._start(ask)
        if "respond-async" in request.headers.get("prefer", ""):
            return JSONResponse({"id": ask.id, "status": "starting"}, 202)
        return await self._wait(request, run)

    def _is_running(self, run_id: str | None) -> bool:
        return run_id is not None and self._run is not None and self._run.ask.id == run_id

    async def _received(self, request: Request, run_id: str | None) -> Ask | Reply:
        """The checked request, or the error reply for a body that is too large or too slow."""
        content = bytearray()
        announced = request.headers.get("content-length", "0")
        try:
            async with asyncio.timeout(BODY_SECONDS):
                if announced.isdecimal() and int(announced) > MAX_BODY:
                    return TOO_LARGE
                async for chunk in request.stream():
                    content += chunk
                    self._held += len(chunk)
                    if len(content) > MAX_BODY:
                        return TOO_LARGE
                    if self._held > MOST_HELD and len(content) > SMALL_BODY:
                        return FULL
            return await in_thread(partial(_ask, bytes(content), run_id, self._inputs))
        except TimeoutError:
            return TOO_SLOW
        finally:
            self._held -= len(content)

    async def _check_places(self, ask: Ask) -> None:
        """Raises `Refused` for URLs and paths that are not allowed in a request."""
        names, downloader = self._inputs.addresses, self.downloader

        def check() -> None:
            check_places(ask.inputs, names, downloader)
            if ask.webhook is not None:
                try:
                    downloader.check(ask.webhook)
                except DownloadError as error:
                    raise Refused(detail(["webhook"], f"webhook: {error}")) from None

        try:
            await asyncio.wait_for(in_thread(check), LOOKUP_SECONDS)
        except TimeoutError:
            message = f"no name server answered within {LOOKUP_SECONDS:.0f} seconds"
            raise Refused(detail([], message)) from None

    def _start(self, ask: Ask) -> Run:
        key = secrets.token_urlsafe(32)
        self._run = run = Run(
            ask,
            self._inputs.addresses,
            self._folder.path / secrets.token_hex(8),
            self._route,
            f"{self._inside}/webhook/{key}",
            self._supervisor,
            self.downloader,
        )
        self._hooks[key] = run

        async def free() -> None:
            await run.done.wait()
            self._run = None
            if run.webhook is not None:  # its last events are sent after the reply
                await asyncio.wait([run.webhook.task], timeout=300)
                run.webhook.task.cancel()
            del self._hooks[key]

        run.watcher = asyncio.create_task(free())
        return run

    async def _wait(self, request: Request, run: Run) -> Response:
        """The reply at the end of the run; a disconnect of the client cancels the run."""
        ended = asyncio.create_task(run.done.wait())
        gone = asyncio.create_task(_gone(request))
        await asyncio.wait([ended, gone], return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not ended.done():
            ended.cancel()
            run.cancel()
            return Response(status_code=499)
        return self._answer(run.reply)

    def _answer(self, reply: Reply) -> Response:
        headers = {"Retry-After": "10"} if reply.status == 503 else {}
        return JSONResponse(reply.body, reply.status, headers)


def _ask(content: bytes, run_id: str | None, inputs: Inputs) -> Ask:
    return Ask.of(parse(content), run_id, inputs)


async def _gone(request: Request) -> None:
    message: Any = {}
    while message.get("type") != "http.disconnect":
        message = await request.receive()
