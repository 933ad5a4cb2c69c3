"""Generated images: new jobs, the gallery, and the GPU that the generator holds.

outputs/images/2026-11-26/001/    one job
  job.json                        the request, and all images with their settings
  0001.png  0001.json             an image; its settings are in the file and beside it
"""

import json
import os
import re
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from studio import gpu
from studio.folder import Studio, open_file, to_trash
from studio.generator import ENDED, JOB, Generator, Job, generator_of
from studio.image_plans import planned
from studio.jobs import jobs_of
from studio.replies import Problem, read_json, reply, send_file

WHEN = ("now", "wait", "pause", "by_run")
_ID = re.compile(r"(\d{4}-\d{2}-\d{2})-(\d{3,6})", re.ASCII)


async def _new(request: Request) -> Response:
    """POST /api/images."""
    studio, body = request.app.state.studio, await read_json(request)
    generator, when = generator_of(studio), body.get("when") or "now"
    if when not in WHEN:
        raise Problem(400, f"when must be one of {', '.join(WHEN)}", "when")
    images, axes = await run_in_threadpool(planned, studio, body)
    run = _run_for(studio, body) if when == "by_run" else None
    if run is not None and any(each["name"] != "seed" for each in axes):
        text = "a run generates with its own weights and options; only the seed can be an axis"
        raise Problem(422, text, "axes", "remove the axis, or generate without the run")
    if when == "now" and (busy := _owner()):
        text = f"the GPU is in use by {busy}"
        raise Problem(409, text, "when", "wait, pause that run, or let it generate the images")
    folder = _new_folder(studio)
    plan = {
        "created": round(time.time(), 3),
        "prompt": body["prompt"],
        "when": when,
        "run": run,
        "request": {name: body[name] for name in body if name not in ("when", "key")},
        "axes": axes,
        "images": images,
    }
    job = Job(folder, plan)
    generator.add(job)
    seconds = _seconds(generator)
    each = None if seconds is None else round(seconds * len(images), 1)
    return reply({"id": job.id, "images": len(images), "seconds": each}, 202)


def _owner() -> str | None:
    """What has the GPU, if that is not the generator."""
    found = gpu.gpu()
    owner = found["owner"] if found else None
    if owner is None or owner["kind"] == "generator":
        return None
    return str(owner["id"] or "another program")


def _run_for(studio: Studio, body: Mapping[str, Any]) -> str:
    """The run that generates: the one that is named, or the one that trains."""
    runs = jobs_of(studio).runs
    named = body.get("run")
    found = [runs.summary(str(named))] if named else runs.all()
    for summary in found:
        if "preview" in summary["allowed"]:
            return str(summary["id"])
    raise Problem(409, "no run is training now", "when", "generate without a run")


def _new_folder(studio: Studio) -> Path:
    day = studio.images / time.strftime("%Y-%m-%d")
    day.mkdir(parents=True, exist_ok=True)
    numbers = [int(each.name) for each in day.iterdir() if each.name.isdecimal()]
    number = max(numbers, default=0)
    while True:
        number += 1
        try:
            folder = day / f"{number:03d}"
            folder.mkdir()
            return folder
        except FileExistsError:
            continue


def _seconds(generator: Generator) -> float | None:
    """The mean time of the last images."""
    made = [i for job in list(generator.known.values())[-5:] for i in job.made.values()]
    times = [each["seconds"] for each in made if "seconds" in each]
    return statistics.median(times[-8:]) if times else None


# ---- The gallery ---------------------------------------------------------------------------------


def _folder(studio: Studio, identity: str) -> Path:
    match = _ID.fullmatch(identity)
    folder = studio.images / match[1] / match[2] if match else None
    if folder is None or not (folder / JOB).is_file():
        raise Problem(404, f"there are no images {identity[:60]}")
    return folder


def shown(studio: Studio, folder: Path) -> dict[str, Any]:
    """A job as the page shows it; a job that nobody does any more has failed."""
    identity = f"{folder.parent.name}-{folder.name}"
    plan = json.loads((folder / JOB).read_bytes())
    job = generator_of(studio).known.get(identity)
    state, error = plan.get("state"), plan.get("error")
    if job is not None:
        state, error = job.state, job.error
    elif state not in ENDED:
        state, error = "failed", "the studio was ended before all images were made"
    images = [
        {
            "number": each["number"],
            # Numbers are used again after a deletion, but browsers keep an image for a year.
            "file": f"/api/images/{identity}/{each['number']}.png?v={plan['created']}",
            "seed": each["seed"],
            "settings": each["settings"],
            "row": each["row"],
            "column": each["column"],
        }
        for each in plan["images"]
        if (folder / f"{each['number']:04d}.png").is_file()
    ]
    return {
        "id": identity,
        "state": state,
        "created": plan["created"],
        "prompt": plan["prompt"],
        "when": plan["when"],
        "run": plan.get("run"),
        "settings": plan["request"],
        "images": images,
        "axes": plan["axes"],
        "done": len(images),
        "of": len(plan["images"]),
        "error": error,
    }


def _all(studio: Studio) -> list[Path]:
    """The folders of all jobs, the newest first."""
    days = sorted(studio.images.iterdir(), reverse=True) if studio.images.is_dir() else []
    found = []
    for day in days:
        if day.is_dir() and not day.is_symlink():
            jobs = [
                each
                for each in day.iterdir()
                if _ID.fullmatch(f"{day.name}-{each.name}") and (each / JOB).is_file()
            ]
            found += sorted(jobs, key=lambda each: int(each.name), reverse=True)
    return found


async def _list(request: Request) -> Response:
    studio, before = request.app.state.studio, request.query_params.get("before")
    text = request.query_params.get("limit", "30")
    limit = min(100, max(1, int(text))) if text.isdecimal() and len(text) < 6 else 30
    folders = _all(studio)
    names = [f"{each.parent.name}-{each.name}" for each in folders]
    if before in names:
        folders = folders[names.index(before) + 1 :]
    jobs = [shown(studio, each) for each in folders[:limit]]
    seconds = _seconds(generator_of(studio))  # of an image
    return reply({"jobs": jobs, "more": len(folders) > limit, "seconds": seconds})


async def _one(request: Request) -> Response:
    studio = request.app.state.studio
    return reply(shown(studio, _folder(studio, request.path_params["id"])))


async def _png(request: Request) -> Response:
    folder = _folder(request.app.state.studio, request.path_params["id"])
    name = f"{request.path_params['number']:04d}.png"
    fd = open_file(folder, [name])
    size = os.fstat(fd).st_size
    if not size:
        os.close(fd)
        raise Problem(404, "the image is not complete")
    return send_file(fd, name, {"Cache-Control": "private, max-age=31536000, immutable"})


async def _cancel(request: Request) -> Response:
    studio, identity = request.app.state.studio, request.path_params["id"]
    folder, generator = _folder(studio, identity), generator_of(studio)
    job = generator.known.get(identity)
    if job is not None and job.ended is None:
        generator.cancel(job)
    return reply(shown(studio, folder), 202)


async def _delete(request: Request) -> Response:
    studio, identity = request.app.state.studio, request.path_params["id"]
    folder, generator = _folder(studio, identity), generator_of(studio)
    job = generator.known.get(identity)
    if job is not None and job.ended is None:
        raise Problem(409, "the images are being made; cancel first", allowed=["cancel"])
    generator.known.pop(identity, None)
    return reply({"trash": to_trash(studio, folder)})


async def _delete_image(request: Request) -> Response:
    """Moves one image of a job that has ended to the trash."""
    studio, identity = request.app.state.studio, request.path_params["id"]
    folder = _folder(studio, identity)
    job = generator_of(studio).known.get(identity)
    if job is not None and job.ended is None:
        raise Problem(409, "the images are being made; cancel first", allowed=["cancel"])
    path = folder / f"{request.path_params['number']:04d}.png"
    os.close(open_file(folder, [path.name]))
    beside = path.with_suffix(".json")
    return reply({"trash": to_trash(studio, path, *[beside] * beside.is_file())})


async def _release(request: Request) -> Response:
    """POST /api/gpu/release: the generator unloads its model."""
    generator = generator_of(request.app.state.studio)
    if not generator.is_idle():
        raise Problem(409, "images are being made", None, "cancel them, or wait")
    return reply({"released": generator.release()})


async def work(studio: Studio) -> None:
    """Does the jobs. Runs until it is cancelled."""
    for part in studio.images.glob("*/*/.*.part") if studio.images.is_dir() else ():
        part.unlink(missing_ok=True)  # of a process that was killed
    await generator_of(studio).work()


ROUTES = [
    Route("/api/images", _new, methods=["POST"]),
    Route("/api/images", _list),
    Route("/api/images/{id}", _one),
    Route("/api/images/{id}", _delete, methods=["DELETE"]),
    Route("/api/images/{id}/cancel", _cancel, methods=["POST"]),
    Route("/api/images/{id}/{number:int}.png", _png),
    Route("/api/images/{id}/{number:int}.png", _delete_image, methods=["DELETE"]),
    Route("/api/gpu/release", _release, methods=["POST"]),
]
