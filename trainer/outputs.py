"""The folder that a training writes into, and what earlier ones left there."""

import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

WEIGHTS = "weights.zip"
CHECKPOINTS = "checkpoints"

# All that a training writes, by its own names: whatever else lies in the folder is not ours.
_WRITTEN = (
    "weights*.zip",
    "report*.html",
    "hub-*",
    "trackers",
    "samples/step-*",
    "samples/sheet.png",
    f"{CHECKPOINTS}/step-*.safetensors",
)
# Files that a process was writing when it was killed (`adapters.atomic`).
_PARTS = (".weights*.part", ".report*.part", "samples/**/.*.part", f"{CHECKPOINTS}/.step-*.part")


def default_folder() -> Path:
    """`outputs/` in the working folder where that can be written, else a temporary folder."""
    folder = Path("outputs")
    writable = os.access(folder if folder.exists() else Path.cwd(), os.W_OK)
    return folder if writable else _temporary()


@cache
def _temporary() -> Path:
    """One for all trainings of this process, so that they do not pile up."""
    return Path(tempfile.mkdtemp(prefix="zeroprior-training-"))


def make_room(folder: Path, alone: bool = False) -> None:
    """Makes the folder, and removes from it what killed trainings left half written.

    `alone` removes all that an earlier training wrote: on a server it was another customer's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in (*_PARTS, *(_WRITTEN if alone else ())):
        for found in folder.glob(pattern):
            if found.is_dir() and not found.is_symlink():
                shutil.rmtree(found)
            else:
                found.unlink(missing_ok=True)
