"""Commands to runs, new runs, and the queue's routes; the work that starts and ends processes."""

import asyncio
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from adapters.files.atomic import atomic_path
from studio import gpu, new_runs, processes
from studio.folder import Studio, to_trash
from studio.jobs import Jobs, jobs_of
from studio.planner import check_known
from studio.replies import Problem, read_json, reply
from studio.summaries import (
    PATIENCE,
    RESTARTED,
    STARTING,
    facts_of,
    usable_weights,
    write_facts,
)
from trainer.inbox import Command, put
from trainer.lock import Lock
from trainer.run_files import WEIGHTS

log = logging.getLogger(__name__)

INTERVAL = 0.5  # seconds between two looks at runs and queue
REAP_SECONDS = 5.0  # between two looks at processes that were left
_TEXT_BYTES = 10_000
TRAINERS: dict[str, Callable[..., Command]] = {  # commands that the trainer executes
    "pause": lambda **more: Command("pause", **more),
    "free": lambda **more: Command("pause", free=True, **more),
    "stop": lambda **more: Command("stop", **more),
    "keep": lambda **more: Command("stop", keep=True, **more),
    "save": lambda **more: Command("save", **more),
    "preview": lambda **more: Command("preview", **more),
    "resume": lambda **more: Command("resume", **more),
}
_tasks: set[asyncio.Task[None]] = set()  # asyncio keeps only weak references


def _jobs(request: Request) -> Jobs:
    return jobs_of(request.app.state.studio)


def _key(body: dict[str, Any]) -> str:
    key = body.get("key")
    if not isinstance(key, str) or not 1 <= len(key) <= 128:
        raise Problem(400, "key must be a text of 1 to 128 characters", "key")
    return key


async def _new(request: Request) -> Response:
    """POST /api/runs."""
    jobs, body = _jobs(request), await read_json(request)
    key, start = _key(body), body.get("start", "queue")
    if start not in ("queue", "now"):
        raise Problem(400, "start must be queue or now", "start")
    if (known := _answered(jobs, key)) is not None:
        return reply({"id": known}, 201)
    studio = jobs.studio
    settings = new_runs.checked_settings(studio, body.get("settings") or {}, body.get("datasets"))
    chosen = new_runs.checked_datasets(studio, body.get("datasets"))
    await check_known(studio, settings, chosen)
    if key in jobs.keys:  # of the same request, which came meanwhile
        return reply({"id": _answered(jobs, key)}, 201)
    facts = {"title": _text(body, "title", 200), "note": _text(body, "note"), "key": key}
    identity = await _created(jobs, key, settings, chosen, facts, now=start == "now")
    return reply({"id": identity}, 201)


async def _created(
    jobs: Jobs,
    key: str,
    settings: Any,
    chosen: Any,
    facts: dict[str, Any],
    resume_from: Path | None = None,
    now: bool = False,
) -> str:
    """Creates and queues a run; returns its name."""
    jobs.keys[key] = ""  # the same request at the same time waits
    try:
        arguments = jobs.studio, settings, chosen, facts, resume_from
        folder = await asyncio.to_thread(new_runs.create, *arguments)
    except BaseException:
        jobs.keys.pop(key, None)
        raise
    jobs.keys[key] = folder.name
    jobs.queue.add(folder.name, now)
    jobs.queue.advance()
    return folder.name


def _answered(jobs: Jobs, key: str) -> str | None:
    """The run that a request with this key has created; also one before a restart of the server."""
    if key in jobs.keys:
        if not jobs.keys[key]:
            raise Problem(409, "this request is being executed", None, "wait for its answer")
        return jobs.keys[key]
    for identity in jobs.runs.ids():
        if facts_of(jobs.studio.outputs / identity).get("key") == key:
            jobs.keys[key] = identity
            return identity
    return None


def _text(body: dict[str, Any], name: str, most: int = _TEXT_BYTES) -> str:
    value = body.get(name) or ""
    if not isinstance(value, str) or len(value) > most:
        raise Problem(400, f"{name} must be text of at most {most:,} characters", name)
    return value


async def _command(request: Request) -> Response:
    """POST /api/runs/ID/commands."""
    jobs, body = _jobs(request), await read_json(request)
    identity, key, do = request.path_params["id"], _key(body), str(body.get("do"))
    folder = jobs.runs.folder(identity)
    waiting = jobs.processes.waiting.get(identity)
    sent = {*jobs.processes.sent.get(identity, {}), *([waiting.key] if waiting else [])}
    if key in sent or key in jobs.runs.history(identity).answers:
        return reply({"run": jobs.runs.summary(identity)}, 202)
    known = _answered(jobs, key)
    if known is not None:
        return reply({"run": jobs.runs.summary(known)}, 202)
    summary = jobs.runs.summary(identity)
    if do not in summary["allowed"]:
        can = ", ".join(summary["allowed"]) or "nothing"
        text = f"cannot {do[:20]} {identity}, which is {summary['state']}; possible now: {can}"
        raise Problem(409, text, allowed=summary["allowed"])
    shown = await execute(jobs, folder, do, key, summary, body)
    return reply({"run": jobs.runs.summary(shown)}, 202)


async def execute(
    jobs: Jobs, folder: Path, do: str, key: str, summary: dict[str, Any], body: dict[str, Any]
) -> str:
    """Executes an allowed command; returns the run that the answer shows."""
    name = folder.name
    if name in jobs.runs.lent and do in ("stop", "keep", "free", "pause", "end"):
        jobs.queue.remove(name)  # what the user wants of it now is what counts
        if do == "stop" and summary["state"] in ("pausing", "paused"):
            jobs.keys[key] = name
            return name
    if do in TRAINERS and not (do == "resume" and not Lock.is_held(folder)):
        more: dict[str, Any] = {"key": key}
        if do == "preview" and body.get("prompt"):
            seed = body.get("seed")
            more |= {"prompt": _text(body, "prompt"), "seed": seed if type(seed) is int else None}
        send(jobs, folder, TRAINERS[do](**more))
        return name
    if do in ("restart", "more"):
        steps = None
        if do == "more":
            steps = body.get("steps") or max(1, summary["steps"] // 2)
            if type(steps) is not int or not 1 <= steps <= 100_000:
                raise Problem(422, "steps must be between 1 and 100000", "steps")
        settings, chosen, resume = new_runs.again(jobs.studio, folder, steps)
        title = summary["title"] if summary["title"] != name else ""
        facts = {"title": title, "note": "", "key": key, "of": name}
        return await _created(jobs, key, settings, chosen, facts, resume)
    if do != "delete":
        jobs.keys[key] = name
    if do in ("start", "resume"):
        jobs.queue.add(name, now=True)
        jobs.queue.advance()
    elif do == "keep_weights":
        await asyncio.to_thread(keep_weights, folder)
    elif do == "end":
        _in_background(jobs.processes.end(folder, jobs.runs.history(name).started))
    else:
        raise Problem(409, "send DELETE to delete a run", allowed=summary["allowed"])
    return name


def send(jobs: Jobs, folder: Path, command: Command) -> None:
    """Sends a command to a run's process; to one that starts, when it has begun."""
    phase = jobs.runs.summary(folder.name)["phase"]
    if phase is not None and phase["name"] == STARTING:
        jobs.processes.waiting[folder.name] = command
        return
    jobs.processes.sent.setdefault(folder.name, {})[command.key] = command, time.time()
    put(folder, command)


def send_waiting(jobs: Jobs) -> None:
    """Sends the commands whose processes have begun meanwhile."""
    for name, command in list(jobs.processes.waiting.items()):
        folder = jobs.studio.outputs / name
        phase = jobs.runs.summary(name)["phase"] if folder.is_dir() else None
        if phase is None or phase["name"] != STARTING:
            del jobs.processes.waiting[name]
            if Lock.is_held(folder):
                send(jobs, folder, command)


def keep_weights(folder: Path) -> None:
    """Makes the newest weights of a step the result of a stopped run."""
    lock = Lock.take_free(folder)
    if lock is None:
        raise Problem(409, f"{folder.name} is in use", allowed=[])
    try:
        with atomic_path(folder / WEIGHTS) as part:
            shutil.copyfile(usable_weights(folder)[-1], part)
    finally:
        lock.release()


def delete(jobs: Jobs, folder: Path) -> str:
    """Moves a run that no process holds to the trash."""
    if Lock.is_held(folder):
        allowed = jobs.runs.summary(folder.name)["allowed"]
        raise Problem(
            409, f"{folder.name} is in use by its process; stop it first", allowed=allowed
        )
    jobs.queue.remove(folder.name)
    identity = to_trash(jobs.studio, folder)
    jobs.runs.forget(folder.name)
    return identity


def _in_background(work: Any) -> None:
    task = asyncio.get_running_loop().create_task(work)
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)


async def _delete(request: Request) -> Response:
    jobs = _jobs(request)
    return reply({"trash": delete(jobs, jobs.runs.folder(request.path_params["id"]))})


async def _patch(request: Request) -> Response:
    jobs, body = _jobs(request), await read_json(request)
    folder = jobs.runs.folder(request.path_params["id"])
    changes = {name: _text(body, name) for name in ("title", "note") if name in body}
    write_facts(folder, **changes)
    return reply(jobs.runs.summary(folder.name))


async def _queue(request: Request) -> Response:
    queue = _jobs(request).queue
    if request.method == "PUT":
        body = await read_json(request)
        queue.set(body.get("order"), body.get("held"))
        queue.advance()
    return reply({"order": queue.order(), "held": queue.held})


async def work(studio: Studio) -> None:
    """Starts queued runs, and ends processes that were left. Runs until it is cancelled."""
    jobs, reaped = jobs_of(studio), 0.0
    if studio.resume:
        _resume_interrupted(jobs)
    while True:
        jobs.processes.collect()
        send_waiting(jobs)
        try:
            if jobs.runs.lent and not (jobs.generator and jobs.generator.borrows()):
                jobs.queue.take_back()
            if jobs.queue.advance() is None and jobs.generator is not None:
                if not gpu.is_free() and jobs.queue.next() is not None:
                    jobs.generator.release()
        except OSError as error:  # a full disk
            log.warning("the queue cannot be written: %s", error)
        if time.monotonic() - reaped > REAP_SECONDS:
            await reap(jobs)
            reaped = time.monotonic()
        await asyncio.sleep(INTERVAL)


def _resume_interrupted(jobs: Jobs) -> None:
    """Queues the runs that a restart of the machine has interrupted, as --resume asks for."""
    for summary in reversed(jobs.runs.all()):
        if summary["why"] == RESTARTED and "resume" in summary["allowed"]:
            jobs.queue.add(summary["id"])
    if jobs.queue.restarted:
        jobs.queue.set(None, False)


async def reap(jobs: Jobs) -> None:
    """Ends processes of runs that are over: those that do not end by themselves, and children."""
    left = await asyncio.to_thread(processes.members)
    outputs = os.path.join(jobs.studio.outputs, "")
    for name, pids in left.items():
        folder = Path(name)
        if not name.startswith(outputs) or folder.name in jobs.processes.ending:
            continue
        held, leads = Lock.is_held(folder), [not processes.is_child(each) for each in pids]
        history = jobs.runs.history(folder.name) if folder.is_dir() else None
        last = (history.last or {}) if history is not None else {}
        final = last.get("type") in ("done", "error", "stopped") or (
            last.get("type") == "paused" and not last.get("kept")
        )
        at = float(last.get("t") or 0)
        # A resumed run's process starts long before it writes its first event.
        begun = float(facts_of(folder).get("started") or 0)
        late = final and at > begun and time.time() - at > PATIENCE
        if late or (not held and not any(leads)):
            log.warning("%s: ending %d processes that were left", folder.name, len(pids))
            jobs.processes.kill(folder, history.started if history is not None else {})


ROUTES = [
    Route("/api/runs", _new, methods=["POST"]),
    Route("/api/runs/{id}/commands", _command, methods=["POST"]),
    Route("/api/runs/{id}", _patch, methods=["PATCH"]),
    Route("/api/runs/{id}", _delete, methods=["DELETE"]),
    Route("/api/queue", _queue, methods=["GET", "PUT"]),
]
