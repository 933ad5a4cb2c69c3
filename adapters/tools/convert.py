"""Writes a LoRA in the layout that another program reads."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from adapters.comfyui import embedding_files, how_to_write
from adapters.files.atomic import atomic_file, atomic_path
from adapters.formats import (
    ALPHA,
    DORA,
    DOWN,
    MAGNITUDE,
    PEFT_DORA,
    PROGRAMS,
    UP,
    Program,
    StoredLayer,
    completed,
)
from adapters.tools.opened import Opened, ToolError, how_to_make_plain
from adapters.tools.outputs import check_files
from families.base import BARE, DIFFUSION_MODEL, KOHYA, TRANSFORMER, LoraReader
from families.registry import family_of

PREFIXES = {
    TRANSFORMER: "transformer.",
    DIFFUSION_MODEL: "diffusion_model.",
    BARE: "",
    KOHYA: "lora_unet_",
}
BIAS = "lora_B.bias"
# How ComfyUI and ai-toolkit name the parts of other kinds; those of LoKr and LoHa are the same.
_NAMES = {
    DOWN: "lora_down.weight",
    UP: "lora_up.weight",
    MAGNITUDE: "dora_scale",
}

_PEFT_NAMES = {
    DOWN: "lora_A.weight",
    UP: "lora_B.weight",
    MAGNITUDE: "lora_magnitude_vector",
}
_NORMS = (
    "ComfyUI divides the rows of a DoRA by the norms of the base's weight, not of the changed one "
    "(by its source): they are longer there by what the LoRA adds to them"
)


@dataclass(frozen=True)
class Converted:
    """The content of a converted file, and what a user should know of it."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    rounded: int = 0  # layers whose B had to be rounded once, since alpha / rank is no power of two
    layers: int = 0
    embeddings: Mapping[str, bytes] = field(default_factory=dict)  # by file name
    notes: tuple[str, ...] = ()


def convert(opened: Opened, program_name: str) -> Converted:
    """The same LoRA for another program. Raises `ToolError` for a kind that it does not read."""
    program, reader = _program(program_name, opened)
    style = reader.writes
    layers = opened.stored.layers
    pairs: dict[str, tuple[Tensor, Tensor, float]] = {}
    tensors: dict[str, Tensor] = {}
    for written, layer in layers.items():
        targets = opened.layout.find(written)
        if targets is None:  # a change of a bias or norm, by the name of its layer
            targets = (written,)
        if layer.parts.keys() <= {DOWN, UP, ALPHA}:
            pairs |= _split(layer, targets, opened)
        else:
            tensors |= _other_kind(written, layer, targets, program, style, opened)
    rounded = 0
    ranks = set()
    plain = {name: (down, up) for name, (down, up, _) in pairs.items()}
    for name, (down, up) in completed(plain).items():
        scale = pairs[name][2] if name in pairs else 1.0
        ranks.add(len(down))
        where = PREFIXES[style] + (name.replace(".", "_") if style == KOHYA else name)
        if style in (KOHYA, BARE):
            tensors[f"{where}.lora_down.weight"] = down.contiguous()
            tensors[f"{where}.lora_up.weight"] = up.contiguous()
            tensors[f"{where}.alpha"] = torch.tensor(scale * len(down), dtype=torch.float32)
            continue
        folded = up if scale == 1 else (up.double() * scale).to(up.dtype)
        rounded += not torch.equal(folded.double(), up.double() * scale)
        tensors[f"{where}.lora_A.weight"] = down.contiguous()
        tensors[f"{where}.lora_B.weight"] = folded.contiguous()
    embeddings = {}
    if reader.embedding:
        embeddings = embedding_files(opened.archive.placeholders)
    metadata = {"format": "pt", **_metadata(opened, style, ranks, plain)}
    notes = _notes(opened, program, reader, list(embeddings))
    return Converted(tensors, metadata, rounded, len(layers), embeddings, notes)


def write(converted: Converted, path: Path, overwrite: bool = False) -> list[Path]:
    """Writes the LoRA to `path`, and embeddings into the same folder; returns all files.

    Raises `ToolError` as `check_files` does, before any is written.
    """
    embeddings = {path.parent / name: data for name, data in converted.embeddings.items()}
    files = [path, *embeddings]
    check_files(files, overwrite)
    with atomic_path(path) as part:
        save_file(dict(converted.tensors), part, metadata=dict(converted.metadata))
    for file, data in embeddings.items():
        with atomic_file(file) as opened:
            opened.write(data)
    return files


def _program(name: str, opened: Opened) -> tuple[Program, LoraReader]:
    readers = family_of(opened.base).lora_readers
    known = [each for each in PROGRAMS if each in readers]
    if name not in known:
        raise ToolError(
            f"{name}: for {opened.base.name} there are the programs {', '.join(known) or 'none'}"
        )
    return PROGRAMS[name], readers[name]


def _split(
    layer: StoredLayer, targets: tuple[str, ...], opened: Opened
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A, B and scale of each of the model's layers that a stored layer covers."""
    down, up = layer.parts[DOWN], layer.parts[UP]
    if len(targets) == 1:
        return {targets[0]: (down, up, layer.scale)}
    rows = [opened.layout.shapes[target][0] for target in targets]
    parts = zip(targets, up.split(rows), strict=True)
    # Copies: a safetensors file cannot contain one tensor twice.
    return {target: (down.clone(), part.clone(), layer.scale) for target, part in parts}


def _other_kind(
    written: str,
    layer: StoredLayer,
    targets: tuple[str, ...],
    program: Program,
    style: str,
    opened: Opened,
) -> dict[str, Tensor]:
    kind = kind_of(layer)
    peft = kind == DORA and PEFT_DORA in program.forms
    if not (kind in program.forms or peft) or len(targets) > 1:
        why = "does not read" if kind not in program.forms else "has no name for the fused layer of"
        raise ToolError(
            f"{written} is {kind}, which {program.title} {why}; {how_to_make_plain(opened)}"
        )
    where = PREFIXES[style] + (targets[0].replace(".", "_") if style == KOHYA else targets[0])
    parts = dict(layer.parts)
    if BIAS in parts:  # no other program reads PEFT's name; `diff_b` is not scaled
        parts["diff_b"] = parts.pop(BIAS) * layer.scale
    if DOWN in parts and ALPHA not in parts and layer.scale != 1:
        parts[ALPHA] = torch.tensor(layer.scale * len(parts[DOWN]))
    if MAGNITUDE in parts:  # PEFT's norms have one dimension, those of others are a column
        norms = parts[MAGNITUDE]
        parts[MAGNITUDE] = norms.flatten() if peft else norms if norms.ndim > 1 else norms[:, None]
        if peft and parts[MAGNITUDE].numel() != len(parts[UP]):
            raise ToolError(
                f"{written} has norms of columns, which {program.title} does not read; "
                f"{how_to_make_plain(opened)}"
            )
    names = _PEFT_NAMES if peft else _NAMES
    return {f"{where}.{names.get(part, part)}": each for part, each in parts.items()}


def kind_of(layer: StoredLayer) -> str:
    """The kind of a layer's change, as in `programs.Program.forms`."""
    parts = layer.parts
    if MAGNITUDE in parts:
        return DORA
    for start, kind in (("lokr", "LoKr"), ("hada", "LoHa")):
        if any(part.startswith(start) for part in parts):
            return kind
    return "LoRA" if parts.keys() <= {DOWN, UP, ALPHA} else "a whole change"


def _metadata(
    opened: Opened, style: str, ranks: set[int], pairs: Mapping[str, object]
) -> dict[str, str]:
    facts = {"base_model": opened.base.hub_id, **opened.base.license_facts}
    facts = {f"zeroprior.{key}": value for key, value in facts.items()}
    if opened.archive.tokens:
        facts["zeroprior.placeholder_token"] = " ".join(opened.archive.tokens)
    if style == TRANSFORMER and len(ranks) == 1:  # diffusers requires the layers in it
        (rank,) = ranks
        settings = {"r": rank, "lora_alpha": rank, "target_modules": sorted(pairs)}
        peft = {f"transformer.{name}": value for name, value in settings.items()}
        facts["lora_adapter_metadata"] = json.dumps(peft)
    return facts


def _notes(
    opened: Opened, program: Program, reader: LoraReader, files: list[str]
) -> tuple[str, ...]:
    notes = [reader.note] if reader.note else []
    if program is PROGRAMS["comfyui"] and DORA in map(kind_of, opened.stored.layers.values()):
        notes.append(_NORMS)
    tokens = opened.archive.tokens
    if files:
        notes.append(f"copy {', '.join(files)} to models/embeddings")
        notes += how_to_write(opened.archive.placeholders)
    elif tokens:
        notes.append(
            f"{program.title} has no place for the token {' '.join(tokens)}: its embedding is not "
            "in the file, so a prompt there has no word for the subject"
        )
    return tuple(notes)
