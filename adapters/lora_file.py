"""LoRA files: one layout is written, the common spellings of it are read.

Written: `transformer.<layer>.lora_A.weight` and `.lora_B.weight`, bfloat16, one rank, alpha folded
into B, no alpha keys: the layout that diffusers, ComfyUI, ai-toolkit, musubi-tuner and OneTrainer
all read at the right strength.
Read: that, and the same under `diffusion_model.` or without a prefix, with `lora_down`/`lora_up`
for `lora_A`/`lora_B`, and with alpha as a tensor, in the header, or absent (then alpha = rank).
Anything else is refused by name; nothing is skipped.
"""

import json
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from adapters.factors import Factors, rank_of

_KEY = re.compile(
    r"(?:transformer\.|diffusion_model\.)?(?P<layer>.+?)\."
    r"(?:(?P<down>lora_A|lora_down)|(?P<up>lora_B|lora_up)|(?P<alpha>alpha))"
    r"(?:\.default)?(?:\.weight)?"
)


class BrokenLora(ValueError):
    """A LoRA file that is damaged, incomplete, or of an unknown layout."""


def lora_bytes(factors: Factors, metadata: Mapping[str, str]) -> bytes:
    """The safetensors file of a LoRA, in the one layout that is written."""
    tensors = {}
    for layer, (down, up) in factors.items():
        tensors[f"transformer.{layer}.lora_A.weight"] = down.to(torch.bfloat16).contiguous()
        tensors[f"transformer.{layer}.lora_B.weight"] = up.to(torch.bfloat16).contiguous()
    rank = rank_of(factors)
    peft = {"transformer.r": rank, "transformer.lora_alpha": rank}
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(peft), **metadata}
    return save(tensors, metadata=header)


def read_tensors(file: str | PathLike[str], source: str) -> tuple[dict[str, Tensor], dict]:
    """All tensors of a safetensors file and its header's metadata. Raises `BrokenLora`."""
    path = Path(file)
    with path.open("rb") as opened:
        start = opened.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise BrokenLora(f"{source} is a Git-LFS pointer, not the file itself; run `git lfs pull`")
    if start.lstrip()[:1] == b"<":
        raise BrokenLora(f"{source} is a web page, not a LoRA; is the link public?")
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            return {key: opened.get_tensor(key) for key in opened.keys()}, metadata
    except (SafetensorError, OSError) as error:
        raise BrokenLora(f"{source} is not a whole safetensors file ({error})") from error


def parse_lora(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> Factors:
    """The factors in a LoRA file's tensors, in float32. Raises `BrokenLora` naming every fault."""
    downs: dict[str, Tensor] = {}
    ups: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    foreign = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            foreign.append(key)
        elif match["alpha"]:
            alphas[match["layer"]] = float(tensor)
        else:
            (downs if match["down"] else ups)[match["layer"]] = tensor
    faults = [f"{key} is not a LoRA tensor this reader knows" for key in foreign]
    faults += [f"{layer} has lora_A but no lora_B" for layer in sorted(set(downs) - set(ups))]
    faults += [f"{layer} has lora_B but no lora_A" for layer in sorted(set(ups) - set(downs))]
    faults += [f"{layer} has alpha alone" for layer in sorted(set(alphas) - set(downs) - set(ups))]

    header_scale = 1.0 if alphas else _header_scale(metadata, source)
    factors: Factors = {}
    for layer in sorted(set(downs) & set(ups)):
        down, up = downs[layer].float(), ups[layer].float()
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
            shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
            faults.append(f"{layer}: shapes {shapes} are not [rank, in] and [out, rank]")
        elif not (down.isfinite().all() and up.isfinite().all()):
            faults.append(f"{layer} holds NaN or infinity")
        else:
            scale = alphas[layer] / down.shape[0] if layer in alphas else header_scale
            factors[layer] = (down, up * scale)
    if faults:
        shown = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if faults[5:] else "")
        raise BrokenLora(f"{source}: {shown}")
    if not factors:
        raise BrokenLora(f"{source} holds no LoRA tensors")
    return factors


def _header_scale(metadata: Mapping[str, str], source: str) -> float:
    """alpha / rank from the header that diffusers and PEFT write, else 1."""
    written = metadata.get("lora_adapter_metadata")
    if not written:
        return 1.0
    try:
        peft = json.loads(written)
        rank = peft.get("transformer.r")
        alpha = peft.get("transformer.lora_alpha")
        patterns = [peft.get(f"transformer.{name}") for name in ("rank_pattern", "alpha_pattern")]
    except (ValueError, AttributeError) as error:
        raise BrokenLora(f"{source}: header lora_adapter_metadata is not JSON") from error
    if any(patterns):
        raise BrokenLora(f"{source}: header with rank_pattern or alpha_pattern is not read yet")
    return float(alpha) / float(rank) if rank and alpha else 1.0
