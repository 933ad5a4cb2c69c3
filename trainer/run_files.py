"""Exact names of the files in a run's folder; removes only those. Does not import PyTorch.

Users may keep their own files in a run's folder, and a run never changes them. So there are no
loose patterns here, and nothing is removed through a link.
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
COMMANDS, SAVED, GENERATED = "commands", "saved", "generated"
MODEL = "model"  # the folder that is the result of a full training, in place of WEIGHTS
MODELS = (MODEL, "model-unchecked", "model-failed")
PLACES = (CHECKPOINTS, SAMPLES, TRACKERS, UPLOAD, COMMANDS, SAVED, GENERATED, *MODELS)
SHEET = "sheet.png"
CAPTIONS = "captions.jsonl"  # written by `autocaption`; they alone do not make a folder a run's
PROGRAM = "zeroprior"  # in run.json: marks the folder as a run's
BEGUN = "begun"  # in run.json: false for a queued run

# All names of a run's files, by folder.
DESCRIPTIONS = (RECORD, EVENTS)  # exist before the run has written anything else
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
# Next to it, and in `saved`: `trainer.learning.step_weights`.
STEP_WEIGHTS = re.compile(rf"{STEP.pattern}\.zip", re.ASCII)
COMMAND = re.compile(r"(\d{4,})-[a-z]+\.json", re.ASCII)
PREVIEW = re.compile(r"(\d{2}|[1-9]\d{2,})(-[1-9]\d*)?\.png", re.ASCII)
_IN_GENERATED = re.compile(rf"{STEP.pattern}-[1-9]\d*\.png", re.ASCII)
_TOP = re.compile("|".join(map(re.escape, (*RESULTS, LOG, CAPTIONS))))
_IN_CHECKPOINTS = re.compile(rf"{STEP.pattern}\.(safetensors|zip)", re.ASCII)
_IN_SAVED = re.compile(rf"{STEP.pattern}(\.zip)?", re.ASCII)  # a folder: of a full training
_IN_SAMPLES = re.compile(rf"{STEP.pattern}|{re.escape(SHEET)}", re.ASCII)
# A file that `adapters.files.atomic` was writing when its process was killed.
_PART = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}\.part", re.ASCII)


def record_of(folder: Path) -> dict[str, Any]:
    """The content of the folder's run.json; empty if there is none or it is not a run's."""
    try:
        facts = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) and facts.get("program") == PROGRAM else {}


def listed(folder: Path) -> list[Path]:
    """The sorted entries of a folder; empty if it does not exist."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the last step last."""
    return [file for _, file in files_by_step(folder, CHECKPOINT)]


def files_by_step(folder: Path, names: re.Pattern[str]) -> list[tuple[int, Path]]:
    """The files with these names and their steps, the last step last."""
    found = {
        int(match[1]): each
        for each in listed(folder)
        if (match := names.fullmatch(each.name)) is not None
    }
    return sorted(found.items())


def refuse_another_run(folder: Path, besides: Collection[str] = ()) -> None:
    """Raises `FolderRefused` if the folder contains files of a run, or names that a run needs."""
    for name in (CHECKPOINTS, SAMPLES, TRACKERS, COMMANDS, SAVED, GENERATED):
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
    raise FolderRefused(
        f"{folder} contains {found} of another run; choose another output_dir{hint}"
    )


def forget_if_nothing_was_done(folder: Path) -> None:
    """Removes run.json and events.jsonl of a run that was killed before it saved anything.

    So the same command can be repeated. The caller must hold the run's lock.
    """
    if record_of(folder) and found_in(folder, DESCRIPTIONS) is None:
        remove_parts(folder)
        remove_descriptions(folder)


def remove_descriptions(folder: Path, names: Collection[str] = DESCRIPTIONS) -> None:
    """Removes the descriptions of a run without results. The caller must hold the lock."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    for file in _in_place(folder, COMMANDS, COMMAND):
        file.unlink(missing_ok=True)
    remove_if_empty(folder / COMMANDS)


def found_in(folder: Path, besides: Collection[str] = ()) -> str | None:
    """The name of a file that a run has written in the folder, or None."""
    for name in (*RESULTS, UPLOAD, *MODELS):
        if name not in besides and os.path.lexists(folder / name):
            return name
    for place, names in (
        (CHECKPOINTS, _IN_CHECKPOINTS),
        (SAMPLES, _IN_SAMPLES),
        (SAVED, _IN_SAVED),
        (GENERATED, _IN_GENERATED),
    ):
        for each in listed(folder / place):
            if names.fullmatch(each.name):
                return f"{place}/{each.name}"
    return None


def remove_parts(folder: Path) -> None:
    """Removes partial files of an earlier process of this run that was killed.

    The caller must hold the run's lock, so that no process is writing them.
    """
    for file in list(files_of(folder)):
        if _PART.fullmatch(file.name):
            file.unlink(missing_ok=True)
    for each in (*listed(folder), *_folders_in(folder, SAVED)):
        part = _PART.fullmatch(each.name)
        model = part and (part["name"] in MODELS or STEP.fullmatch(part["name"]))
        if model and each.is_dir() and not each.is_symlink():
            shutil.rmtree(each)


def remove_run(folder: Path) -> None:
    """Removes a run's files, and its folder if it is empty. The caller must hold the lock."""
    for file in list(files_of(folder)):
        file.unlink(missing_ok=True)
    for name in (TRACKERS, UPLOAD, *MODELS):  # removed whole: libraries choose the file names
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            shutil.rmtree(folder / name)
    for each in _folders_in(folder, SAVED):
        if STEP.fullmatch(each.name):
            shutil.rmtree(each)
    ours = (folder / name for name in (CHECKPOINTS, SAMPLES, COMMANDS, SAVED, GENERATED))
    for each in (*_preview_folders(folder), *ours):
        remove_if_empty(each)
    (folder / lock.NAME).unlink(missing_ok=True)
    remove_if_empty(folder)


def remove_if_empty(folder: Path) -> None:
    """Removes an empty folder; a link or a folder with files is kept."""
    with suppress(OSError):
        folder.rmdir()


def files_of(folder: Path) -> Iterator[Path]:
    """The run's own files in its folder, by place and name; links are not followed."""
    yield from _ours(folder, _TOP)
    yield from _in_place(folder, CHECKPOINTS, _IN_CHECKPOINTS)
    yield from _in_place(folder, SAMPLES, _IN_SAMPLES)
    yield from _in_place(folder, SAVED, STEP_WEIGHTS)
    yield from _in_place(folder, GENERATED, _IN_GENERATED)
    yield from _in_place(folder, COMMANDS, COMMAND)
    for each in _preview_folders(folder):
        yield from _ours(each, PREVIEW)


def files_of_model(folder: Path) -> list[Path]:
    """The files of a full training's result in a run's folder."""
    return sorted(filter(Path.is_file, (folder / MODEL).rglob("*")))


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
    return [each for each in _folders_in(folder, SAMPLES) if STEP.fullmatch(each.name)]


def _folders_in(folder: Path, place: str) -> list[Path]:
    here = folder / place
    found = [] if here.is_symlink() else listed(here)
    return [each for each in found if each.is_dir() and not each.is_symlink()]
