"""Writes safetensors files tensor by tensor: memory for one tensor, not for the whole file."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
}
# Bytes. Files are memory-mapped, and a CPU's kernels for other addresses add in another order:
# images of the written weights would differ from the previews in the last bit.
_ALIGNMENT = 64
_STEM, _END = "diffusion_pytorch_model", ".safetensors"  # of diffusers
INDEX = f"{_STEM}{_END}.index.json"
MAX_SHARD_BYTES = 5_000_000_000  # as published models; a single tensor is never larger


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    file: IO[bytes],
    planned: Mapping[str, Planned],
    values: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Writes the header, then each tensor as `values` yields it, in the order of `planned`.

    The first begins at a multiple of 64 bytes. Raises ValueError for a tensor that is not as
    planned.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, each in planned.items():
        start, end = end, end + each.nbytes
        entry = {"dtype": _NAMES[each.dtype], "shape": each.shape, "data_offsets": [start, end]}
        header[name] = entry
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    expected = iter(planned.items())
    for name, tensor in values:
        if (name, Planned(tensor.dtype, tuple(tensor.shape))) != next(expected, None):
            raise ValueError(f"{name} ({tensor.dtype}, {tuple(tensor.shape)}) is not as planned")
        content: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        file.write(content)
    if next(expected, None) is not None:
        raise ValueError("fewer tensors than planned")


def write_shards(
    folder: Path,
    planned: Mapping[str, Planned],
    values: Iterator[tuple[str, Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Writes a model's weights into a folder as diffusers does: one file, or shards and an index.

    Arguments as of `write_tensors`.
    """
    shards: list[dict[str, Planned]] = [{}]
    size = total = 0
    for name, each in planned.items():
        if size + each.nbytes > MAX_SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = each
        size, total = size + each.nbytes, total + each.nbytes
    count = len(shards)
    files = [f"{_STEM}-{number:05}-of-{count:05}{_END}" for number in range(1, count + 1)]
    files = files if count > 1 else [_STEM + _END]
    for name, shard in zip(files, shards, strict=True):
        with (folder / name).open("wb") as file:
            write_tensors(file, shard, islice(values, len(shard)), metadata)
    if count > 1:
        places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
