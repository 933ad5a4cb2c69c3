"""Commands to a run: files in its folder. Does not import PyTorch.

commands/0001-pause.json    {"key": "…", "do": "pause", "free": true}

Between two steps, the run reads and removes the files, executes the commands, and writes a
`command` event with the same key for each. A key is executed only once, so a sender that got no
answer may send the command again.
"""

import json
import os
import secrets
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

from trainer.events import read_events
from trainer.run_files import COMMAND, COMMANDS, listed

COMMAND_NAMES = ("pause", "resume", "stop", "save", "preview")
MAX_BYTES = 10_000  # of a command


@dataclass(frozen=True)
class Command:
    """A command to a run."""

    do: str  # one of COMMAND_NAMES
    free: bool = False  # of a pause: write a checkpoint and end the process
    keep: bool = False  # of a stop: write the weights and check them
    prompt: str | None = None  # of a preview: one image of it, instead of the preview images
    seed: int | None = None  # of that image; None: the run's
    key: str = field(default_factory=lambda: secrets.token_hex(8))


def put(folder: Path, command: Command) -> None:
    """Sends a command to the run in a folder; the file is written atomically."""
    place = folder / COMMANDS
    place.mkdir(exist_ok=True)
    descriptor, part = tempfile.mkstemp(".part", f".0000-{command.do}.json.", place)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(asdict(command), file)
        number = max((number for number, _ in _found(place)), default=0)
        while True:
            number += 1
            try:  # unlike a rename, a link never replaces another command
                os.link(part, place / f"{number:04d}-{command.do}.json")
                return
            except FileExistsError:
                continue
    finally:
        os.unlink(part)


class Inbox:
    """The new commands in a run's folder. Without a folder there are none."""

    def __init__(self, folder: Path | None = None) -> None:
        self._place = folder / COMMANDS if folder is not None else None
        self._done: set[str] = set()
        if folder is not None:
            events = read_events(folder)
            self._done = {str(each.get("id")) for each in events if each["type"] == "command"}

    def take(self) -> list[tuple[Command, str]]:
        """Takes the new commands in order, each with its error or an empty text."""
        if self._place is None:
            return []
        taken = []
        for _, path in _found(self._place):
            command, fault = _read(path)
            path.unlink(missing_ok=True)
            if command.key not in self._done:
                self._done.add(command.key)
                taken.append((command, fault))
        return taken


def _found(place: Path) -> list[tuple[int, Path]]:
    """The command files with their numbers, in order."""
    matched = ((COMMAND.fullmatch(path.name), path) for path in listed(place))
    return sorted((int(found[1]), path) for found, path in matched if found is not None)


def _read(path: Path) -> tuple[Command, str]:
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(MAX_BYTES))
        command = Command(**content)
        right = all(type(each) is bool for each in (command.free, command.keep))
        right = right and isinstance(command.prompt, str | None)
        right = right and (command.seed is None or type(command.seed) is int)
        if command.do in COMMAND_NAMES and right and type(command.key) is str:
            return command, ""
    except (OSError, ValueError, TypeError, RecursionError):
        pass
    names = ", ".join(COMMAND_NAMES)
    return Command("unknown"), f"{path.name} is not a valid command; do must be one of {names}"
