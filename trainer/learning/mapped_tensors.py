"""Tensors in a memory-mapped temporary file."""

from typing import Generic, TypeVar

import torch
from torch import Tensor

from trainer.data import MappedFile

Key = TypeVar("Key")


class Tensors(Generic[Key]):
    """Tensors of any device, shape and dtype, in a `MappedFile`."""

    def __init__(self, what: str) -> None:
        self._file = MappedFile(what)
        self._kept: dict[Key, tuple[slice, torch.dtype, torch.Size]] = {}

    def add(self, key: Key, value: Tensor) -> None:
        """Copies a tensor to the file. Raises `NoSpace`."""
        data = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        self._kept[key] = self._file.add(data), value.dtype, value.shape

    def mapped(self) -> dict[Key, Tensor]:
        """All tensors, memory-mapped on the CPU. Raises `NoSpace`."""
        mapped = self._file.mapped()
        return {
            key: torch.frombuffer(mapped[place], dtype=dtype).view(shape)
            for key, (place, dtype, shape) in self._kept.items()
        }
