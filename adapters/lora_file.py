"""LoRA files: one layout is written, every known one is read.

Written: `transformer.<layer>.lora_A.weight` and `.lora_B.weight`, bfloat16, one rank, alpha folded
into B, no alpha keys: the layout that diffusers, ComfyUI, ai-toolkit, musubi-tuner and OneTrainer
all read at the right strength.
Read: what `adapters.lora_formats` lists, alpha as a tensor, in the header (`adapters.lora_header`),
or absent (then alpha = rank), under the names that `adapters.layout` finds in the model.
`docs/formats.md` has the table. Anything else is refused by name; nothing is skipped.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import IO

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import pad

from adapters.deltas import Delta, Deltas
from adapters.factors import Factors, rank_of, shown
from adapters.lora_formats import ALPHA, DOWN, MAGNITUDE, Fault, read_layer, split_key
from adapters.lora_header import BadHeader, Header
from adapters.tensor_file import BrokenTensors, TensorFile

_WRITTEN = torch.bfloat16
MAX_BYTES = 8 << 30  # a rank 256 LoRA of the 20 B model is about 5 GB


class BrokenLora(ValueError):
    """A LoRA file that is damaged, incomplete, or of an unknown layout."""


def as_written(factors: Factors) -> Factors:
    """The factors as a file of them gives them back: rounded, float32."""
    return {
        layer: (down.to(_WRITTEN).float(), up.to(_WRITTEN).float())
        for layer, (down, up) in factors.items()
    }


def lora_bytes(factors: Factors, metadata: Mapping[str, str]) -> bytes:
    """The safetensors file of a LoRA, in the one layout that is written.

    Layers of a lower rank are padded with zeros to the largest, which changes nothing.
    """
    rank = rank_of(factors)
    tensors = {}
    for layer, (down, up) in factors.items():
        more = rank - len(down)
        down, up = pad(down, (0, 0, 0, more)), pad(up, (0, more))
        tensors[f"transformer.{layer}.lora_A.weight"] = down.to(_WRITTEN).contiguous()
        tensors[f"transformer.{layer}.lora_B.weight"] = up.to(_WRITTEN).contiguous()
    # PEFT's settings; diffusers takes them as they are, so the layers have to be among them.
    settings = {"r": rank, "lora_alpha": rank, "target_modules": sorted(factors)}
    peft = {f"transformer.{name}": value for name, value in settings.items()}
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(peft), **metadata}
    return save(tensors, metadata=header)


def open_tensors(file: IO[bytes], size: int, source: str) -> TensorFile:
    """The tensors of an open safetensors file, none of them read yet. Raises `BrokenLora`."""
    if size > MAX_BYTES:
        raise BrokenLora(f"{source} has {size:,} bytes; {MAX_BYTES:,} is the most")
    file.seek(0)
    start = file.read(min(size, 64))
    if start.startswith(b"version https://git-lfs"):
        raise BrokenLora(f"{source} is a Git-LFS pointer, not the file itself; run `git lfs pull`")
    # A safetensors file has the length of its header in front of "{", and may begin with any byte.
    if start.lstrip()[:1] == b"<" and start[8:9] != b"{":
        raise BrokenLora(f"{source} is a web page, not a LoRA; is the link public?")
    if start[:1] == b"\x80" and start[8:9] != b"{":
        raise BrokenLora(f"{source} is a pickle, which may run code; convert it to safetensors")
    try:
        return TensorFile(file, size)
    except BrokenTensors as error:
        raise BrokenLora(f"{source} {error}") from error


def read_tensors(
    file: str | PathLike[str], source: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file and its header's metadata. Raises `BrokenLora`."""
    path = Path(file)
    with path.open("rb") as opened:
        tensors = open_tensors(opened, path.stat().st_size, source)
        try:
            return dict(tensors), tensors.metadata
        except BrokenTensors as error:
            raise BrokenLora(f"{source} {error}") from error


def read_deltas(
    tensors: TensorFile, source: str, check: Callable[[Deltas], None] | None = None
) -> dict[str, Delta]:
    """`parse_deltas` of a file, by its header first, then layer by layer.

    `check` is given the changes as the header describes them, on the meta device, before a tensor
    is read, and raises for what is not wanted. Raises `BrokenLora`.
    """
    planned = parse_deltas(tensors.planned(), tensors.metadata, source)
    if check is not None:
        check(planned)
    try:
        return parse_deltas(tensors, tensors.metadata, source)
    except BrokenTensors as error:
        raise BrokenLora(f"{source} {error}") from error


def parse_deltas(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str
) -> dict[str, Delta]:
    """What a LoRA file changes, in float32, by the names it gives the layers.

    `adapters.layout.Layout.fit` finds the layers of the model. Each tensor is taken once, all of a
    layer together. Raises `BrokenLora` naming every fault.
    """
    layers: dict[str, dict[str, str]] = {}
    faults = []
    for key in tensors:
        split = split_key(key)
        if split is None:
            faults.append(f"{key} is not a LoRA tensor this reader knows")
            continue
        layer, part = split
        keys = layers.setdefault(layer, {})
        if part in keys:
            faults.append(f"{key} is the second {part} of {layer}")
        keys[part] = key

    try:
        header = Header.read(metadata)
    except BadHeader as error:
        # Where every layer has an alpha of its own, nobody asks the header.
        if not all(ALPHA in keys for keys in layers.values()):
            raise BrokenLora(f"{source}: {error}") from error
        header = Header()
    deltas: dict[str, Delta] = {}
    for layer, keys in sorted(layers.items()):
        try:
            if header.dora and DOWN in keys and MAGNITUDE not in keys:
                raise Fault("has no lora_magnitude_vector, the file's header says DoRA")
            parts = {part: tensors[key] for part, key in keys.items()}
            for kind, delta in read_layer(parts, partial(header.scale, layer)).items():
                deltas[layer + kind] = delta
        except (Fault, BadHeader) as error:
            faults.append(f"{layer} {error}")
    if faults:
        raise BrokenLora(f"{source}: {shown(faults, '; ')}")
    if not deltas:
        raise BrokenLora(f"{source} holds no LoRA tensors")
    return deltas


def parse_lora(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> Factors:
    """`parse_deltas` of a file that holds plain LoRA and nothing else; else `BrokenLora`."""
    return plain_factors(parse_deltas(tensors, metadata, source), source)


def plain_factors(deltas: Deltas, source: str) -> Factors:
    """The (A, B) pairs of a plain LoRA. Raises `BrokenLora` where something else is among them."""
    other = [name for name, delta in deltas.items() if not isinstance(delta, tuple)]
    if other:
        raise BrokenLora(f"{source} is not plain LoRA in {len(other)} layers: {shown(other)}")
    return {name: delta for name, delta in deltas.items() if isinstance(delta, tuple)}
