"""The state of a run of the fleet, from its events and from Ray's job. Never stored."""

from dataclasses import dataclass

from fleet.run_storage import Job, RunStorage
from serving.openapi import Json
from trainer.events import STATE_EVENTS, event_in

TRIES = 3  # processes that end unexpectedly without a new checkpoint; then the run has failed
ALIVE = ("PENDING", "RUNNING")  # of Ray's job


@dataclass
class Progress:
    """What a run's events say, read further each time."""

    offset: int = 0
    last: Json | None = None  # the last event that changes the state
    step: int = 0
    phase: str = ""

    def read(self, storage: RunStorage, identity: str) -> None:
        """Reads the new events."""
        while lines := storage.events_after(identity, self.offset):
            if lines[-1][0] < self.offset:  # they were cleared
                self.last, self.step, self.phase = None, 0, ""
            self.offset = lines[-1][0]
            for _, line in lines:
                if (event := event_in(line + b"\n")) is not None:
                    self._take(event)

    def _take(self, event: Json) -> None:
        if event["type"] in STATE_EVENTS:
            self.last = event
        if event["type"] == "phase":
            self.phase = str(event.get("name", ""))
        if event["type"] == "steps":
            self.step = event["from"] + len(event["loss"]) - 1
        else:
            self.step = event.get("step", self.step)


@dataclass(frozen=True)
class Found:
    """A run as it is now."""

    job: Job
    ray: str  # Ray's status of the newest attempt; empty: unknown
    progress: Progress
    cancelled: bool = False
    failed: str = ""  # the reason, if it could not begin
    starts: int = 0  # of processes that ended without a new checkpoint

    @property
    def status(self) -> str:
        """Cog's word for the state."""
        kind = self.progress.last["type"] if self.progress.last is not None else ""
        if kind == "done":
            return "succeeded"
        if self.ray in ALIVE:
            return "processing" if kind else "starting"
        if self.cancelled:
            return "canceled"
        if self.error:
            return "failed"
        return "processing" if kind else "starting"

    @property
    def error(self) -> str:
        """Why it has failed; empty if it has not."""
        if self.failed:
            return self.failed
        if self.progress.last is not None and self.progress.last["type"] == "error":
            return str(self.progress.last.get("text", ""))
        if self.starts >= TRIES and self.ray not in ALIVE:
            return f"its process ended unexpectedly {TRIES} times in a row, possibly out of memory"
        return ""

    @property
    def over(self) -> bool:
        """Whether it needs nothing more."""
        return self.status in ("succeeded", "failed", "canceled")

    @property
    def must_start(self) -> bool:
        """Whether a process is missing: it is new, or its machine has ended."""
        return not self.over and self.ray not in ALIVE

    def shown(self) -> Json:
        """Cog's reply to a training, with the step."""
        reply: Json = {"id": self.job.id, "input": self.job.inputs, "status": self.status}
        reply |= {
            "created_at": self.job.created,
            "attempt": self.job.attempt,
            "step": self.progress.step,
        }
        if self.status == "processing":
            reply["phase"] = self.progress.phase
        if self.status == "failed":
            reply["error"] = self.error
        if self.status == "succeeded":
            reply["output"] = {"weights": f"/trainings/{self.job.id}/files/weights.zip"}
        return reply


def found(job: Job, storage: RunStorage, ray: str, progress: Progress) -> Found:
    """The state of a run; reads its new events."""
    progress.read(storage, job.id)
    return Found(
        job,
        ray,
        progress,
        storage.read(job.id, "cancelled") is not None,
        (storage.read(job.id, "failed") or b"").decode(errors="replace"),
        storage.starts_without_progress(job.id),
    )
