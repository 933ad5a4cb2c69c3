"""Frees the memory of a run, also after an error."""

import ctypes
import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from families.device import empty_cache
from families.loading import default_device
from families.out_of_memory import free_frames

log = logging.getLogger(__name__)


@contextmanager
def memory_freed() -> Iterator[None]:
    """Frees memory at the end of the context, also on an error.

    Clears the traceback frames of an error, which keep the tensors of failed functions alive.
    """
    try:
        yield
    except BaseException as error:
        free_frames(error)
        raise
    finally:
        free_memory()


def free_memory() -> None:
    """Frees reference cycles, and returns freed memory to the system and the GPU.

    On Cog's server, runs use several threads, and glibc keeps freed memory for each thread:
    hundreds of MB with the miniature.
    """
    gc.collect()
    if (device := default_device()).type != "cpu":
        try:
            empty_cache(device)
            getattr(torch._C, "_host_emptyCache", lambda: None)()  # pinned CPU memory
        except RuntimeError as error:  # after some errors every call to the GPU fails
            log.warning("the GPU's memory cannot be freed: %s", error)
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
