"""Tensors that are kept in a temporary file and read as they are used."""

from typing import Generic, TypeVar

import torch
from torch import Tensor

from trainer.data import MappedFile

Key = TypeVar("Key")


class Tensors(Generic[Key]):
    """Tensors of any device, shape and type, in a `MappedFile`."""

    def __init__(self, what: str) -> None:
        self._file = MappedFile(what)
        self._kept: dict[Key, tuple[slice, torch.dtype, torch.Size]] = {}

    def add(self, key: Key, value: Tensor) -> None:
        """Copies it. Raises `NoRoom`."""
        data = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        self._kept[key] = self._file.add(data), value.dtype, value.shape

    def mapped(self) -> dict[Key, Tensor]:
        """All of them on the CPU, where they are read as they are used. Raises `NoRoom`."""
        mapped = self._file.mapped()
        return {
            key: torch.frombuffer(mapped[place], dtype=dtype).view(shape)
            for key, (place, dtype, shape) in self._kept.items()
        }
