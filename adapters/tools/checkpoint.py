"""Reads the weights of a whole transformer, one tensor at a time, from an untrusted file or folder.

A folder in diffusers' layout, or one safetensors file in diffusers' or the original layout, with or
without a prefix such as `model.diffusion_model.`. Names are the model's own (diffusers').
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import IO, NamedTuple

import torch
from torch import Tensor

from adapters.files import bounded_json
from adapters.files.containers import is_container
from adapters.files.tensor_file import MAX_TENSORS, BrokenTensors, TensorFile
from adapters.files.tensor_writer import INDEX
from adapters.formats import (
    other_format,
    other_kind,
    shown,
    spellings,
    without_fronts,
    without_wrappers,
)
from adapters.tools.opened import ToolError
from families.base import Base
from families.parameters import transformer_parameters
from families.registry import family_of

_MAX_INDEX_BYTES = 16 << 20
# Ends of names that only a quantized model has.
_QUANTIZED = (
    "scale_weight",
    "weight_scale",
    "scaled_fp8",
    "comfy_quant",
    "absmax",
    "weight_format",
)
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)

_KIND = "a transformer"
_WANTED = "give a transformer's folder, or its one .safetensors file"

Shape = tuple[int, ...]


class _Place(NamedTuple):
    file: TensorFile
    key: str
    start: int  # rows: a fused tensor has those of several parameters
    stop: int


@dataclass(frozen=True)
class Checkpoint:
    """The parameters of a transformer. `read` gives one of them, in the dtype of its file."""

    source: Path
    parameters: Mapping[str, Shape]
    unused: tuple[str, ...]  # tensors that the model does not have
    places: Mapping[str, _Place]

    def read(self, name: str) -> Tensor:
        """One parameter. Raises `ToolError` if its file is truncated meanwhile."""
        place = self.places[name]
        try:
            return place.file.rows(place.key, place.start, place.stop)
        except BrokenTensors as error:
            raise ToolError(f"{self.source} {error}") from error

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a parameter in its file."""
        return self.places[name].file.dtype(self.places[name].key)


@contextmanager
def open_checkpoint(source: Path, base: Base) -> Iterator[Checkpoint]:
    """Opens the weights of a transformer of the same architecture as `base`.

    Names, shapes, dtypes and sizes are checked by the headers before any tensor is read. Raises
    `ToolError` for anything that is not the whole transformer in a floating-point type.
    """
    parameters = transformer_parameters(base)
    with ExitStack() as stack:
        places: dict[str, _Place] = {}
        unused: list[str] = []
        shapes: dict[str, Shape] = {}
        metadata: dict[str, str] = {}
        names = _Finder(parameters, base)
        for path in _files(source):
            file = stack.enter_context(path.open("rb"))
            _refuse_other_formats(file, path)
            try:
                tensors = TensorFile(file, path.stat().st_size, most_float32_bytes=inf)
            except BrokenTensors as error:
                raise ToolError(f"{path} {error}") from error
            names.refuse_quantized(tensors, path)
            unused += names.place(tensors, path, places)
            shapes |= tensors.shapes()
            metadata |= tensors.metadata
        if not places and (kind := other_kind(shapes, metadata, _KIND)):
            raise ToolError(f"{source} is {kind} of {base.name}; {_WANTED}")
        missing = parameters.keys() - places.keys()
        if missing:
            raise ToolError(
                f"{source}: {len(missing)} of {len(parameters)} weights of {base.name} are not in "
                f"it: {shown(sorted(missing))}; pass a whole transformer of this model"
            )
        yield Checkpoint(source, parameters, tuple(unused), places)


class _Finder:
    """Finds the parameters that a key in a file means."""

    def __init__(self, parameters: Mapping[str, Shape], base: Base) -> None:
        self._parameters, self._base = parameters, base
        self._spellings = spellings(parameters, family_of(base).original_names)

    def place(self, tensors: TensorFile, path: Path, places: dict[str, _Place]) -> list[str]:
        """Adds the places of a file's tensors; returns the keys that the model does not have."""
        unused = []
        odd = []
        for key, shape in tensors.shapes().items():
            targets = self._targets(key)
            if targets is None:
                unused.append(key)
                continue
            shapes = [self._parameters[target] for target in targets]
            whole = (sum(each[0] for each in shapes), *shapes[0][1:])
            if shape != whole:
                odd.append(f"{key} ({_times(shape)}, model {_times(whole)})")
                continue
            start = 0
            for target, (rows, *_) in zip(targets, shapes, strict=True):
                if target in places:
                    raise ToolError(f"{path}: {shown([key])} is the second {target}")
                places[target] = _Place(tensors, key, start, start + rows)
                start += rows
        if odd:
            raise ToolError(
                f"{path}: {len(odd)} weights have another size in {self._base.name}: {shown(odd)}"
            )
        return unused

    def refuse_quantized(self, tensors: TensorFile, path: Path) -> None:
        """Raises `ToolError` for a model whose weights are rounded too coarsely."""
        quantized = [key for key in tensors if key.endswith(_QUANTIZED)]
        whole = (key for key in tensors if tensors.dtype(key) not in _FLOATS)
        quantized += [key for key in whole if self._targets(key)]
        if quantized:
            raise ToolError(
                f"{path} is a quantized model ({shown(quantized[:1])}), whose weights are rounded "
                "too coarsely for this; pass the one in 16 or 32 bits"
            )

    def _targets(self, key: str) -> tuple[str, ...] | None:
        plain = ".".join(without_fronts(without_wrappers(key.split("."))))
        return self._spellings.get(key) or self._spellings.get(plain)


def transformer_files(folder: Path) -> Path:
    """The folder with the weights: a pipeline's folder has them in `transformer`."""
    inner = folder / "transformer"
    return inner if inner.is_dir() else folder


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise ToolError(f"{source}: no such file or folder; {_WANTED}")
    folder = transformer_files(source)
    index = folder / INDEX
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ToolError(f"{folder} contains no .safetensors file; {_WANTED}")
        return files
    files = [folder / name for name in _shards(index)]
    missing = [each.name for each in files if not each.is_file()]
    if missing:
        raise ToolError(f"{folder} lacks {shown(missing)}; download the model again")
    return files


def _shards(index: Path) -> list[str]:
    with index.open("rb") as opened:
        text = opened.read(_MAX_INDEX_BYTES + 1)
    try:
        if len(text) > _MAX_INDEX_BYTES:
            raise ValueError("it is too large")
        content = bounded_json.loads(text, 2 * MAX_TENSORS)
        names = sorted(set(content["weight_map"].values()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ToolError(f"{index} is not the index of a model ({error})") from error
    outside = [each for each in names if not isinstance(each, str) or Path(each).name != each]
    if outside:
        raise ToolError(f"{index} names files outside of its folder: {shown(map(str, outside))}")
    return names


def _refuse_other_formats(file: IO[bytes], path: Path) -> None:
    start = file.read(BLOCKSIZE)
    archive = "an archive (zip, tar or gzip), not a transformer" if is_container(start) else None
    if kind := archive or other_format(start[:64], _KIND):
        raise ToolError(f"{path} is {kind}; {_WANTED}")


def _times(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "a number"
