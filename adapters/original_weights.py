"""Keeps the original weights of a base model, in whichever memory is free.

A weight is saved before its first change: on its device, else in CPU memory (pinned for a GPU),
else not at all: then it is read again from the checkpoint, which safetensors memory-maps.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from families.memory import free_and_total
from families.pinned import pinned


class OriginalWeights:
    """Original weights of one model by name."""

    def __init__(
        self, given: Mapping[str, Tensor] | None = None, checkpoint: Path | None = None
    ) -> None:
        """`given` are saved already; `checkpoint` is the model's folder or its single file."""
        self._kept: dict[str, Tensor] = dict(given or {})
        self._in_checkpoint: dict[str, str] = {}  # the checkpoint's keys
        self._checkpoint = _Checkpoint(checkpoint) if checkpoint is not None else None
        self._spare: dict[str, int] = {}  # free bytes at the last query minus copies, by device

    def __contains__(self, name: str) -> bool:
        return name in self._kept or name in self._in_checkpoint

    def remember(self, name: str, key: str, weight: Tensor) -> None:
        """Saves a weight before it is changed; `key` is its name in the checkpoint."""
        if name in self:
            return
        place = "device" if self._fits(weight.device, weight.nbytes) else "cpu"
        if weight.device.type == "cpu" or place == "cpu":
            place = "cpu" if self._fits(torch.device("cpu"), weight.nbytes) else "checkpoint"
        # Only if it equals the weight, which may have been changed after loading.
        if place == "checkpoint" and self._checkpoint is not None:
            stored = self._checkpoint.read(key)
            if stored is not None and torch.equal(stored.to(weight), weight):
                self._in_checkpoint[name] = key
                return
        if place == "device" or weight.device.type == "cpu":
            self._kept[name] = weight.detach().clone()
        else:
            self._kept[name] = pinned(weight)

    def copy_to(self, name: str, weight: Tensor) -> None:
        """Sets a weight to its original value."""
        weight.copy_(self._stored(name), non_blocking=True)

    def get(self, name: str, like: Tensor) -> Tensor:
        """An original weight with the dtype and device of `like`. Do not change it."""
        kept = self._stored(name)
        if kept.device != like.device or kept.dtype != like.dtype:
            kept = kept.to(like.device, like.dtype, non_blocking=True)
        return kept

    def _stored(self, name: str) -> Tensor:
        kept = self._kept.get(name)
        if kept is None:
            assert self._checkpoint is not None
            kept = self._checkpoint.read(self._in_checkpoint[name])
            assert kept is not None
        return kept

    def _fits(self, device: torch.device, size: int) -> bool:
        """Whether a copy fits; free memory is queried again for every gigabyte."""
        spare = self._spare.get(str(device), 0)
        if spare < size:
            spare = min(_free(device), size + (1 << 30))
        self._spare[str(device)] = max(spare - size, 0)
        return spare >= size


class _Checkpoint:
    """Tensors of a model's safetensors files, by name."""

    def __init__(self, source: Path) -> None:
        self._file_of: dict[str, Path] = {}
        self._opened: dict[Path, Any] = {}
        for file in [source] if source.is_file() else _files(source):
            self._opened[file] = safe_open(file, framework="pt")
            self._file_of |= dict.fromkeys(self._opened[file].keys(), file)

    def read(self, key: str) -> Tensor | None:
        """One tensor, memory-mapped; None if the files lack it."""
        file = self._file_of.get(key)
        return None if file is None else self._opened[file].get_tensor(key)


def _files(folder: Path) -> list[Path]:
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if not indices:
        return sorted(folder.glob("*.safetensors"))
    return [
        folder / name
        for index in indices
        for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))
    ]


def _free(device: torch.device) -> int:
    """Free bytes for copies; a fifth of the memory is reserved for activations."""
    free, total = free_and_total(device)
    return free - total // 5
