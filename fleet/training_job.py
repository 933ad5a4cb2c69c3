"""python -m fleet.training_job URL ID ATTEMPT: one training run, as a Ray job on any machine.

Copies the run's folder from the storage, trains there as `python -m trainer resume`, and copies
files and events back all the time. If this machine ends, the next attempt resumes from the newest
checkpoint in the storage. A newer attempt ends this one. Does not import Ray or PyTorch.
"""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from adapters.files.atomic import atomic_file
from fleet.run_storage import Job, RunStorage
from trainer.events import as_json
from trainer.inbox import put
from trainer.run_files import (
    BEGUN,
    CHECKPOINTS,
    EVENTS,
    PROGRAM,
    RECORD,
    checkpoints_in,
    record_of,
)
from trainer.settings import TrainingInputs, resolve

LOOK = 1.0  # seconds between two copies of files and events
TRIES = 5  # at the end, if the storage does not answer
FILES = ("dataset", "resume_from")  # inputs that are files
# Ends with this process, whose machine or job may be ended at any time.
TRAINER = (
    "from serving.processes import end_with_parent; end_with_parent(); "
    "from trainer.__main__ import main; main()"
)
OTHER_ATTEMPT = 75  # exit code: another attempt has taken over


def main(words: Sequence[str] | None = None) -> int:
    """Trains; returns the exit code of the trainer, or `OTHER_ATTEMPT`."""
    url, identity, attempt = words if words is not None else sys.argv[1:]
    storage = RunStorage(url)
    job = storage.job(identity)
    if job is None or job.attempt != int(attempt):
        return OTHER_ATTEMPT
    with tempfile.TemporaryDirectory(prefix="zeroprior-training-") as place:
        return _train(storage, job, Path(place))


def _train(storage: RunStorage, job: Job, place: Path) -> int:
    folder = place / "outputs" / job.id
    folder.mkdir(parents=True)
    offset = storage.download(job.id, folder)
    checkpoints = checkpoints_in(folder / CHECKPOINTS)
    storage.note_start(job, checkpoints[-1].name if checkpoints else "")
    if not checkpoints:  # it begins again
        storage.clear(job.id)
        shutil.rmtree(folder)
        folder.mkdir()
        offset = 0
    known = {
        path.relative_to(folder).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and path.name != EVENTS
    }
    _describe(storage, job, folder, place)
    console = place / "console.txt"
    with console.open("wb") as output:
        trainer = subprocess.Popen(
            [sys.executable, "-c", TRAINER, "resume", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )

    def end(number: int, _: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            trainer.send_signal(number)  # it writes a checkpoint, which is copied below

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    copy = _Copy(storage, job, folder, offset, known)
    while (code := trainer.poll()) is None:
        if not copy.tried():
            trainer.kill()
            trainer.wait()
            return OTHER_ATTEMPT
        with suppress(subprocess.TimeoutExpired):
            trainer.wait(LOOK)
    if not copy.tried(TRIES):
        return OTHER_ATTEMPT
    text = console.read_text(errors="replace")
    print(text[-10_000:], flush=True)
    if code > 0 and not (folder / EVENTS).exists():  # the trainer has refused it
        lines = [line for line in text.splitlines() if line.strip()] or [f"exit code {code}"]
        storage.write(job.id, "failed", lines[-1].encode())
    return code


class _Copy:
    """Copies a run's new files and events to the storage, and commands from there."""

    def __init__(
        self,
        storage: RunStorage,
        job: Job,
        folder: Path,
        offset: int,
        known: dict[str, tuple[int, int]],
    ) -> None:
        self._storage, self._job, self._folder = storage, job, folder
        self._offset, self._known = offset, known

    def tried(self, times: int = 1) -> bool:
        """Copies what is new; False if a newer attempt has taken over.

        The last try raises the storage's error, unless there is only one: the next call repeats it.
        """
        for attempt in range(times):
            try:
                return self._copy()
            except Exception as error:  # each kind of storage has errors of its own
                if attempt + 1 == times > 1:
                    raise
                print(f"the storage: {type(error).__name__}: {error}", flush=True)
                time.sleep(2**attempt - 1)
        return True

    def _copy(self) -> bool:
        storage, name = self._storage, self._job.id
        newest = storage.job(name)
        if newest is None or newest.attempt != self._job.attempt:
            return False
        events = b""
        if (path := self._folder / EVENTS).exists():
            # Read before the files are copied: an event is visible after its file.
            with path.open("rb") as file:
                file.seek(self._offset)
                events = file.read()
        storage.upload(name, self._folder, self._known)
        self._offset = storage.append_events(name, self._offset, events)
        for command in storage.take_commands(name):
            put(self._folder, command)
        return True


def _describe(storage: RunStorage, job: Job, folder: Path, place: Path) -> None:
    """Copies the inputs to this machine, and writes run.json with their paths.

    Without a checkpoint the run begins again: run.json is that of a queued run.
    """
    given: dict[str, Any] = dict(job.inputs)
    for name in FILES:
        if name in given:
            path = place / given[name]
            storage.files.get_file(storage.place(job.id, f"inputs/{given[name]}"), str(path))
            given[name] = str(path)
    record = record_of(folder)
    if record:
        record["dataset"]["path"] = given["dataset"]
        record["settings"]["given"] |= {name: given[name] for name in FILES if name in given}
    else:
        settings = resolve(TrainingInputs(**given))
        record = {
            "program": PROGRAM,
            BEGUN: False,
            "settings": {"given": given, "used": {"base": settings.base.name}},
            "dataset": {"path": given["dataset"]},
        }
    with atomic_file(folder / RECORD) as file:
        file.write(json.dumps(as_json(record), indent=2, ensure_ascii=False).encode())


if __name__ == "__main__":
    sys.exit(main())
