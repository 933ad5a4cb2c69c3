"""A generator without a model; and with `$SMALL_GPU`, a GPU that is only its lock.

So runs and images exclude each other in tests, as they do on a machine with a GPU.
"""

import os
from pathlib import Path
from typing import Any

from families import gpu_lock

UUID = "small"
_held: list[gpu_lock.GpuLock] = []


def own(kind: str, identity: str) -> None:
    """Takes the lock until the end of this process."""
    if "SMALL_GPU" in os.environ and not _held:
        lock = gpu_lock.GpuLock(UUID, kind, identity)
        assert lock.take(), "two processes use the GPU"
        _held.append(lock)


def replaced() -> list[tuple[Any, str, Any]]:
    """What a server of the tests has to replace: module, name and value."""
    from studio import captioner, generator, gpu, worker  # late, as trainers do not need it

    class SmallWorker(worker.Worker):
        def __init__(self, module: str, folder: Path) -> None:
            name = module.removeprefix("studio.").removesuffix("_process")
            super().__init__(f"small_{name}", folder)

    def owned() -> dict[str, Any] | None:
        if "SMALL_GPU" not in os.environ:
            return None
        owner = gpu._owner(gpu_lock.owner(UUID))
        return {"name": "small", "total": 1 << 30, "free": 0, "owner": owner}

    def is_free() -> bool:
        return "SMALL_GPU" not in os.environ or gpu_lock.owner(UUID) is None

    return [
        (generator, "Worker", SmallWorker),
        (captioner, "Worker", SmallWorker),
        (gpu, "gpu", owned),
        (gpu, "is_free", is_free),
    ]
