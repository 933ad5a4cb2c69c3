"""Errors that mean that a device is out of memory, whichever library raises them."""

import errno
import functools
import traceback
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Inputs = ParamSpec("Inputs")
Result = TypeVar("Result")

# PyTorch's allocator raises OutOfMemoryError. Others only have a message: the driver and the
# allocator of pinned memory ("CUDA error: out of memory"), cuBLAS (CUBLAS_STATUS_ALLOC_FAILED),
# cuDNN (CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED), and PyTorch's CPU allocator. The
# system's calls raise an OSError (ENOMEM).
_MESSAGES = (
    "out of memory",
    "alloc_failed",
    "allocation_failed",
    "can't allocate memory",
    "cannot allocate memory",
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, means that a device or pinned memory is full."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        message = str(error).lower()
        if isinstance(error, RuntimeError) and any(part in message for part in _MESSAGES):
            return True
        inner = getattr(error, "inner_exception", None)  # of a failed compilation
        error = inner or error.__cause__ or error.__context__
    return False


def free_frames(error: BaseException) -> None:
    """Clears the traceback frames of an error and of the errors that caused it.

    They keep references to all tensors of the failed functions.
    """
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop()
        if each is not None and not any(each is other for other in seen):
            seen.append(each)
            traceback.clear_frames(each.__traceback__)
            waiting += [each.__cause__, each.__context__]


def without_locals(function: Callable[Inputs, Result]) -> Callable[Inputs, Result]:
    """Decorator that clears an error's frames, which would keep tensors and images alive."""

    @functools.wraps(function)
    def called(*inputs: Inputs.args, **named: Inputs.kwargs) -> Result:
        try:
            return function(*inputs, **named)
        except BaseException as error:
            free_frames(error)
            raise

    return called
