"""Jobs of images, one after another, by the generator's process or by a run that is training."""

import asyncio
import json
import logging
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.files.atomic import atomic_file
from families.registry import by_hub_id
from studio import commands, gpu
from studio.folder import Studio
from studio.jobs import Jobs, jobs_of
from studio.replies import Problem
from studio.summaries import LIVE
from studio.worker import Worker, WorkerEnded
from trainer.inbox import Command

log = logging.getLogger(__name__)

JOB = "job.json"  # in the job's folder
LOOK = 0.2  # seconds between two looks at the GPU's owner or a run
SHOWN = 60.0  # seconds for which an ended job is a task of the status
PATIENCE = 600.0  # seconds for a run to answer
ENDED = ("done", "failed", "canceled")


@dataclass
class Job:
    """The images of one request. `plan` and the end are in job.json; images are files."""

    folder: Path
    plan: dict[str, Any]  # created, prompt, when, run, request, axes, images
    state: str = "waiting"
    error: str | None = None
    ended: float | None = None
    made: dict[int, dict[str, Any]] = field(default_factory=dict)  # by number
    wanted: bool = True  # not cancelled

    @property
    def id(self) -> str:
        """DAY-NUMBER."""
        return f"{self.folder.parent.name}-{self.folder.name}"

    def file(self, number: int) -> Path:
        """The file of an image."""
        return self.folder / f"{number:04d}.png"

    def write(self) -> None:
        """Writes job.json."""
        end = {"state": self.state, "error": self.error} if self.ended else {}
        with atomic_file(self.folder / JOB) as file:
            file.write(json.dumps({**self.plan, **end}, indent=1).encode(errors="backslashreplace"))

    def end(self, state: str, error: str | None = None) -> None:
        """Notes how the job has ended."""
        self.state, self.error, self.ended = state, error, time.time()
        self.write()


class Generator:
    """The jobs that wait, and the generator's process."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self.worker = Worker("studio.generator_process", jobs.studio.folder)
        self.known: dict[str, Job] = {}
        self._base: str | None = None
        self._new = asyncio.Event()

    def add(self, job: Job) -> None:
        """Adds a job at the end."""
        job.write()
        self.known[job.id] = job
        self._new.set()

    def cancel(self, job: Job) -> None:
        """Cancels a job; the image that is being made is finished."""
        job.wanted = False
        self.worker.send({"do": "cancel", "job": job.id})
        if job.state == "waiting":
            job.end("canceled")

    def shown(self) -> dict[str, Any]:
        """The state of the process."""
        if not self.worker.runs:
            return {"state": "off", "base_model": None}
        busy = any(job.state == "running" for job in self.known.values())
        state = "working" if busy else "ready"
        return {"state": "loading" if busy and not self._base else state, "base_model": self._base}

    def tasks(self) -> list[dict[str, Any]]:
        """The jobs as tasks of the status."""
        now, found = time.time(), []
        for job in self.known.values():
            if job.ended is None or now - job.ended < SHOWN:
                facts: dict[str, Any] = {
                    "id": job.id,
                    "kind": "images",
                    "state": job.state,
                    "error": job.error,
                }
                facts |= {"name": str(job.plan["prompt"])[:60], "done": len(job.made)}
                found.append(facts | {"of": len(job.plan["images"])})
        return found

    def is_idle(self) -> bool:
        """Whether no job needs the process now."""
        return not any(job.state == "running" for job in self.known.values())

    def borrows(self) -> bool:
        """Whether a job needs the GPU of a run that was paused for it."""
        return any(j.ended is None and j.plan["when"] == "pause" for j in self.known.values())

    def release(self) -> bool:
        """Ends an idle process, which frees the GPU; whether it has done so."""
        if not self.worker.runs or not self.is_idle():
            return False
        self.worker.kill()
        self._base = None
        return True

    async def work(self) -> None:
        """Does the jobs one after another."""
        try:
            while True:
                job = next((j for j in self.known.values() if j.state == "waiting"), None)
                if job is None:
                    self._new.clear()
                    await self._new.wait()
                    continue
                await self._do(job)
        finally:
            await self.worker.stop()

    async def _do(self, job: Job) -> None:
        try:
            if job.plan["when"] == "by_run":
                await self._by_run(job)
            elif await self._free_gpu(job):
                await self._by_process(job)
        except WorkerEnded as error:
            self._base = None
            job.end("failed", str(error))
        except Problem as problem:
            job.end("failed", str(problem))
        except OSError as error:
            job.end("failed", error.strerror or str(error))
        except asyncio.CancelledError:
            job.end("canceled", "the studio was ended")
            raise

    async def _free_gpu(self, job: Job) -> bool:
        """Waits until the GPU is free for the generator; false if the job is cancelled."""
        asked: tuple[str, str] | None = None  # the run that must free it, and the command's key
        while job.wanted:
            found = gpu.gpu()
            owner = found["owner"] if found else None
            if owner is None or owner["kind"] == "generator":
                return True
            if asked is not None:
                answer = self._jobs.runs.history(asked[0]).answers.get(asked[1], {})
                if not answer.get("accepted", True):
                    raise Problem(409, f"{asked[0]}: {answer.get('why')}")
            elif job.plan["when"] == "pause" and owner["kind"] == "run":
                asked = self._pause(str(owner["id"]))
            await asyncio.sleep(LOOK)
        if job.ended is None:
            job.end("canceled")
        return False

    def _pause(self, run: str) -> tuple[str, str] | None:
        """Asks the run that has the GPU to write a checkpoint and to free it, if it can now.

        `Queue.take_back` resumes it, whatever becomes of the job and of this server.
        """
        if "free" not in self._jobs.runs.summary(run)["allowed"]:
            return None
        command = Command("pause", free=True)
        self._jobs.queue.lend(run, command.key)
        commands.send(self._jobs, self._jobs.studio.outputs / run, command)
        return run, command.key

    async def _by_process(self, job: Job) -> None:
        job.state = "running"
        wanted = [each for each in job.plan["images"] if each["number"] not in job.made]
        images = [
            {**each, "file": str(job.file(each["number"])), "weights": each["files"]}
            for each in wanted
        ]

        def made(line: dict[str, Any]) -> None:
            known = by_hub_id(line["base_model"])
            self._base = known.name if known else line["base_model"]
            job.made[line["number"]] = {"settings": line["settings"], "seconds": line["seconds"]}

        answer = await self.worker.ask({"do": "job", "job": job.id, "images": images}, made)
        job.end(answer["state"], answer.get("error"))

    async def _by_run(self, job: Job) -> None:
        """The images by a run that is training, between two of its steps."""
        job.state, run = "running", job.plan["run"]
        folder = self._jobs.runs.folder(run)
        for each in job.plan["images"]:
            if not job.wanted:
                return job.end("canceled")
            if "preview" not in self._jobs.runs.summary(run)["allowed"]:
                raise Problem(409, f"{run} is no longer training")
            settings = each["settings"]
            command = Command("preview", prompt=settings["prompt"], seed=settings["seed"])
            commands.send(self._jobs, folder, command)
            made = await self._answer(job, run, command.key)
            if made is None:
                return job.end("canceled")
            target, settings = job.file(each["number"]), self._used(run, made)
            each["settings"], each["seed"] = settings, settings["seed"]
            job.plan["request"] |= {k: v for k, v in settings.items() if k != "seed"}
            job.write()  # what the page shows is what the run used, and not what the form said
            await asyncio.to_thread(shutil.copyfile, folder / made["file"], target)
            with atomic_file(target.with_suffix(".json")) as file:
                file.write(json.dumps(settings).encode(errors="backslashreplace"))
            job.made[each["number"]] = {"settings": settings}
        job.end("done")

    def _used(self, run: str, made: dict[str, Any]) -> dict[str, Any]:
        """The settings of an image that a run has generated, from its event."""
        names = {"guidance": "guidance_scale"} | {
            name: name for name in ("prompt", "negative_prompt", "width", "height", "steps", "seed")
        }
        step = int(made["step"])
        weights = {"id": f"runs/{run}/step-{step:06d}", "scale": made.get("lora_scale")}
        return {name: made.get(named) for name, named in names.items()} | {
            "base_model": self._jobs.runs.summary(run)["base_model"],
            "weights": [weights],  # in no file
            "step": step,
        }

    async def _answer(self, job: Job, run: str, key: str) -> dict[str, Any] | None:
        """The `generated` event of a command; None if the job is cancelled before."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and job.wanted:
            history = self._jobs.runs.history(run)
            answer = history.answers.get(key)
            if answer is not None and not answer.get("accepted"):
                raise Problem(409, f"{run}: {answer.get('why')}")
            found = next((e for e in history.generated if e.get("id") == key), None)
            if found is not None and answer is not None:
                return found
            if self._jobs.runs.summary(run)["state"] not in (*LIVE, "paused"):
                raise Problem(409, f"{run} has ended")
            await asyncio.sleep(LOOK)
        if job.wanted:
            raise Problem(409, f"{run} has not answered for {PATIENCE / 60:.0f} minutes")
        return None


def generator_of(studio: Studio) -> Generator:
    """The studio's generator."""
    jobs = jobs_of(studio)
    if jobs.generator is None:
        jobs.generator = Generator(jobs)
    return jobs.generator
