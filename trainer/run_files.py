"""The files of a run's folder: their exact names, and what may be removed. No PyTorch here.

A person keeps files wherever they like, also in a run's folder, and a run never touches those.
So nothing here goes by a loose pattern, and nothing is removed through a link.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer import lock
from trainer.lock import FolderRefused

RECORD = "run.json"
WEIGHTS, REPORT = "weights.zip", "report.html"
CHECKPOINTS, SAMPLES, TRACKERS, UPLOAD = "checkpoints", "samples", "trackers", "hub-upload"
PLACES = (CHECKPOINTS, SAMPLES, TRACKERS, UPLOAD)
SHEET = "sheet.png"
LOG = "log.txt"  # what the run and the libraries log; it is no result
PROGRAM = "zeroprior"  # in run.json: the folder is ours

# Every name that a run gives to a file, by the folder it is in.
RESULTS = (
    RECORD,
    WEIGHTS,
    "weights-unchecked.zip",
    "weights-failed.zip",
    REPORT,
    "report-failed.html",
)
STEP = re.compile(r"step-(\d{6}|[1-9]\d{6,})", re.ASCII)
CHECKPOINT = re.compile(rf"{STEP.pattern}\.safetensors", re.ASCII)
STEP_WEIGHTS = re.compile(
    rf"{STEP.pattern}\.zip", re.ASCII
)  # beside it: `trainer.learning.step_weights`
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


def refuse_another_run(folder: Path, besides: str | None = None) -> None:
    """Raises `FolderRefused` if the folder holds what a run writes, or something in its place."""
    for name in (CHECKPOINTS, SAMPLES, TRACKERS):
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
    """Removes the run.json of a run that was killed before it had saved anything.

    So the same command can be repeated. The run's lock must be held.
    """
    if record_of(folder) and found_in(folder, besides=RECORD) is None:
        remove_parts(folder)
        (folder / RECORD).unlink()


def found_in(folder: Path, besides: str | None = None) -> str | None:
    """The name of something that a run has written in the folder, or None."""
    for name in (*RESULTS, UPLOAD):
        if name != besides and os.path.lexists(folder / name):
            return name
    for place, names in ((CHECKPOINTS, _IN_CHECKPOINTS), (SAMPLES, _IN_SAMPLES)):
        for each in listed(folder / place):
            if names.fullmatch(each.name):
                return f"{place}/{each.name}"
    return None


def remove_parts(folder: Path) -> None:
    """Removes the files that an earlier process of this run was writing when it was killed.

    The run's lock must be held: then nobody is writing them now.
    """
    for file in list(_files(folder)):
        if _PART.fullmatch(file.name):
            file.unlink(missing_ok=True)


def remove_run(folder: Path) -> None:
    """Removes a run's files, and its folder unless it holds others. The lock must be held."""
    for file in list(_files(folder)):
        file.unlink(missing_ok=True)
    for name in (TRACKERS, UPLOAD):  # whole folders of ours, in which libraries name the files
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            shutil.rmtree(folder / name)
    for each in (*_preview_folders(folder), folder / CHECKPOINTS, folder / SAMPLES):
        remove_if_empty(each)
    (folder / lock.NAME).unlink(missing_ok=True)
    remove_if_empty(folder)


def remove_if_empty(folder: Path) -> None:
    """Removes a folder that holds nothing; a link, or one that holds something, stays."""
    with suppress(OSError):
        folder.rmdir()


def _files(folder: Path) -> Iterator[Path]:
    """The files in a run's folder that are ours by place and name, none of them behind a link."""
    places = [(folder, _TOP)]
    if not (folder / CHECKPOINTS).is_symlink():
        places.append((folder / CHECKPOINTS, _IN_CHECKPOINTS))
    if not (folder / SAMPLES).is_symlink():
        places.append((folder / SAMPLES, _IN_SAMPLES))
    places += [(each, PREVIEW) for each in _preview_folders(folder)]
    for place, names in places:
        for each in listed(place):
            part = _PART.fullmatch(each.name)
            ours = names.fullmatch(part["name"] if part else each.name)
            if ours and each.is_file() and not each.is_symlink():
                yield each


def _preview_folders(folder: Path) -> list[Path]:
    samples = folder / SAMPLES
    found = [] if samples.is_symlink() else listed(samples)
    return [each for each in found if STEP.fullmatch(each.name) and not each.is_symlink()]
