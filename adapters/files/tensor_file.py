"""Reads untrusted safetensors files: the header is checked before any tensor is read.

The format (https://github.com/huggingface/safetensors#format): 8 bytes with the length of the
header, the header in JSON, then the tensors without gaps. Tensors are read one at a time, so that
a conversion needs memory for one layer, not for the whole file in two dtypes.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from adapters.files import bounded_json
from adapters.files.containers import printable

# The largest LoRA files in use have 7 tensors in each of Qwen-Image's 846 layers.
MAX_TENSORS = 20_000
MAX_HEADER_BYTES = 16 << 20  # kohya's trainer writes a megabyte of caption statistics into it
MAX_NAME_LENGTH = 1000  # characters; matching a name may take quadratic time
MAX_DIMENSIONS = 8
MAX_DIMENSION = 1 << 31
# In float32, as LoRAs are kept in memory. A rank 256 LoRA of the 20 B model takes 10 GB.
MAX_FLOAT32_BYTES = 12 << 30
_VALUES = 20  # most JSON values of one tensor's entry in the header: dtype, shape, offsets, keys
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


# Called with the shapes by name and the metadata; raises to refuse the file.
Look = Callable[[Mapping[str, Sequence[int]], Mapping[str, str]], None]


class BrokenTensors(ValueError):
    """A damaged safetensors file. The message is the end of a sentence "FILE …"."""


@dataclass(frozen=True)
class _Place:
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # in the file
    stop: int


class TensorFile(Mapping[str, Tensor]):
    """The tensors of an open safetensors file by name; each access reads the tensor again.

    The caller keeps the file open and closes it. `look` is called before the dtypes and sizes of
    the tensors are checked. `most_float32_bytes` replaces the limit, for a
    file whose tensors are not kept together. Raises `BrokenTensors` for a header that is damaged
    or beyond the limits, and on access for a truncated tensor.
    """

    def __init__(
        self,
        file: IO[bytes],
        size: int,
        look: Look | None = None,
        most_float32_bytes: float | None = None,
    ) -> None:
        self._file = file
        file.seek(0)
        length = int.from_bytes(_exactly(file, 8), "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise BrokenTensors(f"is not a whole safetensors file (a header of {length:,} bytes)")
        try:
            header = bounded_json.loads(_exactly(file, length), _VALUES * MAX_TENSORS)
        except bounded_json.TooLarge as error:
            raise BrokenTensors(
                f"has a header that is too large ({error}); {MAX_TENSORS:,} tensors are the limit"
            ) from error
        except ValueError as error:
            raise BrokenTensors(
                "is not a whole safetensors file (its header is not JSON)"
            ) from error
        if not isinstance(header, dict):
            raise BrokenTensors("is not a whole safetensors file (its header is not a table)")
        self.metadata = _metadata(header.pop("__metadata__", None))
        if len(header) > MAX_TENSORS:
            raise BrokenTensors(f"has {len(header):,} tensors; {MAX_TENSORS:,} is the limit")
        longest = max(header, key=len, default="")
        if len(longest) > MAX_NAME_LENGTH:
            raise BrokenTensors(
                f"has a tensor with a name of {len(longest):,} characters ({_shown(longest)}…); "
                f"{MAX_NAME_LENGTH:,} is the limit"
            )
        if look is not None:
            look({name: _shape(each) for name, each in header.items()}, self.metadata)
        self._places = {name: _place(name, each, 8 + length) for name, each in header.items()}
        end = 8 + length
        for name, place in sorted(self._places.items(), key=lambda item: item[1].start):
            if place.start != end:
                raise BrokenTensors(
                    f"is not a whole safetensors file (a gap before {_shown(name)})"
                )
            end = place.stop
        if end != size:
            raise BrokenTensors(
                f"is not a whole safetensors file (it has {size:,} bytes, its header says {end:,})"
            )
        kept = 4 * sum(math.prod(place.shape) for place in self._places.values())
        most = MAX_FLOAT32_BYTES if most_float32_bytes is None else most_float32_bytes
        if kept > most:
            raise BrokenTensors(f"takes {kept:,} bytes in float32; {most:,} is the limit")

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        return self._read(place, place.start, place.shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of a tensor, without reading the others."""
        place = self._places[name]
        shape = (stop - start, *place.shape[1:])
        row = math.prod(place.shape[1:]) * place.dtype.itemsize
        return self._read(place, place.start + start * row, shape)

    def _read(self, place: _Place, start: int, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape) * place.dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=place.dtype)
        self._file.seek(start)
        return torch.frombuffer(_exactly(self._file, size), dtype=place.dtype).reshape(shape)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors by the header."""
        return {name: place.shape for name, place in self._places.items()}

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor by the header."""
        return self._places[name].dtype

    def planned(self) -> dict[str, Tensor]:
        """The tensors by the header, on the meta device: dtypes and shapes without values."""
        return {
            name: torch.empty(place.shape, dtype=place.dtype, device="meta")
            for name, place in self._places.items()
        }


def tensors_hash(path: str | PathLike[str]) -> str:
    """SHA-256 of a safetensors file without its header, in hexadecimal.

    It does not depend on the metadata; A1111 and Civitai (AutoV3) identify LoRAs by it.
    """
    with Path(path).open("rb") as file:
        return hash_of_tensors(file)


def hash_of_tensors(file: IO[bytes]) -> str:
    """`tensors_hash` of an open file."""
    file.seek(0)
    file.seek(8 + int.from_bytes(file.read(8), "little"))
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _metadata(written: Any) -> dict[str, str]:
    if written is None:
        return {}
    texts = isinstance(written, dict) and all(isinstance(each, str) for each in written.values())
    if not texts:
        raise BrokenTensors("is not a whole safetensors file (metadata that are not text)")
    return dict(written)


def _shape(entry: Any) -> list[int]:
    """The shape in a tensor's unchecked entry; empty if it has none."""
    shape = entry.get("shape") if isinstance(entry, dict) else None
    return shape if isinstance(shape, list) and _whole(shape) else []


def _place(name: str, entry: Any, start: int) -> _Place:
    try:
        kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        start_offset, stop_offset = offsets
    except (TypeError, KeyError, ValueError):
        raise _broken_entry(name) from None
    if len(entry) > 3 or not (isinstance(kind, str) and _whole(shape) and _whole(offsets)):
        raise _broken_entry(name)
    if kind not in _TYPES:
        raise BrokenTensors(
            f"has {_shown(name)} with the dtype {_shown(kind)}; supported dtypes are "
            f"{', '.join(_TYPES)}"
        )
    if len(shape) > MAX_DIMENSIONS or any(each > MAX_DIMENSION for each in shape):
        raise BrokenTensors(f"has {_shown(name)} with {len(shape)} dimensions, or too large ones")
    dtype = _TYPES[kind]
    if stop_offset - start_offset != math.prod(shape) * dtype.itemsize:
        raise _broken_entry(name)
    return _Place(dtype, tuple(shape), start + start_offset, start + stop_offset)


def _broken_entry(name: str) -> BrokenTensors:
    return BrokenTensors(f"is not a whole safetensors file (the entry of {_shown(name)})")


def _whole(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(each) is int and each >= 0 for each in numbers)


def _shown(name: str) -> str:
    return printable(name[:160])


def _exactly(file: IO[bytes], count: int) -> bytearray:
    """Reads `count` bytes, as a bytearray that a tensor can share."""
    data = bytearray(count)
    view, got = memoryview(data), 0
    while got < count:
        read = file.readinto(view[got:])  # type: ignore[attr-defined]
        if not read:
            raise BrokenTensors(
                f"is not a whole safetensors file (cut off {count - got:,} bytes too early)"
            )
        got += read
    return data
