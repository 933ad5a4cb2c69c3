"""Writes safetensors files tensor by tensor: memory for one tensor, not for the whole file."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
}


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

    Raises ValueError for a tensor that is not as planned.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, each in planned.items():
        start, end = end, end + each.nbytes
        entry = {"dtype": _NAMES[each.dtype], "shape": each.shape, "data_offsets": [start, end]}
        header[name] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the tensors
    file.write(len(text).to_bytes(8, "little") + text)
    expected = iter(planned.items())
    for name, tensor in values:
        if (name, Planned(tensor.dtype, tuple(tensor.shape))) != next(expected, None):
            raise ValueError(f"{name} ({tensor.dtype}, {tuple(tensor.shape)}) is not as planned")
        content: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        file.write(content)
    if next(expected, None) is not None:
        raise ValueError("fewer tensors than planned")
