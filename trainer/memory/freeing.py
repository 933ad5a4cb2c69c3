"""Frees the memory that a run took, however it ends."""

import ctypes
import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from families.out_of_memory import free_frames

log = logging.getLogger(__name__)


@contextmanager
def memory_freed() -> Iterator[None]:
    """When the block ends, by an error or not, the memory that it took is free.

    The frames of an error are emptied, since they keep all that the failed functions worked with.
    """
    try:
        yield
    except BaseException as error:
        free_frames(error)
        raise
    finally:
        free_memory()


def free_memory() -> None:
    """Frees what is left in reference cycles, and returns it to the system, or to the GPU.

    On Cog's server, runs use several threads in turn, and glibc keeps what is freed for the thread
    that had it: hundreds of MB, with the miniature.
    """
    gc.collect()
    if torch.cuda.is_available():
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:  # after some errors the GPU answers nothing else
            log.warning("the GPU's memory is not given back: %s", error)
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
