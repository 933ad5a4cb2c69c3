"""The files of a run's folder: their exact names, and what may be removed. No PyTorch here.

A person keeps files wherever they like, also in a run's folder, and a run never touches those.
So nothing here goes by a loose pattern, and nothing is removed through a link.
"""

import json
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer import lock
from trainer.lock import FolderRefused

RECORD, EVENTS, LOG = "run.json", "events.jsonl", "log.txt"
WEIGHTS, REPORT, RESULT = "weights.zip", "report.html", "record.json"
CHECKPOINTS, SAMPLES, TRACKERS, UPLOAD = "checkpoints", "samples", "trackers", "hub-upload"
COMMANDS, SAVED = "commands", "saved"
PLACES = (CHECKPOINTS, SAMPLES, TRACKERS, UPLOAD, COMMANDS, SAVED)
SHEET = "sheet.png"
PROGRAM = "zeroprior"  # in run.json: the folder is ours

# Every name that a run gives to a file, by the folder it is in.
DESCRIPTIONS = (RECORD, EVENTS)  # of a run that may not have made anything
RESULTS = (
    *DESCRIPTIONS,
    WEIGHTS,
    RESULT,
    "weights-unchecked.zip",
    "weights-failed.zip",
    REPORT,
    "report-failed.html",
)
STEP = re.compile(r"step-(\d{6}|[1-9]\d{6,})", re.ASCII)
CHECKPOINT = re.compile(rf"{STEP.pattern}\.safetensors", re.ASCII)
# Beside it, and in `saved`: `trainer.learning.step_weights`.
STEP_WEIGHTS = re.compile(rf"{STEP.pattern}\.zip", re.ASCII)
COMMAND = re.compile(r"(\d{4,})-[a-z]+\.json", re.ASCII)
PREVIEW = re.compile(r"(\d{2}|[1-9]\d{2,})(-[1-9]\d*)?\.png", re.ASCII)
_TOP = re.compile("|".join(map(re.escape, (*RESULTS, LOG))))
_IN_CHECKPOINTS = re.compile(rf"{STEP.pattern}\.(safetensors|zip)", re.ASCII)
_IN_SAMPLES = re.compile(rf"{STEP.pattern}|{re.escape(SHEET)}", re.ASCII)
# A file that `adapters.files.atomic` was writing when its process was killed.
_PART = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}\.part", re.ASCII)


def record_of(folder: Path) -> dict[str, Any]:
    """What the folder's run.json says; empty where there is none of ours."""
    try:
        facts = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) and facts.get("program") == PROGRAM else {}


def listed(folder: Path) -> list[Path]:
    """What is in a folder, sorted; nothing where there is none."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, by their exact names, the one of most steps last."""
    return [file for _, file in files_by_step(folder, CHECKPOINT)]


def files_by_step(folder: Path, names: re.Pattern[str]) -> list[tuple[int, Path]]:
    """The files of these names in a folder with the step in each name, the most steps last."""
    found = {
        int(match[1]): each
        for each in listed(folder)
        if (match := names.fullmatch(each.name)) is not None
    }
    return sorted(found.items())


def refuse_another_run(folder: Path, besides: Collection[str] = ()) -> None:
    """Raises `FolderRefused` if the folder holds what a run writes, or something in its place."""
    for name in (CHECKPOINTS, SAMPLES, TRACKERS, COMMANDS, SAVED):
        if os.path.lexists(folder / name) and not (folder / name).is_dir():
            raise FolderRefused(f"{folder / name} is not a folder; choose another output_dir")
    found = found_in(folder, besides)
    if found is None:
        return
    hint = ""
    if checkpoints_in(folder / CHECKPOINTS):
        hint = f", or continue that run with resume_from: {folder / CHECKPOINTS}"
    elif (folder / WEIGHTS).is_file():
        hint = f"; resume_from: {folder / WEIGHTS} trains those weights further, in another folder"
    raise FolderRefused(f"{folder} holds {found} of another run; choose another output_dir{hint}")


def forget_if_nothing_was_done(folder: Path) -> None:
    """Removes run.json and events.jsonl of a run that was killed before it had saved anything.

    So the same command can be repeated. The run's lock must be held.
    """
    if record_of(folder) and found_in(folder, DESCRIPTIONS) is None:
        remove_parts(folder)
        remove_descriptions(folder)


def remove_descriptions(folder: Path, names: Collection[str] = DESCRIPTIONS) -> None:
    """Removes what describes a run that has made nothing. The lock must be held."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    for file in _in_place(folder, COMMANDS, COMMAND):
        file.unlink(missing_ok=True)
    remove_if_empty(folder / COMMANDS)


def found_in(folder: Path, besides: Collection[str] = ()) -> str | None:
    """The name of something that a run has written in the folder, or None."""
    for name in (*RESULTS, UPLOAD):
        if name not in besides and os.path.lexists(folder / name):
            return name
    for place, names in (
        (CHECKPOINTS, _IN_CHECKPOINTS),
        (SAMPLES, _IN_SAMPLES),
        (SAVED, STEP_WEIGHTS),
    ):
        for each in listed(folder / place):
            if names.fullmatch(each.name):
                return f"{place}/{each.name}"
    return None


def remove_parts(folder: Path) -> None:
    """Removes the files that an earlier process of this run was writing when it was killed.

    The run's lock must be held: then nobody is writing them now.
    """
    for file in list(files_of(folder)):
        if _PART.fullmatch(file.name):
            file.unlink(missing_ok=True)


def remove_run(folder: Path) -> None:
    """Removes a run's files, and its folder unless it holds others. The lock must be held."""
    for file in list(files_of(folder)):
        file.unlink(missing_ok=True)
    for name in (TRACKERS, UPLOAD):  # whole folders of ours, in which libraries name the files
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            shutil.rmtree(folder / name)
    ours = (folder / name for name in (CHECKPOINTS, SAMPLES, COMMANDS, SAVED))
    for each in (*_preview_folders(folder), *ours):
        remove_if_empty(each)
    (folder / lock.NAME).unlink(missing_ok=True)
    remove_if_empty(folder)


def remove_if_empty(folder: Path) -> None:
    """Removes a folder that holds nothing; a link, or one that holds something, stays."""
    with suppress(OSError):
        folder.rmdir()


def files_of(folder: Path) -> Iterator[Path]:
    """The files in a run's folder that are ours by place and name, none of them behind a link."""
    yield from _ours(folder, _TOP)
    yield from _in_place(folder, CHECKPOINTS, _IN_CHECKPOINTS)
    yield from _in_place(folder, SAMPLES, _IN_SAMPLES)
    yield from _in_place(folder, SAVED, STEP_WEIGHTS)
    yield from _in_place(folder, COMMANDS, COMMAND)
    for each in _preview_folders(folder):
        yield from _ours(each, PREVIEW)


def _in_place(folder: Path, place: str, names: re.Pattern[str]) -> list[Path]:
    here = folder / place
    return [] if here.is_symlink() else list(_ours(here, names))


def _ours(place: Path, names: re.Pattern[str]) -> Iterator[Path]:
    for each in listed(place):
        part = _PART.fullmatch(each.name)
        ours = names.fullmatch(part["name"] if part else each.name)
        if ours and each.is_file() and not each.is_symlink():
            yield each


def _preview_folders(folder: Path) -> list[Path]:
    samples = folder / SAMPLES
    found = [] if samples.is_symlink() else listed(samples)
    return [each for each in found if STEP.fullmatch(each.name) and not each.is_symlink()]
