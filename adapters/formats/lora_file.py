"""Writes LoRA files in one layout, and reads every known layout.

Written: `<prefix>.<layer>.lora_A.weight` and `.lora_B.weight`, bfloat16, one rank, alpha folded
into B, no alpha keys; `Family.lora_prefix` is the one that most programs read (docs/adapters.md).
DoRA has also `.lora_magnitude_vector`, float32. LoKr and LoHa have LyCORIS' names (`.lokr_w1`,
`.hada_w1_a`, …) and `.alpha`, which is the rank.
Read: the tensors that `adapters.formats.lora_formats` lists, with alpha as a tensor, in the header
or in PEFT's adapter_config.json (`adapters.formats.lora_header`), or without (then alpha = rank),
under the names that `adapters.formats.layout` finds in the model. `docs/formats.md` has the table.
Any other tensor is an error that names it; nothing is skipped.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import IO

import torch
from torch import Tensor
from torch.nn.functional import pad

from adapters.files.tensor_file import BrokenTensors, Look, TensorFile
from adapters.files.tensor_writer import Planned, write_tensors
from adapters.formats.deltas import (
    DOWN,
    MAGNITUDE,
    UP,
    Delta,
    Deltas,
    Dora,
    as_delta,
    delta_of,
)
from adapters.formats.factors import Factors, shown
from adapters.formats.file_kinds import CHECKPOINT_HEADER, Shapes, other_format, other_kind
from adapters.formats.idle import completed, family_of_layers
from adapters.formats.lora_formats import ALPHA, Fault, read_layer, scale_of, split_key, unread
from adapters.formats.lora_header import BadHeader
from adapters.formats.lora_strength import Strength

# Names of parts in files, where they are others; LoKr's and LoHa's are as LyCORIS writes them.
_WRITTEN_AS = {DOWN: "lora_A.weight", UP: "lora_B.weight", MAGNITUDE: "lora_magnitude_vector"}
MAX_BYTES = 8 << 30  # a rank 256 LoRA of the 20 B model is about 5 GB


class BrokenLora(ValueError):
    """A LoRA file that is damaged, incomplete, or of an unknown layout."""


def as_written(deltas: Deltas) -> dict[str, Delta]:
    """The changes as read back from a file: rounded to its dtypes, in float32."""
    return {
        layer: delta_of(
            {part: each.to(_dtype(part)).float() for part, each in as_delta(delta).parts().items()}
        )
        for layer, delta in deltas.items()
    }


def lora_size(deltas: Deltas) -> int:
    """Bytes of the tensors that `write_lora` writes."""
    return sum(each.nbytes for each, _ in _tensors(_completed(deltas)).values())


def write_lora(file: IO[bytes], deltas: Deltas, metadata: Mapping[str, str]) -> None:
    """Writes a LoRA's safetensors file, tensor by tensor.

    Layers of a lower rank are padded with zeros to the largest, and zero pairs are added for idle
    layers (`adapters.formats.idle`); neither changes dW.
    """
    deltas = _completed(deltas)
    found = _tensors(deltas)
    header = {"format": "pt", **_peft_settings(deltas), **metadata}
    planned = {name: each for name, (each, _) in found.items()}
    write_tensors(file, planned, ((name, _as(*each)) for name, each in found.items()), header)


def _completed(deltas: Deltas) -> Deltas:
    """A plain LoRA with its idle layers; readers that need them read no other kind."""
    pairs = {name: delta for name, delta in deltas.items() if isinstance(delta, tuple)}
    return completed(pairs) if len(pairs) == len(deltas) else deltas


def _tensors(deltas: Deltas) -> dict[str, tuple[Planned, Tensor]]:
    """The tensors of a file in its order, as they are written and as they are."""
    family = family_of_layers(deltas)
    dora = any(isinstance(delta, Dora) for delta in deltas.values())
    # Of the families' prefixes, diffusers reads DoRA only under this one.
    prefix = "transformer" if family is None or dora else family.lora_prefix
    rank = _rank(deltas)
    found = {}
    for layer, delta in deltas.items():
        parts = as_delta(delta).parts()
        if DOWN not in parts:  # LyCORIS needs the alpha of LoKr and LoHa: their rank
            own = [len(parts[name]) for name in ("hada_w1_b", "lokr_w2_b") if name in parts]
            parts[ALPHA] = torch.tensor(float(*own or (1,)))
        for part, tensor in parts.items():
            shape = tuple(tensor.shape)
            if part == DOWN:
                shape = rank, shape[1]
            elif part == UP:
                shape = shape[0], rank
            elif part == MAGNITUDE:  # PEFT's have one dimension
                shape = (tensor.numel(),)
            name = f"{prefix}.{layer}.{_WRITTEN_AS.get(part, part)}"
            found[name] = Planned(_dtype(part), shape), tensor
    return dict(sorted(found.items()))


def _as(planned: Planned, tensor: Tensor) -> Tensor:
    """The tensor as it is written, padded with zeros."""
    tensor = tensor.detach().cpu().to(planned.dtype)
    if tensor.numel() < math.prod(planned.shape):
        rows, columns = planned.shape
        return pad(tensor, (0, columns - tensor.shape[1], 0, rows - len(tensor)))
    return tensor.reshape(planned.shape)


def _rank(deltas: Deltas) -> int:
    """The largest rank of the pairs A and B; 0 without any."""
    parts = (as_delta(delta).parts() for delta in deltas.values())
    return max((len(each[DOWN]) for each in parts if DOWN in each), default=0)


def _peft_settings(deltas: Deltas) -> dict[str, str]:
    """PEFT's settings of LoRA and DoRA for the header; diffusers requires the layers in them."""
    rank = _rank(deltas)
    settings = {"r": rank, "lora_alpha": rank, "target_modules": sorted(deltas)}
    if any(isinstance(delta, Dora) for delta in deltas.values()):
        settings["use_dora"] = True
    peft = {f"transformer.{name}": value for name, value in settings.items()}
    return {"lora_adapter_metadata": json.dumps(peft)} if rank else {}


def _dtype(part: str) -> torch.dtype:
    """The dtype of a part. DoRA's norms are of whole weights: bfloat16 would change these."""
    return torch.float32 if part in (MAGNITUDE, ALPHA) else torch.bfloat16


def open_tensors(file: IO[bytes], size: int, source: str, look: Look | None = None) -> TensorFile:
    """The tensors of an open safetensors file, read on access. Raises `BrokenLora`.

    `look` as in `TensorFile`; it is also called for files above the size limit.
    """
    file.seek(0)
    what = other_format(file.read(min(size, 64)))
    if what is not None:
        raise BrokenLora(f"{source} is {what}")
    too_large = f"{source} has {size:,} bytes; {MAX_BYTES:,} is the limit"
    try:
        tensors = TensorFile(file, size, look)
    except BrokenTensors as error:
        raise BrokenLora(too_large if size > MAX_BYTES else f"{source} {error}") from error
    if size > MAX_BYTES:
        raise BrokenLora(too_large)
    return tensors


def open_lora(file: IO[bytes], size: int, source: str) -> TensorFile:
    """`open_tensors` of a LoRA. Raises `BrokenLora` that names the kind of any other file."""
    return open_tensors(file, size, source, partial(refuse_other_kinds, source=source))


def read_tensors(
    file: str | PathLike[str], source: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a LoRA file and its header's metadata. Raises `BrokenLora`."""
    path = Path(file)
    with path.open("rb") as opened:
        tensors = open_lora(opened, path.stat().st_size, source)
        try:
            return dict(tensors), tensors.metadata
        except BrokenTensors as error:
            raise BrokenLora(f"{source} {error}") from error


def refuse_other_kinds(shapes: Shapes, metadata: Mapping[str, str], source: str) -> None:
    """Raises `BrokenLora` naming the kind of a file that has no tensor of a LoRA."""
    if not any(map(split_key, shapes)) or CHECKPOINT_HEADER in metadata:
        kind = other_kind(shapes, metadata)
        if kind is not None:
            raise BrokenLora(f"{source} is {kind}")


def read_deltas(
    tensors: TensorFile,
    source: str,
    check: Callable[[Deltas], None] | None = None,
    config: str | bytes | None = None,
) -> dict[str, Delta]:
    """`parse_deltas` of a file: first by its header, then layer by layer.

    `check` is called with the changes on the meta device, by the header, before any tensor is read;
    it may raise to refuse the file. Raises `BrokenLora`.
    """
    planned = tensors.planned()
    names = _Names.read(planned, tensors.metadata, source, config)
    deltas = _deltas(planned, names, source)
    if check is not None:
        check(deltas)
    try:
        return _deltas(tensors, names, source)
    except BrokenTensors as error:
        raise BrokenLora(f"{source} {error}") from error


def parse_deltas(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    source: str,
    config: str | bytes | None = None,
) -> dict[str, Delta]:
    """The changes in a LoRA file, in float32, by the file's layer names.

    `adapters.formats.layout.Layout.fit` finds the layers of the model. `config` is the text of its
    adapter_config.json. Raises `BrokenLora` that lists all faults.
    """
    return _deltas(tensors, _Names.read(tensors, metadata, source, config), source)


@dataclass(frozen=True)
class StoredLayer:
    """One layer of a LoRA file as it is stored, for conversions."""

    parts: Mapping[str, Tensor]  # by their names in `adapters.formats.lora_formats`
    scale: float  # alpha / rank of a LoRA or DoRA; 1 for other kinds, whose alpha is in `parts`


def stored_layers(
    tensors: TensorFile, source: str, config: str | bytes | None = None
) -> dict[str, StoredLayer]:
    """The tensors of a LoRA file by the file's layer names, in the file's dtype.

    For a file that `read_deltas` has read. Raises `BrokenLora`.
    """
    names = _Names.read(tensors.planned(), tensors.metadata, source, config)
    stored = {}
    for layer, keys in names.layers.items():
        parts = {part: tensors[key] for part, key in keys.items()}
        has_pair = {DOWN, UP} <= parts.keys()
        scale = scale_of(parts, partial(names.strength.scale, layer)) if has_pair else 1.0
        stored[layer] = StoredLayer(parts, scale)
    return stored


@dataclass(frozen=True)
class _Names:
    """Layers and scales of a LoRA file, before its tensors are read."""

    layers: Mapping[str, Mapping[str, str]]  # names of tensors, by layer and part
    strength: Strength
    faults: tuple[str, ...]  # unknown or duplicate names

    @classmethod
    def read(
        cls,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str],
        source: str,
        config: str | bytes | None,
    ) -> "_Names":
        """Raises `BrokenLora` for a file of another kind, or invalid settings in it."""
        refuse_other_kinds({key: each.shape for key, each in tensors.items()}, metadata, source)
        layers, faults, kohya = _layers(tensors)
        try:
            strength = Strength.read(metadata, config, layers, kohya)
        except BadHeader as error:
            raise BrokenLora(f"{source}: {error}") from error
        return cls(layers, strength, tuple(faults))


def _layers(
    keys: Iterable[str],
) -> tuple[dict[str, dict[str, str]], list[str], frozenset[str]]:
    """The parts of every layer, faults in the names, and the layers with kohya's names."""
    layers: dict[str, dict[str, str]] = {}
    faults: list[str] = []
    kohya: set[str] = set()
    adapters: dict[str, None] = {}
    for key in keys:
        split = split_key(key)
        if split is None:
            faults.append(unread(key))
            continue
        parts = layers.setdefault(split.layer, {})
        if split.adapter:
            adapters[split.adapter] = None
        if split.part in parts and len(adapters) < 2:
            faults.append(f"{key} is the second {split.part} of {split.layer}")
        if key.endswith(".lora_down.weight"):
            kohya.add(split.layer)
        parts[split.part] = key
    if len(adapters) > 1:
        faults.append(
            f"it contains {len(adapters)} adapters ({shown(adapters)}); save each as a separate "
            "file"
        )
    return layers, faults, frozenset(kohya)


def _deltas(tensors: Mapping[str, Tensor], names: _Names, source: str) -> dict[str, Delta]:
    """The changes by layer. Tensors are read layer by layer, each once."""
    deltas: dict[str, Delta] = {}
    faults = list(names.faults)
    for layer, keys in sorted(names.layers.items()):
        parts = {part: tensors[key] for part, key in keys.items()}
        try:
            for kind, delta in read_layer(parts, partial(names.strength.scale, layer)).items():
                deltas[layer + kind] = delta
            names.strength.check(layer, parts)
        except (Fault, BadHeader) as error:
            faults.append(f"{layer} {error}")
    if faults:
        raise BrokenLora(f"{source}: {shown(faults, '; ')}")
    if not deltas:
        raise BrokenLora(f"{source} contains no LoRA tensors")
    return deltas


def parse_lora(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> Factors:
    """`parse_deltas` of a plain LoRA. Raises `BrokenLora` for any other adapter."""
    return plain_factors(parse_deltas(tensors, metadata, source), source)


def plain_factors(deltas: Deltas, source: str) -> Factors:
    """The (A, B) pairs of a plain LoRA. Raises `BrokenLora` if a layer is of another kind."""
    other = [name for name, delta in deltas.items() if not isinstance(delta, tuple)]
    if other:
        raise BrokenLora(f"{source} is not a plain LoRA in {len(other)} layers: {shown(other)}")
    return {name: delta for name, delta in deltas.items() if isinstance(delta, tuple)}
