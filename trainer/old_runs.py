"""Removes the old runs of a server, which each have a folder. Does not import PyTorch."""

import logging
import time
from contextlib import suppress
from pathlib import Path

from trainer import lock
from trainer.lock import Lock
from trainer.run_files import WEIGHTS, listed, record_of, remove_run

log = logging.getLogger(__name__)

# Limits for the old runs that a server keeps besides the newest complete one. A day: a client that
# did not wait for the answer can get the result. Twenty: weights of rank 32 for the 20 B model have
# 0.6 GB, more with checkpoints, and must not fill the disk.
KEPT_SECONDS = 24 * 3600
KEPT_RUNS = 20


def remove_old_runs(root: Path, but: Path) -> None:
    """Removes a server's runs beyond the limits above; never one that is in use.

    The newest complete one is kept. Other files in a run's folder are kept, and so is the folder.
    """
    ours = []
    for folder in listed(root):
        if folder.is_symlink() or folder == but:
            continue
        with suppress(OSError):  # not readable, or removed by another server
            files = listed(folder)
            unfinished = [each.name for each in files] == [lock.NAME]  # killed at its start
            if record_of(folder).get("served") is True or unfinished:
                ours.append((max(each.lstat().st_mtime for each in (folder, *files)), folder))
    ours.sort(reverse=True)
    newest = next((folder for _, folder in ours if (folder / WEIGHTS).is_file()), None)
    for number, (last, folder) in enumerate(ours, start=2):  # `but` is the first
        old = number > KEPT_RUNS or time.time() - last > KEPT_SECONDS
        held = Lock.take_free(folder) if old and folder != newest else None
        if held is None:
            continue
        try:
            if held.holder().get("served") is True:  # and it was not resumed by hand
                remove_run(folder)
                log.info("removed the old run %s", folder)
        except OSError as error:
            log.warning("the old run %s cannot be removed: %s", folder, error)
        finally:
            held.release()
