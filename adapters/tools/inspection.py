"""Describes a LoRA file: base, layers, ranks, norms, tokens, and which programs read it."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.archive_opening import LIMITS
from adapters.files.containers import folder_members
from adapters.formats import (
    ALPHA,
    DORA,
    DOWN,
    PEFT_DORA,
    PROGRAMS,
    Found,
    as_delta,
    is_zero,
    split_key,
    verdict,
)
from adapters.tools.convert import kind_of
from adapters.tools.opened import Opened
from families.base import BARE, DIFFUSION_MODEL, KOHYA, TRANSFORMER
from families.registry import family_of

_PARTS = r"(?:lora_[AB]\.weight|lora_magnitude_vector|dora_scale|(?:lokr|hada)_w[12](?:_[ab])?)"
_STYLES = (  # of a tensor's name
    (TRANSFORMER, re.compile(rf"transformer\.(?!_orig_mod).*\.{_PARTS}")),
    (DIFFUSION_MODEL, re.compile(rf"diffusion_model\.(?!_orig_mod).*\.{_PARTS}")),
    (KOHYA, re.compile(r"lora_unet_[^_.][^.]*\.lora_(?:down|up)\.weight")),
    (
        BARE,
        re.compile(r"(?:layers|transformer_blocks|\w+_refiner)\.\d+\..*\.lora_(?:down|up)\.weight"),
    ),
)
_TRAINED = re.compile(r"ss_(?:base_model_version|network_module|num_epochs|steps|max_train_steps)")


def inspect(opened: Opened) -> dict[str, Any]:
    """All facts of a LoRA, for people (`shown`) and as JSON."""
    layers = opened.stored.layers
    ranks = Counter(len(each.parts[DOWN]) for each in layers.values() if DOWN in each.parts)
    scales = Counter(round(each.scale, 6) for each in layers.values())
    archive = opened.archive
    return {
        "file": opened.name,
        "bytes": _size(opened.path),
        "base_model": opened.base.name,
        "family": family_of(opened.base).title,
        "why": opened.why,
        "kinds": dict(Counter(kind_of(each) for each in layers.values())),
        "layers": len(opened.deltas),
        "zero_layers": sum(is_zero(each) for each in opened.deltas.values()),
        "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
        "alpha_over_rank": {f"{scale:g}": count for scale, count in sorted(scales.items())},
        "dtypes": dict(Counter(opened.stored.dtypes.values())),
        "norms": norms(opened),
        "tokens": [
            {"token": each.token, "vectors": len(each.vectors), "norm": round(each.norm(), 4)}
            for each in archive.placeholders
        ],
        "training": _training(archive.meta, opened.stored.metadata),
        "read_by": read_by(opened),
        "sha256_of_tensors": archive.lora_sha256,
    }


def _size(path: Path) -> int:
    """The bytes of a file, or of the tensor files of a folder that are read."""
    if path.is_file():
        return path.stat().st_size
    members = folder_members(path, LIMITS)
    return sum(each.size for each in members if each.name.endswith(".safetensors"))


def norms(opened: Opened) -> dict[str, float | None]:
    """The Frobenius norm of each layer's change; None where it depends on the base's weight."""
    found = {name: as_delta(each).norm() for name, each in opened.deltas.items()}
    return {name: None if size is None else round(size, 6) for name, size in found.items()}


def by_block(norms: Mapping[str, float | None]) -> dict[str, float]:
    """The root of the sum of squared norms of a block's layers, by the block's name."""
    blocks: dict[str, float] = {}
    for name, value in norms.items():
        match = re.match(r"(.*?\.\d+)\.", name)
        block = match[1] if match else name
        blocks[block] = blocks.get(block, 0.0) + (value or 0.0) ** 2
    return {block: math.sqrt(total) for block, total in blocks.items()}


def read_by(opened: Opened) -> dict[str, str]:
    """By program, whether it reads the file as it is, and why not."""
    layers = opened.stored.layers
    names = [
        key for key in opened.stored.dtypes if (split := split_key(key)) and split.part != ALPHA
    ]
    fitting = [style for style, form in _STYLES if all(form.fullmatch(key) for key in names)]
    other = {kind_of(each) for each in layers.values()} - {"LoRA"}
    if DORA in other and any("lora_magnitude_vector" in key for key in names):
        other = other - {DORA} | {PEFT_DORA}
    scaled = [
        name for name, each in layers.items() if not math.isclose(each.scale, 1, rel_tol=2**-7)
    ]
    found = Found(
        style=fitting[0] if fitting else None,
        kinds=frozenset(other),
        alpha_tensors=any(ALPHA in layers[name].parts for name in scaled),
        alpha_header=any(ALPHA not in layers[name].parts for name in scaled),
    )
    readers = family_of(opened.base).lora_readers
    return {each.title: verdict(each, readers.get(name), found) for name, each in PROGRAMS.items()}


def shown(facts: Mapping[str, Any]) -> str:
    """The facts as text, with a bar for each block's norm."""
    lines = [
        f"{facts['file']}: {facts['bytes'] / 1e6:,.1f} MB",
        f"  base      {facts['base_model']} ({facts['family']}; {facts['why']})",
        f"  kind      {_counted(facts['kinds'])}, {facts['layers']} layers"
        + (f", {facts['zero_layers']} of them zero" if facts["zero_layers"] else ""),
        f"  rank      {_counted(facts['ranks'])}",
        f"  alpha     {_counted(facts['alpha_over_rank'])} times the rank",
        f"  dtype     {_counted(facts['dtypes'])}",
    ]
    for each in facts["tokens"]:
        lines.append(
            f"  token     {each['token']}: {each['vectors']} vector(s), norm {each['norm']}; write "
            f'it in the prompt: "a photo of {each["token"]} on a beach"'
        )
    lines += [f"  {key:<9} {value}" for key, value in facts["training"].items()]
    width = max(map(len, facts["read_by"]))
    lines += ["", "Programs that read this file as it is (convert --to NAME for the others):"]
    lines += [f"  {name:<{width}}  {answer}" for name, answer in facts["read_by"].items()]
    lines += ["", "Norm of the change by block:", *_bars(by_block(facts["norms"]))]
    return "\n".join(lines)


def _bars(blocks: Mapping[str, float], width: int = 40) -> list[str]:
    most = max(blocks.values(), default=0.0) or 1.0
    names = max(map(len, blocks), default=0)
    return [
        f"  {name:<{names}} {value:9.4f} {'█' * round(width * value / most)}"
        for name, value in blocks.items()
    ]


def _counted(counts: Mapping[str, int]) -> str:
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{name} ({count})" for name, count in list(counts.items())[:8]) or "none"


def _training(meta: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, str]:
    facts = {key: str(meta[key]) for key in ("steps", "training_mode") if key in meta}
    dataset = meta.get("dataset")
    if isinstance(dataset, dict) and isinstance(dataset.get("pictures"), list):
        facts["images"] = str(len(dataset["pictures"]))
    facts |= {key: value[:80] for key, value in metadata.items() if _TRAINED.fullmatch(key)}
    return facts
