"""Training runs in a folder that all machines can reach: any folder of fsspec.

    ID/job.json              the request, and the number of the last attempt
    ID/inputs/               dataset and resume_from
    ID/run/                  the run's files, as in its folder
    ID/events/OFFSET.jsonl   parts of events.jsonl; each is named by its first byte's offset
    ID/commands/             commands to the run
    ID/starts/ATTEMPT        the newest checkpoint when a process began
    ID/cancelled, ID/failed  it must not be started again; the reason, if it has failed

A file is visible only when it is complete. A run that moves to another machine takes its files from
here. Does not import Ray or PyTorch.
"""

import io
import json
import re
from bisect import bisect_right
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path

import fsspec

from fleet.contents import write_whole
from serving.openapi import Json
from trainer.inbox import Command
from trainer.run_files import EVENTS, files_of, files_of_model

IDENTITY = re.compile("[A-Za-z0-9_-]{1,100}")
MOST = 1 << 20  # bytes of events that are read at once


@dataclass(frozen=True)
class Job:
    """The request of a run."""

    id: str
    inputs: Json  # as for train.py; files are names in `inputs/`
    created: float
    attempt: int = 0  # of the newest process; an older one must not write


class RunStorage:
    """All runs below a URL. Thread-safe."""

    def __init__(self, url: str) -> None:
        self.files, self._root = fsspec.core.url_to_fs(url)

    def place(self, identity: str, name: str = "") -> str:
        """The path of a run's file."""
        return f"{self._root}/{identity}/{name}".rstrip("/")

    def ids(self) -> list[str]:
        """All runs, the newest last."""
        jobs = [job for name in self._names(self._root) if (job := self.job(name)) is not None]
        return [each.id for each in sorted(jobs, key=lambda each: each.created)]

    def job(self, identity: str) -> Job | None:
        """The request of a run; None if there is no such run."""
        content = self.read(identity, "job.json") if IDENTITY.fullmatch(identity) else None
        return Job(**json.loads(content)) if content is not None else None

    def write_job(self, job: Job) -> None:
        """Writes job.json."""
        self.write(job.id, "job.json", json.dumps(asdict(job)).encode())

    def read(self, identity: str, name: str) -> bytes | None:
        """The content of a run's file; None if there is none."""
        try:
            return self.files.cat_file(self.place(identity, name))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def write(self, identity: str, name: str, content: bytes) -> None:
        """Writes a small file of a run."""
        write_whole(self.files, io.BytesIO(content), self.place(identity, name))

    def put(self, identity: str, name: str, path: Path) -> None:
        """Copies a file of this machine."""
        with path.open("rb") as file:
            write_whole(self.files, file, self.place(identity, name))

    # ---- Events ----------------------------------------------------------------------------------

    def events_after(self, identity: str, offset: int) -> list[tuple[int, bytes]]:
        """The lines behind an offset, about `MOST` bytes, each with the offset behind it.

        An offset behind the end belongs to events that were cleared: all lines are given.
        """
        names = self._names(self.place(identity, "events"))
        starts = sorted(int(name.partition(".")[0]) for name in names)
        found: list[tuple[int, bytes]] = []
        read = 0
        for start in starts[max(bisect_right(starts, offset) - 1, 0) :]:
            content = self.read(identity, _part(start)) or b""
            if start == starts[-1] and offset > start + len(content):
                return self.events_after(identity, 0)
            place = start
            for line in content.splitlines(keepends=True):
                place += len(line)
                if place > offset:
                    found.append((place, line.removesuffix(b"\n")))
            read += len(content)
            if found and read > MOST:
                break
        return found

    def append_events(self, identity: str, offset: int, content: bytes) -> int:
        """Adds the complete lines of a content that begins at an offset. Returns the new offset."""
        whole = content[: content.rfind(b"\n") + 1]
        if whole:
            self.write(identity, _part(offset), whole)
        return offset + len(whole)

    # ---- The run's folder ------------------------------------------------------------------------

    def download(self, identity: str, folder: Path) -> int:
        """Copies a run's files into its folder on this machine. Returns the size of its events."""
        root = self.place(identity, "run")
        self.files.invalidate_cache()
        for path in self.files.find(root):
            target = folder / path.removeprefix(root).lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            self.files.get_file(path, str(target))
        offset, content = 0, b""
        while found := self.events_after(identity, offset):
            offset = found[-1][0]
            content += b"".join(line + b"\n" for _, line in found)
        (folder / EVENTS).write_bytes(content)
        return offset

    def clear(self, identity: str) -> None:
        """Removes a run's files and events, before it begins again."""
        for name in ("run", "events"):
            if self.files.exists(place := self.place(identity, name)):
                self.files.rm(place, recursive=True)

    def upload(self, identity: str, folder: Path, known: dict[str, tuple[int, int]]) -> None:
        """Copies the files that are new or changed since `known`, and removes those that are gone.

        `known` has the size and time of each copied file, and is updated.
        """
        now = {}
        for path in [*files_of(folder), *files_of_model(folder)]:
            name = path.relative_to(folder).as_posix()
            if name == EVENTS or path.name.startswith(".") or name.startswith("commands/"):
                continue
            try:
                status = path.stat()
                now[name] = status.st_size, status.st_mtime_ns
                if known.get(name) != now[name]:
                    self.put(identity, f"run/{name}", path)
                    known[name] = now[name]
            except FileNotFoundError:  # the run has removed it
                now.pop(name, None)
        for name in known.keys() - now.keys():
            self.files.rm_file(self.place(identity, f"run/{name}"))
            del known[name]

    # ---- Commands --------------------------------------------------------------------------------

    def send(self, identity: str, command: Command) -> None:
        """Sends a command to a run."""
        content = json.dumps(asdict(command)).encode()
        self.write(identity, f"commands/{command.key}.json", content)

    def take_commands(self, identity: str) -> list[Command]:
        """The new commands, which are removed."""
        found = []
        for name in self._names(self.place(identity, "commands")):
            content = self.read(identity, f"commands/{name}")
            if content is not None:
                found.append(Command(**json.loads(content)))
                self.files.rm_file(self.place(identity, f"commands/{name}"))
        return found

    # ---- Starts ----------------------------------------------------------------------------------

    def note_start(self, job: Job, checkpoint: str) -> None:
        """Notes that a process begins, and its newest checkpoint or an empty text."""
        self.write(job.id, f"starts/{job.attempt:09d}", checkpoint.encode())

    def starts_without_progress(self, identity: str) -> int:
        """How many of the last processes began with the same checkpoint."""
        names = self._names(self.place(identity, "starts"))
        at = [self.read(identity, f"starts/{name}") for name in names]
        return len(list(takewhile(lambda each: each == at[-1], reversed(at))))

    def _names(self, folder: str) -> list[str]:
        """The names in a folder; none if it does not exist."""
        self.files.invalidate_cache(folder)
        try:
            return sorted(path.rpartition("/")[2] for path in self.files.ls(folder, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []


def _part(offset: int) -> str:
    return f"events/{offset:015d}.jsonl"
