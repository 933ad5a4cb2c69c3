"""Chooses, creates and locks a run's folder. Does not import PyTorch.

    outputs/2026-11-26-robot-01/
      run.json      settings, hashes of the dataset, versions; written once, at the start
      run.lock      locked while the run writes here (`trainer.lock`)
      events.jsonl  all events of the run (`trainer.events`)
      log.txt       the log of the run and the libraries
      commands/     commands to the run (`trainer.inbox`)
      checkpoints/  samples/  saved/  trackers/  weights.zip  report.html  record.json
      model/        in place of weights.zip, of a full training
    outputs/latest -> 2026-11-26-robot-01      the last run whose weights.zip is complete

A run never deletes or overwrites files of another run or of the user (`trainer.run_files`).
"""

import json
import logging
import os
import re
import secrets
import tempfile
import time
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from adapters.files.atomic import atomic_file
from trainer.dataset_names import bare_name
from trainer.events import Events
from trainer.lock import FolderRefused, Lock
from trainer.old_runs import remove_old_runs
from trainer.run_files import (
    BEGUN,
    CHECKPOINTS,
    COMMANDS,
    DESCRIPTIONS,
    EVENTS,
    LOG,
    MODEL,
    PLACES,
    PROGRAM,
    RECORD,
    REPORT,
    SAMPLES,
    TRACKERS,
    WEIGHTS,
    forget_if_nothing_was_done,
    found_in,
    listed,
    record_of,
    refuse_another_run,
    remove_descriptions,
    remove_if_empty,
    remove_parts,
)

log = logging.getLogger(__name__)

OUTPUTS = Path("outputs")  # in the working folder
LATEST = "latest"

_TEMPORARY = re.compile(r"tmp[a-z0-9_]{8}(file)?")  # a data URL, saved by Cog


class Run:
    """The folder of one run, locked as long as the run writes.

    Copies in other processes of the same launch have the path but not the lock; their methods do
    nothing.
    """

    def __init__(
        self,
        folder: Path,
        held: Lock | None = None,
        made: Sequence[Path] = (),
        continued: bool = False,
    ) -> None:
        """`made`: the folders created for this run, its own first."""
        self.folder, self.continued = folder, continued
        # None if a file of the user has this name.
        self.log = folder / LOG if continued or not os.path.lexists(folder / LOG) else None
        # Without the lock, events are not written.
        self.events = Events(folder if held is not None else None)
        self._lock, self._made = held, list(made)
        self._outputs = OUTPUTS.resolve()  # resolved now: the working folder may change
        self._described = False

    @property
    def weights(self) -> Path:
        """The path of the result, which exists once it is complete."""
        return self.folder / WEIGHTS

    @property
    def model(self) -> Path:
        """The path of the result of a full training: a folder."""
        return self.folder / MODEL

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.folder / CHECKPOINTS

    @property
    def samples(self) -> Path:
        """The folder of preview images."""
        return self.folder / SAMPLES

    @property
    def holds_lock(self) -> bool:
        """Whether this process has the lock and writes here."""
        return self._lock is not None

    @property
    def report(self) -> Path:
        """The report, written after the weights."""
        return self.folder / REPORT

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Writes run.json, unless it exists: a resumed run keeps its first one.

        That of a queued run, which has no hashes and versions, is replaced.
        """
        path = self.folder / RECORD
        exists = os.path.lexists(path) and record_of(self.folder).get(BEGUN) is not False
        if self._lock is None or exists:
            return
        text = json.dumps({"program": PROGRAM, **facts}, indent=2, ensure_ascii=False, default=str)
        with atomic_file(path) as file:
            file.write(text.encode())
        self._described = True

    def complete(self) -> None:
        """Points `outputs/latest` to this run; called when its weights.zip is complete."""
        outputs, folder = self._outputs, self.folder.resolve()
        link = outputs / LATEST
        if self._lock is None or outputs not in folder.parents or folder == link:
            return
        if os.path.lexists(link) and not _is_our_link(link):
            log.warning("%s is not a link created by a run; it is left unchanged", _shown(link))
            return
        new = outputs / f".{LATEST}.{secrets.token_hex(4)}.part"
        try:
            new.symlink_to(folder.relative_to(outputs), target_is_directory=True)
            os.replace(new, link)
        except OSError as error:
            with suppress(OSError):
                new.unlink(missing_ok=True)
            place = self.folder
            log.warning("cannot create %s (%s); the result is in %s", _shown(link), error, place)

    def close(self) -> None:
        """Releases the lock. Removes the folder of a run that has written nothing."""
        held, self._lock = self._lock, None
        if held is None:
            return
        try:
            self.events.close()
            remove_if_empty(self.folder / COMMANDS)
            kept = found_in(self.folder, DESCRIPTIONS) or os.path.lexists(self.folder / TRACKERS)
            if held.is_new and not kept:
                remove_descriptions(self.folder, DESCRIPTIONS if self._described else (EVENTS,))
                if self.log is not None:
                    self.log.unlink(missing_ok=True)
                held.remove()
                if self._made:
                    for folder in (self.checkpoints, self.samples, *self._made):
                        remove_if_empty(folder)
        except OSError as error:  # must not replace the run's own error
            log.warning("%s could not be cleaned up: %s", self.folder, error)
        finally:
            held.release()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[type["Run"], tuple[Path]]:
        return Run, (self.folder,)


def open_run(
    dataset: Path,
    output_dir: Path | None = None,
    resume_from: Path | None = None,
    name: str | None = None,
    served: bool = False,
) -> Run:
    """Opens and locks the folder of a new run, or of the run that `resume_from` continues.

    `output_dir` is the run's own folder. Without it, a run resumed from a checkpoint continues in
    the checkpoint's run folder; any other run gets `outputs/DATE-NAME-NN`. A server's run
    (`served`) always gets a new folder, and the server's old runs are removed first.

    Raises `FolderRefused` if the folder contains another run or is in use by another process, and
    OSError if it is not writable.
    """
    continued = _continued(resume_from) if resume_from is not None and not served else []
    own = next((each for each in continued if record_of(each)), None)
    root = None
    if output_dir is not None:
        folder, made = _given(output_dir)
    elif own is not None:
        folder, made = _shown(own), []
    else:
        root = _root()
        folder, made = new_folder(root, name or name_of(dataset))
    held = None
    try:
        if not folder.is_dir():
            raise FolderRefused(f"output_dir: {folder} is not a folder; choose another")
        held = Lock.take(folder, served)
        if folder.resolve() in continued:
            remove_parts(folder)
        elif held.handed_down:
            refuse_another_run(folder, DESCRIPTIONS)
        else:
            forget_if_nothing_was_done(folder)
            refuse_another_run(folder)
        if served and root is not None:
            remove_old_runs(root, but=folder)
    except BaseException:
        if held is not None:
            if held.is_new:
                held.remove()
            held.release()
        for each in made:
            remove_if_empty(each)
        raise
    log.info("the run's folder is %s", folder)
    return Run(folder, held, made, continued=folder.resolve() in continued)


# ---- Choosing the folder -------------------------------------------------------------------------


def _root() -> Path:
    """`outputs/`, created later, or a temporary folder if it would not be writable."""
    if os.path.lexists(OUTPUTS) and not OUTPUTS.is_dir():
        raise FolderRefused(f"{OUTPUTS} is not a folder; move it away, or give output_dir")
    place = OUTPUTS if OUTPUTS.is_dir() else Path()
    if os.access(place, os.W_OK | os.X_OK):
        return OUTPUTS
    folder = _temporary()
    log.warning("%s is not writable; the results are written to %s", place.resolve(), folder)
    return folder


@cache
def _temporary() -> Path:
    """The temporary folder for all runs of this process."""
    return Path(tempfile.mkdtemp(prefix="zeroprior-training-"))


def new_folder(root: Path, name: str) -> tuple[Path, list[Path]]:
    """Creates `DATE-NAME-NN`. Returns it and all created folders, itself first."""
    stem = f"{time.strftime('%Y-%m-%d')}-{name}-"
    counted = re.compile(re.escape(stem) + r"(\d+)", re.ASCII)
    numbers = [int(found[1]) for each in listed(root) if (found := counted.fullmatch(each.name))]
    number = max(numbers, default=0) + 1
    parents: list[Path] = []
    while True:
        folder = root / f"{stem}{number:02d}"
        try:
            folder.mkdir()  # atomic: only one process succeeds
            return folder, [folder, *parents]
        except FileExistsError:
            number += 1
        except FileNotFoundError:
            parents = _make(root)


def _given(output_dir: Path) -> tuple[Path, list[Path]]:
    """Creates the user's folder. Returns it and all created folders. Raises `FolderRefused`."""
    try:
        folder, real = _without_links(output_dir), output_dir.resolve()
        for place in (real, *real.parents):  # the other run may remove these folders
            if place.name in PLACES and record_of(place.parent):
                raise FolderRefused(
                    f"output_dir: {folder} is in {place.name} of another run; choose another"
                )
        return folder, _make(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: a link loop
        reason = getattr(error, "strerror", None) or str(error)
        raise FolderRefused(
            f"output_dir: {output_dir} cannot be created ({reason}); choose another"
        ) from error


def _make(folder: Path) -> list[Path]:
    """Creates a folder and its parents. Returns the created ones, itself first."""
    missing = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    with suppress(FileExistsError):
        folder.mkdir(parents=True, exist_ok=True)
    return missing


def name_of(dataset: Path) -> str:
    """The dataset's name in ASCII letters, digits and hyphens; `run` if nothing is left."""
    name = bare_name(Path(os.path.abspath(dataset)))
    if _TEMPORARY.fullmatch(name):
        name = ""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9]+", "-", plain).strip("-")[:40].rstrip("-") or "run"


def _continued(resume_from: Path) -> list[Path]:
    """The run folders of a checkpoint or checkpoints folder; none for other weights.

    There are two if `checkpoints` is a link to another disk.
    """
    named, real = Path(os.path.abspath(resume_from)), resume_from.resolve()
    found = []
    for path in (real, named) if named.is_dir() or not named.is_symlink() else (real,):
        if path.name == CHECKPOINTS and path.is_dir():
            found.append(path.parent.resolve())
        elif path.suffix == ".safetensors" and path.parent.name == CHECKPOINTS:
            found.append(path.parent.parent.resolve())
    return found


def _without_links(folder: Path) -> Path:
    """The folder without links: `outputs/latest` may change during the run."""
    real = folder.resolve()
    return folder if real == Path(os.path.abspath(folder)) else real


def _shown(path: Path) -> Path:
    """The path relative to the working folder if it is below it."""
    here = Path.cwd().resolve()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _is_our_link(link: Path) -> bool:
    """Whether `outputs/latest` links to a run below `outputs`, which may no longer exist."""
    if not link.is_symlink():
        return False
    target = Path(os.readlink(link))
    inside = not target.is_absolute() and ".." not in target.parts
    return inside and (not link.exists() or bool(record_of(link)))
