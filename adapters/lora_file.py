"""LoRA files: one layout is written, the common spellings of it are read.

Written: `transformer.<layer>.lora_A.weight` and `.lora_B.weight`, bfloat16, one rank, alpha folded
into B, no alpha keys: the layout that diffusers, ComfyUI, ai-toolkit, musubi-tuner and OneTrainer
all read at the right strength.
Read: that, and the same under `diffusion_model.` or without a prefix, with `lora_down`/`lora_up`
for `lora_A`/`lora_B`, with PEFT's `.default` before `.weight`, and with alpha as a tensor, in the
header, or absent (then alpha = rank). A layer's alpha tensor goes before the header.
Anything else is refused by name; nothing is skipped.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import pad

from adapters.factors import Factors, rank_of

_KEY = re.compile(
    r"(?:transformer\.|diffusion_model\.)?(?P<layer>.+?)\."
    r"(?:(?P<matrix>lora_A|lora_down|lora_B|lora_up)(?:\.default)?\.weight|alpha)"
)
_DOWN, _UP, _ALPHA = "lora_A", "lora_B", "alpha"
_PARTS = {"lora_A": _DOWN, "lora_down": _DOWN, "lora_B": _UP, "lora_up": _UP, None: _ALPHA}


class BrokenLora(ValueError):
    """A LoRA file that is damaged, incomplete, or of an unknown layout."""


def lora_bytes(factors: Factors, metadata: Mapping[str, str]) -> bytes:
    """The safetensors file of a LoRA, in the one layout that is written.

    Layers of a lower rank are padded with zeros to the largest, which changes nothing.
    """
    rank = rank_of(factors)
    tensors = {}
    for layer, (down, up) in factors.items():
        more = rank - len(down)
        down, up = pad(down, (0, 0, 0, more)), pad(up, (0, more))
        tensors[f"transformer.{layer}.lora_A.weight"] = down.to(torch.bfloat16).contiguous()
        tensors[f"transformer.{layer}.lora_B.weight"] = up.to(torch.bfloat16).contiguous()
    # PEFT's settings; diffusers takes them as they are, so the layers have to be among them.
    settings = {"r": rank, "lora_alpha": rank, "target_modules": sorted(factors)}
    peft = {f"transformer.{name}": value for name, value in settings.items()}
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(peft), **metadata}
    return save(tensors, metadata=header)


def read_tensors(file: str | PathLike[str], source: str) -> tuple[dict[str, Tensor], dict]:
    """All tensors of a safetensors file and its header's metadata. Raises `BrokenLora`."""
    path = Path(file)
    with path.open("rb") as opened:
        start = opened.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise BrokenLora(f"{source} is a Git-LFS pointer, not the file itself; run `git lfs pull`")
    # A safetensors file has the length of its header in front of "{", and may begin with any byte.
    if start.lstrip()[:1] == b"<" and start[8:9] != b"{":
        raise BrokenLora(f"{source} is a web page, not a LoRA; is the link public?")
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            return {key: opened.get_tensor(key) for key in opened.keys()}, metadata
    except (SafetensorError, OSError) as error:
        raise BrokenLora(f"{source} is not a whole safetensors file ({error})") from error


def parse_lora(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> Factors:
    """The factors in a LoRA file's tensors, in float32. Raises `BrokenLora` naming every fault."""
    layers: dict[str, dict[str, Tensor]] = {}
    faults = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            faults.append(f"{key} is not a LoRA tensor this reader knows")
            continue
        parts, part = layers.setdefault(match["layer"], {}), _PARTS[match["matrix"]]
        if part in parts:
            faults.append(f"{key} is the second {part} of {match['layer']}")
        parts[part] = tensor

    header = None
    if any(_ALPHA not in parts for parts in layers.values()):
        header = _read_header(metadata, source)
    factors: Factors = {}
    for layer, parts in sorted(layers.items()):
        fault = _fault(parts, header)
        if fault is None:
            # Copies: a tensor as it was read may still lie in the file, which may change.
            down = parts[_DOWN].to(torch.float32, copy=True)
            up = parts[_UP].float() * _scale(parts, header)
            if down.isfinite().all() and up.isfinite().all():
                factors[layer] = (down, up)
                continue
            fault = "holds NaN or infinity"
        faults.append(f"{layer} {fault}")
    if faults:
        shown = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if faults[5:] else "")
        raise BrokenLora(f"{source}: {shown}")
    if not factors:
        raise BrokenLora(f"{source} holds no LoRA tensors")
    return factors


@dataclass(frozen=True)
class _Header:
    """What diffusers and PEFT write about the whole file."""

    rank: float
    alpha: float


def _fault(parts: Mapping[str, Tensor], header: _Header | None) -> str | None:
    """What is wrong with the parts of one layer, or None."""
    if _DOWN not in parts and _UP not in parts:
        return "has alpha alone"
    if _UP not in parts:
        return "has lora_A but no lora_B"
    if _DOWN not in parts:
        return "has lora_B but no lora_A"
    down, up = parts[_DOWN], parts[_UP]
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or not len(down):
        shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
        return f"has the shapes {shapes}, not [rank, in] and [out, rank]"
    if not (down.is_floating_point() and up.is_floating_point()):
        return f"holds {down.dtype} and {up.dtype}, not floating point numbers"
    if _ALPHA in parts:
        alpha = parts[_ALPHA]
        if alpha.numel() != 1 or not 0 < float(alpha) < math.inf:
            return "has an alpha that is not one positive number"
    elif header is not None and header.rank != len(down):
        return f"has rank {len(down)}, the file's header says {header.rank:g}"
    return None


def _scale(parts: Mapping[str, Tensor], header: _Header | None) -> float:
    """alpha / rank of a layer; 1 where no alpha is written."""
    if _ALPHA in parts:
        return float(parts[_ALPHA]) / len(parts[_DOWN])
    return header.alpha / header.rank if header is not None else 1.0


def _read_header(metadata: Mapping[str, str], source: str) -> _Header | None:
    """Rank and alpha from `lora_adapter_metadata`, or None where it does not say."""
    name = "lora_adapter_metadata"
    written = metadata.get(name)
    if not written:
        return None
    try:
        peft = json.loads(written)
    except (ValueError, RecursionError) as error:
        raise BrokenLora(f"{source}: header {name} is not JSON ({error})") from error
    if not isinstance(peft, dict):
        raise BrokenLora(f"{source}: header {name} is not a JSON object")
    for setting in ("rank_pattern", "alpha_pattern", "use_rslora"):
        if peft.get(f"transformer.{setting}"):
            raise BrokenLora(f"{source}: header {name} with {setting} is not read yet")
    rank, alpha = peft.get("transformer.r"), peft.get("transformer.lora_alpha")
    if rank is None or alpha is None:
        return None
    for value in (rank, alpha):
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise BrokenLora(f"{source}: header {name} has r {rank!r} and lora_alpha {alpha!r}")
    return _Header(rank, alpha)
