"""Checkpoints: a training's whole state in one file, to go on from as if nothing had happened.

One safetensors file holds the float32 masters and the optimiser's tensors; its header holds the
rest as JSON. Randomness is counter-based (`trainer.randomness`), so the step is all there is to
know of it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from adapters.atomic import atomic_file

FORMAT_VERSION = 1
_HEADER = "zeroprior.checkpoint"
KEPT = 2  # checkpoints of one run; older ones are removed


class BrokenCheckpoint(ValueError):
    """A checkpoint that is damaged, or belongs to another training."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training after `step` steps."""

    step: int
    identity: dict[str, Any]  # what must be equal for a resumed run: base, rank, placeholder, …
    parameters: dict[str, Tensor]  # by name, float32
    optimizer: dict[str, Any]  # its state_dict
    history: dict[str, Any]  # losses and the like, JSON types


def write_checkpoint(checkpoint: Checkpoint, folder: Path) -> Path:
    """Writes `step-NNNNNN.safetensors` into the folder atomically; the last `KEPT` stay."""
    tensors = {f"parameters.{name}": value for name, value in checkpoint.parameters.items()}
    plain: dict[str, dict[str, Any]] = {}
    for index, state in checkpoint.optimizer["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                plain.setdefault(str(index), {})[key] = value
    header = {
        "format_version": FORMAT_VERSION,
        "step": checkpoint.step,
        "identity": checkpoint.identity,
        "history": checkpoint.history,
        "optimizer_groups": checkpoint.optimizer["param_groups"],
        "optimizer_plain": plain,
    }
    path = folder / f"step-{checkpoint.step:06d}.safetensors"
    contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic_file(path) as file:
        file.write(save(contiguous, metadata={_HEADER: json.dumps(header)}))
    for old in sorted(folder.glob("step-*.safetensors"))[:-KEPT]:
        old.unlink()
    return path


def is_checkpoint(path: Path) -> bool:
    """Whether the file is one of our checkpoints, rather than finished weights."""
    try:
        with safe_open(path, framework="pt") as file:
            return _HEADER in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def read_checkpoint(path: Path) -> Checkpoint:
    """Raises `BrokenCheckpoint` with the reason."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise BrokenCheckpoint(f"{path} is not a whole checkpoint ({error})") from error
    if header.get("format_version") != FORMAT_VERSION:
        raise BrokenCheckpoint(
            f"{path}: format version {header.get('format_version')!r} is unknown "
            f"(this is version {FORMAT_VERSION})"
        )
    parameters, state = {}, {int(k): dict(v) for k, v in header["optimizer_plain"].items()}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "parameters":
            parameters[rest] = tensor
        else:
            index, _, key = rest.partition(".")
            state.setdefault(int(index), {})[key] = tensor
    optimizer = {"state": state, "param_groups": header["optimizer_groups"]}
    if not all(torch.isfinite(value).all() for value in parameters.values()):
        raise BrokenCheckpoint(f"{path} holds NaN or infinity; take an earlier one")
    return Checkpoint(header["step"], header["identity"], parameters, optimizer, header["history"])


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in a folder, or None."""
    return max(folder.glob("step-*.safetensors"), default=None)
