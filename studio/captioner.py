"""Writes captions with a model that sees images, one dataset after another, in another process.

The process asks the model (`trainer.captions`), and this server saves each caption as it comes, if
the caption file is still as it was at the beginning. `.captions.jsonl` in the dataset has every
answer, so a job that was ended is continued by the next one. undo.jsonl has what was there before.
"""

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from adapters.files.containers import printable
from families.base import Base
from families.captioners import CAPTIONERS, Captioner, captioner_of
from families.registry import UnknownBase, find_base
from inference.input_fields import parts_of
from studio import gpu
from studio.dataset_files import (
    append,
    caption_content,
    caption_file,
    caption_version,
    find,
    images_of,
    place_of,
    write_file,
)
from studio.folder import Studio
from studio.jobs import Jobs, jobs_of
from studio.replies import FULL, Problem, read_json, reply
from studio.summaries import LIVE
from studio.worker import Worker, WorkerEnded
from trainer.encodings import decode

log = logging.getLogger(__name__)

LOOK = 0.2  # seconds between two looks at the GPU's owner
SHOWN = 3600.0  # seconds for which an ended job is a task of the status
MOST_LETTERS = 1000  # of the words to avoid


@dataclass
class Job:
    """The captions of one dataset."""

    root: Path
    request: dict[str, Any]  # to the process
    model: str  # its name
    id: str = field(default_factory=lambda: secrets.token_hex(8))  # in undo.jsonl, too
    state: str = "waiting"
    waits_for: str | None = None  # who has the GPU
    done: int = 0  # answers
    of: int = 0
    written: int = 0
    edited: int = 0  # not written, because they were changed meanwhile
    result: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    ended: float | None = None
    versions: dict[str, str] = field(default_factory=dict)  # of caption files, at the beginning
    work: asyncio.Task[None] | None = None

    def end(self, state: str, error: str | None = None) -> None:
        """Notes how the job has ended."""
        self.state, self.error, self.ended, self.waits_for = state, error, time.time(), None

    def shown(self) -> dict[str, Any]:
        """The job as a task of the status."""
        names = ("id", "state", "model", "waits_for", "done", "of", "written", "edited", "error")
        found = {name: getattr(self, name) for name in names}
        return {"kind": "captions", "name": self.root.name, **found, **self.result}


class CaptionWriter:
    """The jobs, the newest of each dataset, and the process."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs, self._studio = jobs, jobs.studio
        self.worker = Worker("studio.captioner_process", jobs.studio.folder)
        self._known: dict[str, Job] = {}  # by dataset
        self._turn = asyncio.Lock()

    def start(self, job: Job) -> None:
        """Starts a job, after those that wait. Raises `Problem` 409."""
        self.check_idle(job.root.name)
        self._known[job.root.name] = job
        job.work = asyncio.get_running_loop().create_task(self._do(job))

    def running(self, name: str) -> Job | None:
        """The job of a dataset that has not ended."""
        job = self._known.get(name)
        return job if job is not None and job.ended is None else None

    def check_idle(self, name: str) -> None:
        """Raises `Problem` 409 while captions of the dataset are written."""
        if self.running(name) is not None:
            raise Problem(409, f"captions of {name} are being written", None, "cancel it, or wait")

    def cancel(self, name: str) -> None:
        """Ends the job of a dataset; what is written stays."""
        job = self.running(name)
        if job is not None and job.work is not None:
            job.work.cancel()

    def forget(self, identity: object) -> None:
        """Forgets an ended job, whose captions were undone."""
        for name in [n for n, each in self._known.items() if each.id == identity and each.ended]:
            del self._known[name]

    def tasks(self) -> list[dict[str, Any]]:
        """The jobs as tasks of the status."""
        now = time.time()
        return [j.shown() for j in self._known.values() if j.ended is None or now - j.ended < SHOWN]

    async def stop(self) -> None:
        """Ends all jobs and the process."""
        work = [each.work for each in self._known.values() if each.work is not None]
        for each in work:
            each.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        await self.worker.stop()

    async def _do(self, job: Job) -> None:
        try:
            async with self._turn:
                try:
                    await self._free_gpu(job)
                    job.state = "running"
                    job.versions = await asyncio.to_thread(_versions, job.root)
                    with gpu.reserved():  # until the process has its lock
                        answer = await self.worker.ask(
                            job.request, lambda line: self._take(job, line)
                        )
                finally:
                    await self.worker.stop()  # which frees the GPU
            job.result = {name: each for name, each in answer.items() if name != "error"}
            job.end("failed" if "error" in answer else "done", answer.get("error"))
        except asyncio.CancelledError:
            job.end("canceled")
        except (WorkerEnded, Problem, OSError) as error:
            job.end("failed", str(error))
        except Exception as error:
            log.exception("captions of %s", job.root.name)
            job.end("failed", str(error) or type(error).__name__)

    async def _free_gpu(self, job: Job) -> None:
        """Waits until nobody uses the GPU; an idle generator gives it back."""
        while (found := gpu.gpu()) is not None:
            owner, generator = found["owner"] or {}, self._jobs.generator
            live = (each["id"] for each in self._jobs.runs.all() if each["state"] in LIVE)
            user = owner.get("id") or (owner and "another program") or next(live, None)
            if user is None:
                break
            if owner.get("kind") != "generator" or generator is None or not generator.release():
                job.waits_for = str(user)
            await asyncio.sleep(LOOK)
        job.waits_for = None

    async def _take(self, job: Job, line: Mapping[str, Any]) -> None:
        if "of" in line:
            job.done, job.of = line["done"], line["of"]
        else:
            await asyncio.to_thread(self._save, job, line["image"], line["caption"])

    def _save(self, job: Job, printed: str, caption: str) -> None:
        """Saves the caption of an image, unless it was removed or its caption was edited."""
        with self._studio.writing:
            files = find(job.root)
            images = images_of(job.root, files)
            image = next((each for each in images if printable(each) == printed), None)
            if image is None:
                return
            file = caption_file(image, files)
            content, text = caption_content(job.root, file), f"{caption}\n"
            if caption_version(content) != job.versions.get(file, caption_version(None)):
                job.edited += 1
                return
            before = None if content is None else decode(content)[0]
            change = {"file": file, "image": image, "before": before, "after": text}
            try:  # first what undoes it, so that a killed server leaves nothing without
                append(job.root, "undo.jsonl", {"id": job.id, "changes": [change]}, sync=True)
                write_file(job.root, file, text.encode())
            except OSError as error:
                full = error.errno in FULL
                text = "the disk is full" if full else f"the disk reports an error ({error})"
                raise Problem(507, text) from None
            job.written += 1


def _versions(root: Path) -> dict[str, str]:
    """The versions of all caption files."""
    files = find(root)
    names = {caption_file(image, files) for image in images_of(root, files)}
    return {name: caption_version(caption_content(root, name)) for name in names if name in files}


def caption_writer_of(studio: Studio) -> CaptionWriter:
    """The studio's writer of captions."""
    jobs = jobs_of(studio)
    if jobs.captions is None:
        jobs.captions = CaptionWriter(jobs)
    return jobs.captions


# ---- Routes --------------------------------------------------------------------------------------


def _base(name: object) -> Base:
    try:
        return gpu.automatic_base() if name in (None, "", "auto") else find_base(str(name))
    except UnknownBase as error:
        raise Problem(422, str(error), "base") from None


def _models(base: Base) -> list[Captioner]:
    """The models that can write captions, the base's own choice first."""
    own = captioner_of(base, gpu.gpu() is not None)
    return [own, *(each for each in CAPTIONERS.values() if each is not own)]


def _list(request: Request) -> Response:
    """GET /api/captioners: the models for a base, and whether they are on this machine."""
    base = _base(request.query_params.get("base"))
    rows = [
        {
            "name": each.name,
            "download": base.name if each.base is not None else each.name,
            "gigabytes": each.download,
            "here": each.is_on_disk(),
        }
        for each in _models(base)
    ]
    return reply({"base": base.name, "models": rows, "vault": os.environ.get("MODEL_VAULT")})


async def _start(request: Request) -> Response:
    """POST /api/datasets/D/caption."""
    studio, body = request.app.state.studio, await read_json(request)
    root, base = place_of(studio, request.path_params["dataset"]), _base(body.get("base"))
    texts = {name: body.get(name) or "" for name in ("kind", "avoid")}
    for name, text in texts.items():
        if not isinstance(text, str) or len(text) > MOST_LETTERS:
            raise Problem(422, f"{name} must be a text of at most {MOST_LETTERS} characters", name)
    named, models = body.get("model"), {each.name: each for each in _models(base)}
    model = models.get(str(named)) if named else next(iter(models.values()))
    if model is None:
        raise Problem(422, f"{named} cannot write captions; use {', '.join(models)}", "model")
    if not model.is_on_disk():
        raise Problem(422, f"{model.name} is not on this machine; download it first", "model")
    style = body.get("style") is True
    if style and texts["kind"]:
        raise Problem(422, "kind names a subject; remove it, or style", "kind")
    asked = {
        "folder": str(root),
        "base": base.name,
        "model": None if model.base is not None else model.name,
        "style": style,
        "kind": texts["kind"].strip(),
        "avoid": parts_of(texts["avoid"], ","),
        "all": body.get("all") is True,
    }
    job = Job(root, asked, model.name)
    caption_writer_of(studio).start(job)
    return reply({"task": job.id}, 202)


async def _cancel(request: Request) -> Response:
    """POST /api/datasets/D/caption/cancel."""
    studio = request.app.state.studio
    caption_writer_of(studio).cancel(place_of(studio, request.path_params["dataset"]).name)
    return reply({}, 202)


async def work(studio: Studio) -> None:
    """Ends the jobs with the server. Runs until it is cancelled."""
    try:
        await asyncio.Event().wait()
    finally:
        await caption_writer_of(studio).stop()


ROUTES = [
    Route("/api/captioners", _list),
    Route("/api/datasets/{dataset}/caption", _start, methods=["POST"]),
    Route("/api/datasets/{dataset}/caption/cancel", _cancel, methods=["POST"]),
]
