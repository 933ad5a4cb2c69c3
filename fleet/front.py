"""The HTTP interface: checks a request, gets its files, and sends it to a replica."""

import asyncio
import json
import logging
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.exceptions import BackPressureError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from adapters.formats import config_beside
from fleet.ask import Ask, Content, Event
from fleet.contents import Contents
from fleet.replies import one, received, reply, server_sent
from fleet.rules import TRIES, replica_ended, retry_after, routing_key
from fleet.settings import FleetSettings
from inference.fetch import (
    DiskCache,
    Downloader,
    DownloadError,
    SourceError,
    Sources,
    default_cache,
    is_data,
    of_input,
)
from inference.inputs import GenerationInputs
from inference.secret import hub_token
from serving import runs, schema
from serving.fetching import check_places, fetched, in_thread
from serving.inputs import reason
from serving.openapi import Json
from serving.validation import Inputs, Refused, detail

log = logging.getLogger(__name__)

WEIGHTS = ("replicate_weights", "lora_weights", "extra_lora")
NEWEST = 0.1  # weight of the newest request in the smoothed time of one
ENDED = f"the model's process ended {TRIES} times during this request, possibly out of memory"

app = FastAPI(openapi_url=None)


@serve.ingress(app)
class Front:
    """The routes of Cog's server for predictions, with a stream of steps."""

    def __init__(self, generator: Any, settings: FleetSettings) -> None:
        self._generator, self._settings = generator, settings
        document = json.loads(schema.render())
        self._document, self._inputs = document, Inputs(document, "Input")
        cache = DiskCache(default_cache().folder, settings.disk << 30)
        self._sources, self._downloader = Sources(cache=cache), Downloader()
        self._contents = Contents(cache, settings.store)
        self._seconds = 1.0  # of a request at a replica, smoothed

    @app.get("/openapi.json")
    async def openapi(self) -> Response:
        """Cog's document of this model."""
        return JSONResponse(self._document)

    @app.get("/health-check")
    async def health(self) -> Response:
        """READY if a replica runs."""
        name = serve.get_replica_context().app_name
        found = await asyncio.to_thread(serve.status)
        states = found.applications[name].deployments["Generator"].replica_states
        running = states.get("RUNNING", 0)
        status = "READY" if running else "STARTING"
        return JSONResponse({"status": status, "replicas": running})

    @app.post("/predictions")
    async def predict(self, request: Request) -> Response:
        """Generates images. With `Accept: text/event-stream`, steps and previews first."""
        started = datetime.now(UTC)
        streamed = "text/event-stream" in request.headers.get("accept", "")
        try:
            asked = await received(request, None, self._inputs)
            if not isinstance(asked, runs.Ask):
                return asked
            if asked.webhook is not None:
                message = "webhook: a fleet sends none; read the answer, or the stream of events"
                raise Refused(detail(["webhook"], message))
            await in_thread(
                partial(check_places, asked.inputs, self._inputs.addresses, self._downloader)
            )
        except Refused as refused:
            return JSONResponse({"detail": refused.details}, 422)
        envelope = {"id": asked.id, "input": self._inputs.hidden(asked.inputs)}
        envelope["started_at"] = started.isoformat()
        try:
            ask = await self._ask(asked.inputs, streamed)
        except (DownloadError, SourceError, ValueError, OSError) as error:
            failed: Event = {"status": "failed", "error": reason(error, asked.inputs)}
            events: AsyncIterator[Event] = one(failed)
        else:
            events = self._events(ask)
        try:
            first = await anext(events)
        except BackPressureError as full:
            log.info("%s", full)
            return self._full()
        if streamed:
            parts = server_sent(first, events, envelope)
            return StreamingResponse(parts, media_type="text/event-stream")
        event = first
        while "status" not in event:
            event = await anext(events)
        return JSONResponse(reply(event, envelope))

    async def _ask(self, inputs: Json, streamed: bool) -> Ask:
        """The request with all its files. Raises errors with the reason."""
        token = hub_token(inputs.get("hf_api_token"))
        inputs = {name: each for name, each in inputs.items() if name not in self._inputs.secrets}
        inputs.setdefault("seed", secrets.randbelow(2**31))  # so that a retry makes the same images
        GenerationInputs(**inputs)
        folder = Path(await asyncio.to_thread(partial(tempfile.mkdtemp, prefix="zeroprior-")))
        try:
            local = await fetched(inputs, self._inputs.addresses, folder, self._downloader)
            files = {}
            for name in self._inputs.addresses & inputs.keys():
                del inputs[name]
                given = local[name] if isinstance(local[name], list) else [local[name]]
                files[name] = [
                    (Path(each).suffix, await asyncio.to_thread(Path(each).read_bytes))
                    for each in given
                ]
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, True)
        weights = {}
        for name in WEIGHTS:
            if source := inputs.get(name):
                with of_input(name):
                    found = await in_thread(partial(self._content, source, token))
                if is_data(source):  # the replica needs the content only
                    source = inputs[name] = f"data:;sha256,{found.sha256}"
                weights[source] = found
        return Ask(inputs, weights, files, streamed)

    def _content(self, source: str, token: str | None) -> Content:
        file = self._sources.file(source, token, any_file=False)
        config = self._sources.config(source, token) or config_beside(file)
        add = self._contents.add
        return Content(add(file), file.name, add(config) if config else None)

    async def _events(self, ask: Ask) -> AsyncIterator[Event]:
        """The events of a replica; of another one, if it has ended."""
        key = routing_key(each.sha256 for each in ask.weights.values())
        handle = self._generator.options(stream=True, multiplexed_model_id=key)
        for _ in range(TRIES):
            stream = handle.generate.remote(ask)
            try:
                async for event in stream:
                    if seconds := event.get("metrics", {}).get("seconds_per_image"):
                        taken = seconds * len(event["files"])
                        self._seconds += (taken - self._seconds) * NEWEST
                    yield event
                return
            except Exception as error:
                if not replica_ended(error):
                    raise
                log.warning("a replica has ended; its request goes to another one")
            finally:
                stream.cancel()
        yield {"status": "failed", "error": ENDED}

    def _full(self) -> Response:
        seconds = retry_after(self._settings.queued, self._settings.replicas, self._seconds)
        message = f"At capacity: all replicas are busy; send this again in {seconds} seconds"
        body = {"error": message, "status": "failed"}
        return JSONResponse(body, 429, {"Retry-After": str(seconds)})
