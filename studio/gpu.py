"""The GPU's name, memory and owner, without PyTorch and without a context on it."""

import ctypes
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

from families import gpu_lock
from families.base import Base
from families.registry import (
    UnknownBase,
    default_base_without_gpu,
    find_base,
    largest_that_fits,
)

log = logging.getLogger(__name__)


class _Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


@cache
def _nvml() -> Any:
    """NVIDIA's management library; None without a driver."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        return library if library.nvmlInit_v2() == 0 else None
    except OSError:
        return None


@cache
def _device() -> tuple[Any, str, str] | None:
    """Handle, name and UUID of the first visible GPU; None without one."""
    library = _nvml()
    if library is None:
        return None
    handle, text = ctypes.c_void_p(), ctypes.create_string_buffer(96)
    wanted = gpu_lock.visible()
    if wanted == "":
        return None
    index = int(wanted) if wanted is not None and wanted.isdecimal() else 0
    if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) != 0:
        return None
    library.nvmlDeviceGetName(handle, text, len(text))
    name = text.value.decode(errors="replace")
    library.nvmlDeviceGetUUID(handle, text, len(text))
    return handle, name, text.value.decode(errors="replace")


def gpu() -> dict[str, Any] | None:
    """Name, memory in bytes, and the owner of the GPU; None without one."""
    found = _device()
    if found is None:
        return None
    handle, name, uuid = found
    memory = _Memory()
    _nvml().nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    return {
        "name": name,
        "total": memory.total,
        "free": memory.free >> 24 << 24,  # coarse, so that it does not change all the time
        "owner": _owner(gpu_lock.owner(uuid)),
    }


def _owner(facts: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if facts is None:
        return None
    kind = facts.get("kind")
    return {"kind": kind if kind in ("run", "generator") else "other", "id": facts.get("id")}


_reservations = 0


@contextmanager
def reserved() -> Iterator[None]:
    """For a process that is starting, and takes the lock once it has loaded PyTorch."""
    global _reservations
    _reservations += 1
    try:
        yield
    finally:
        _reservations -= 1


def is_free() -> bool:
    """Whether nobody owns the GPU, or is about to; true without one."""
    found = _device()
    return found is None or (not _reservations and gpu_lock.owner(found[2]) is None)


def automatic_base() -> Base:
    """The base model of `auto`, by the GPU's whole memory."""
    import os

    if named := os.environ.get("BASE_MODEL"):
        with suppress(UnknownBase):  # a folder, which only the command line takes
            return find_base(named)
    found = gpu()
    if found is None:
        return default_base_without_gpu()
    return largest_that_fits("training", found["total"])[0]
