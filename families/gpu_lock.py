"""The lock of a GPU: one owner at a time, a training run or a generator. Does not import PyTorch.

The lock is `flock` on `gpu-UUID.lock` in the user's runtime folder, released by the system when
its process ends. It is advice: who finds it taken says so, and may use the GPU nevertheless.
"""

import fcntl
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def visible() -> str | None:
    """The first GPU of CUDA_VISIBLE_DEVICES; empty: none is used; None: all are visible."""
    if os.environ.get("DEVICE") not in (None, "", "cuda"):
        return ""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    return value if value is None else value.split(",")[0].strip()


def path_of(uuid: str) -> Path:
    """The lock's file."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(runtime) if runtime else Path(tempfile.gettempdir(), f"zeroprior-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    name = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
    return folder / f"gpu-{name.removeprefix('GPU-')}.lock"


class GpuLock:
    """The lock of one GPU, held until `release` or the end of the process."""

    def __init__(self, uuid: str, kind: str, identity: str) -> None:
        """kind: run or generator; identity: the run's folder. Taken by `take`."""
        self._uuid, self._facts = uuid, {"kind": kind, "id": identity, "pid": os.getpid()}
        self._fd: int | None = None

    def take(self) -> bool:
        """Takes the lock if it is free; whether it is held now."""
        if self._fd is not None:
            return True
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(path_of(self._uuid), flags, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            return False
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(self._facts).encode(), 0)
        self._fd = fd
        return True

    def release(self) -> None:
        """Releases the lock, if it is held."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def own_gpu(kind: str, identity: str) -> GpuLock | None:
    """Takes the lock of this process's GPU, with a warning if it is taken; None without a GPU, and
    for one that has no lock (Apple's)."""
    import torch

    from families.loading import default_device

    if default_device().type != "cuda":
        return None
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    lock = GpuLock(uuid, kind, identity)
    try:
        if not lock.take():
            facts = owner(uuid) or {}
            log.warning(
                "the GPU is also used by a %s (%s, process %s); memory may be too small for both",
                *(facts.get("kind", "program"), facts.get("id", "?"), facts.get("pid", "?")),
            )
    except OSError as error:  # no runtime folder, or one that is not writable
        log.warning("the GPU cannot be locked: %s", error)
    return lock


def owner(uuid: str) -> dict[str, Any] | None:
    """Who holds the lock: kind, id and pid; None if nobody does."""
    try:
        fd = os.open(path_of(uuid), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except OSError:
        try:
            facts = json.loads(os.pread(fd, 4096, 0))
        except ValueError:
            facts = {}
        return facts if isinstance(facts, dict) else {}
    finally:
        os.close(fd)
