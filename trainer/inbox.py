"""Commands to a run: files that others put into its folder. No PyTorch here.

commands/0001-pause.json    {"key": "…", "do": "pause", "free": true}

The run looks between two steps, takes the file away, does what it says and writes a `command`
event with the same key. A key that was done before is not done again, so a sender that got no
answer may repeat itself.
"""

import json
import os
import secrets
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

from trainer.events import read_events
from trainer.run_files import COMMAND, COMMANDS, listed

COMMAND_NAMES = ("pause", "resume", "stop", "save")
MAX_BYTES = 10_000  # of a command


@dataclass(frozen=True)
class Command:
    """What a run is asked to do."""

    do: str  # one of COMMAND_NAMES
    free: bool = False  # of a pause: write a checkpoint and end the process
    keep: bool = False  # of a stop: write the weights and check them
    key: str = field(default_factory=lambda: secrets.token_hex(8))


def put(folder: Path, command: Command) -> None:
    """Gives a command to the run in a folder; the file appears all at once."""
    place = folder / COMMANDS
    place.mkdir(exist_ok=True)
    descriptor, part = tempfile.mkstemp(".part", f".0000-{command.do}.json.", place)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(asdict(command), file)
        number = max((number for number, _ in _found(place)), default=0)
        while True:
            number += 1
            try:  # unlike a rename, a link never takes the place of another's command
                os.link(part, place / f"{number:04d}-{command.do}.json")
                return
            except FileExistsError:
                continue
    finally:
        os.unlink(part)


class Inbox:
    """The commands that wait in a run's folder. Without a folder there are none."""

    def __init__(self, folder: Path | None = None) -> None:
        self._place = folder / COMMANDS if folder is not None else None
        self._done: set[str] = set()
        if folder is not None:
            events = read_events(folder)
            self._done = {str(each.get("id")) for each in events if each["type"] == "command"}

    def take(self) -> list[tuple[Command, str]]:
        """The new commands in their order, each with what is wrong with it, or an empty text."""
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
    """The files of commands and their numbers, in order."""
    matched = ((COMMAND.fullmatch(path.name), path) for path in listed(place))
    return sorted((int(found[1]), path) for found, path in matched if found is not None)


def _read(path: Path) -> tuple[Command, str]:
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(MAX_BYTES))
        command = Command(**content)
        right = all(type(each) is bool for each in (command.free, command.keep))
        if command.do in COMMAND_NAMES and right and type(command.key) is str:
            return command, ""
    except (OSError, ValueError, TypeError, RecursionError):
        pass
    return Command("unknown"), f"{path.name} is no command; do is one of {', '.join(COMMAND_NAMES)}"
