"""The HTTP interface of trainings, and the queue: each run is a Ray job with a GPU of its own.

All state is in the storage (`fleet.run_storage`) and in Ray. This process starts what should run
and does not: new runs, and runs whose machine has ended. It may be replaced at any time.
"""

import asyncio
import json
import logging
import shlex
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.job_submission import JobSubmissionClient
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from fleet.replies import received
from fleet.run_state import Found, Progress, found
from fleet.run_storage import IDENTITY, Job, RunStorage
from fleet.settings import FleetSettings
from fleet.training_job import FILES
from inference.fetch import Downloader, DownloadError, SourceError
from serving import schema
from serving.fetching import check_places, fetched, in_thread
from serving.inputs import reason
from serving.runs import Ask
from serving.validation import Inputs, Refused, detail
from trainer.inbox import Command
from trainer.settings import TrainingInputs, resolve, too_much

log = logging.getLogger(__name__)

ROOT = Path(__file__).parent.parent  # of the program
LOOK = 2.0  # seconds between two looks at all runs
STREAM = 0.5  # seconds between two looks at one run's events
SILENCE = 15.0  # seconds until a comment in a stream
SHOWN = 200  # runs in a list
CHUNK = 1 << 18


def _submission(job: Job) -> str:
    return f"{job.id}-{job.attempt}"


def _chunks(files: Any, path: str) -> Iterator[bytes]:
    with files.open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


class _WithSlash:
    """Makes /trainings the same as /trainings/, without a redirect, which would need a new body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == scope.get("root_path"):
            scope = {**scope, "path": f"{scope['path']}/"}
        await self._app(scope, receive, send)


# Ray copies the routes when the class below is decorated, so what they use stands before it.
app = FastAPI(openapi_url=None)
app.add_middleware(_WithSlash)


@serve.ingress(app)
class Trainings:
    """Routes below /trainings, and the work in the background."""

    def __init__(self, settings: FleetSettings) -> None:
        assert settings.runs is not None and settings.jobs is not None
        self._settings, self._storage = settings, RunStorage(settings.runs)
        self._jobs = JobSubmissionClient(settings.jobs)
        self._inputs = Inputs(json.loads(schema.render()), "TrainingInput")
        self._downloader = Downloader()
        self._over: set[str] = set()  # runs that need nothing more
        self._progress: dict[str, Progress] = {}
        self._lock = threading.Lock()
        self._work = asyncio.get_running_loop().create_task(self._keep())

    @app.post("/")
    async def create(self, request: Request) -> Response:
        """Queues a run."""
        return await self._create(request, None)

    @app.put("/{identity}")
    async def put(self, request: Request, identity: str) -> Response:
        """Queues a run with this id; a run that exists is only shown."""
        run = await asyncio.to_thread(self._found, identity)
        return JSONResponse(run.shown(), 202) if run else await self._create(request, identity)

    @app.get("/")
    async def all(self) -> Response:
        """All runs, the newest first."""
        ids = await asyncio.to_thread(self._storage.ids)
        shown = [await asyncio.to_thread(self._found, each) for each in reversed(ids[-SHOWN:])]
        return JSONResponse({"trainings": [each.shown() for each in shown if each]})

    @app.get("/{identity}")
    async def one(self, identity: str) -> Response:
        """The state of a run."""
        run = await asyncio.to_thread(self._found, identity)
        return JSONResponse(run.shown() if run else {}, 200 if run else 404)

    @app.post("/{identity}/cancel")
    async def cancel(self, identity: str) -> Response:
        """Stops a run with a checkpoint; one that waits is not started."""
        run = await asyncio.to_thread(self._found, identity)
        if run is None:
            return JSONResponse({}, 404)
        if not run.over:
            await asyncio.to_thread(self._cancel, run)
        return JSONResponse({})

    @app.get("/{identity}/events")
    async def events(self, request: Request, identity: str) -> Response:
        """The run's events as server-sent events, as the studio sends them."""
        given = request.headers.get("last-event-id") or request.query_params.get("after") or "0"
        if not (given.isascii() and given.isdecimal() and len(given) < 16):
            return JSONResponse({"error": "after must be a byte offset"}, 400)
        if await asyncio.to_thread(self._storage.job, identity) is None:
            return JSONResponse({}, 404)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        parts = self._stream(identity, int(given))
        return StreamingResponse(parts, headers=headers, media_type="text/event-stream")

    @app.get("/{identity}/files/{name:path}")
    async def file(self, identity: str, name: str) -> Response:
        """A file of the run, such as weights.zip."""
        parts = name.split("/")
        hidden = any(not part or part.startswith(".") for part in parts)
        if hidden or await asyncio.to_thread(self._storage.job, identity) is None:
            return JSONResponse({}, 404)
        path = self._storage.place(identity, f"run/{name}")
        if not await asyncio.to_thread(self._storage.files.isfile, path):
            return JSONResponse({}, 404)
        headers = {"Content-Disposition": f'attachment; filename="{ascii(parts[-1])[1:-1]}"'}
        chunks = _chunks(self._storage.files, path)
        return StreamingResponse(chunks, headers=headers, media_type="application/octet-stream")

    async def _create(self, request: Request, identity: str | None) -> Response:
        try:
            asked = await received(request, identity, self._inputs)
            if not isinstance(asked, Ask):
                return asked
            name = asked.id.replace("pred_", "run_")
            if not IDENTITY.fullmatch(name):
                raise Refused(detail(["id"], "must have 1 to 100 letters, digits, _ and -"))
            for secret in self._inputs.secrets & asked.inputs.keys():
                message = f"{secret}: a fleet takes no keys, since runs wait in a queue"
                raise Refused(detail(["input", secret], message))
            names = self._inputs.addresses
            await in_thread(partial(check_places, asked.inputs, names, self._downloader))
            job = await self._store(Job(name, asked.inputs, time.time()))
        except Refused as refused:
            return JSONResponse({"detail": refused.details}, 422)
        return JSONResponse(Found(job, "PENDING", Progress()).shown(), 202)

    async def _store(self, job: Job) -> Job:
        """Checks the settings, and stores the request with its files. Raises `Refused`.

        Returns the request as stored: files are names.
        """
        folder = Path(await asyncio.to_thread(partial(tempfile.mkdtemp, prefix="zeroprior-")))
        try:
            inputs = await fetched(job.inputs, frozenset(FILES), folder, self._downloader)
            if inputs.get("base_model", "auto") == "auto":
                inputs["base_model"] = self._settings.base_model
            if costs := too_much(resolve(TrainingInputs(**inputs))):
                raise ValueError("; ".join(costs))
            for name in FILES:
                if name in inputs:
                    path = Path(inputs[name])
                    inputs[name] = f"{name}{path.suffix}"
                    stored = partial(self._storage.put, job.id, f"inputs/{inputs[name]}", path)
                    await asyncio.to_thread(stored)
            stored_job = replace(job, inputs=inputs)
            await asyncio.to_thread(self._storage.write_job, stored_job)
            return stored_job
        except (DownloadError, SourceError, ValueError) as error:
            raise Refused(detail(["input"], reason(error, job.inputs))) from error
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, True)

    async def _stream(self, identity: str, offset: int) -> AsyncIterator[bytes]:
        yield b"retry: 500\n\n"
        sent = time.monotonic()
        while True:
            lines = await asyncio.to_thread(self._storage.events_after, identity, offset)
            for offset, line in lines:  # noqa: B020
                yield b"event: run\nid: %d\ndata: %s\n\n" % (offset, line)
            if lines:
                sent = time.monotonic()
                continue
            if time.monotonic() - sent > SILENCE:
                sent = time.monotonic()
                yield b": still here\n\n"
            await asyncio.sleep(STREAM)

    # ---- The queue -------------------------------------------------------------------------------

    async def _keep(self) -> None:
        """Starts what should run, all the time."""
        while True:
            try:
                await asyncio.to_thread(self._look)
            except Exception:
                log.exception("the queue: tried again")
            await asyncio.sleep(LOOK)

    def _look(self) -> None:
        for identity in self._storage.ids():
            if identity in self._over:
                continue
            run = self._found(identity)
            if run is not None and run.over:
                self._over.add(identity)
            elif run is not None and run.must_start:
                self._start(run.job)

    def _start(self, job: Job) -> None:
        """Submits the next attempt; it waits in Ray for a free GPU."""
        job = replace(job, attempt=job.attempt + 1)
        self._storage.write_job(job)
        words = [sys.executable, "-m", "fleet.training_job", str(self._settings.runs), job.id]
        gpu = self._settings.gpus > 0
        self._jobs.submit_job(
            entrypoint=shlex.join([*words, str(job.attempt)]),
            submission_id=_submission(job),
            runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}},
            entrypoint_num_cpus=0,
            entrypoint_num_gpus=1 if gpu else 0,
            entrypoint_resources=None if gpu else {"training": 1},
        )

    def _cancel(self, run: Found) -> None:
        self._storage.write(run.job.id, "cancelled", b"")
        if run.ray == "PENDING":
            self._jobs.stop_job(_submission(run.job))
        elif run.ray:
            self._storage.send(run.job.id, Command("stop"))

    def _found(self, identity: str) -> Found | None:
        job = self._storage.job(identity)
        if job is None:
            return None
        progress = self._progress.setdefault(identity, Progress())
        with self._lock:  # requests and the queue read events
            return found(job, self._storage, self._ray(job), progress)

    def _ray(self, job: Job) -> str:
        """Ray's status of the newest attempt; empty if Ray does not know it."""
        if not job.attempt:
            return ""
        try:
            return str(self._jobs.get_job_status(_submission(job)).value)
        except RuntimeError:  # after a restart of the cluster
            return ""


def deployment(settings: FleetSettings) -> Any:
    """The Serve application of trainings, for the route /trainings."""
    one = serve.deployment(
        Trainings, name="Trainings", num_replicas=1, ray_actor_options={"num_cpus": 0}
    )
    return one.bind(settings)
