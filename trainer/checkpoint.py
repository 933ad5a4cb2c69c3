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
from trainer.run_files import checkpoints_in

FORMAT_VERSION = 2
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
    optimizers: dict[str, dict[str, Any]]  # their state_dicts, by what they train
    history: dict[str, Any]  # losses and the like, JSON types
    averages: dict[str, Tensor]  # of the parameters, by name; empty where none are kept
    averaged_steps: int = 0


def write_checkpoint(checkpoint: Checkpoint, folder: Path) -> Path:
    """Writes `step-NNNNNN.safetensors` into the folder atomically.

    The last `KEPT` up to this one stay. Those of more steps are removed: in a run's own folder they
    are of the part that a resumed run has given up. Files with other names stay, and so do links
    and what is behind them.
    """
    tensors: dict[str, Tensor] = {}
    state = {
        name: _apart(getattr(checkpoint, name), name, tensors)
        for name in ("parameters", "optimizers", "averages")
    }
    header = {
        "format_version": FORMAT_VERSION,
        "step": checkpoint.step,
        "identity": checkpoint.identity,
        "history": checkpoint.history,
        "averaged_steps": checkpoint.averaged_steps,
        "state": state,
    }
    path = folder / f"step-{checkpoint.step:06d}.safetensors"
    # Copied once, always: some optimisers share tensors, which safetensors refuses.
    copies = {
        name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()
    }
    with atomic_file(path) as file:
        file.write(save(copies, metadata={_HEADER: json.dumps(header)}))
    if not folder.is_symlink():
        found = [each for each in checkpoints_in(folder) if not each.is_symlink()]
        last = found.index(path) + 1
        for old in (*found[:last][:-KEPT], *found[last:]):
            old.unlink(missing_ok=True)
    return path


def _apart(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON, with `{"tensor": name}` for every tensor, which goes into `tensors`.

    Dictionaries become lists of pairs, since an optimiser's keys are numbers too.
    """
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"pairs": [[k, _apart(v, f"{name}.{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_apart(each, f"{name}.{k}", tensors) for k, each in enumerate(value)]
    return value


def _together(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `_apart`; tuples come back as lists."""
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {k: _together(v, tensors) for k, v in value["pairs"]}
    return [_together(each, tensors) for each in value] if isinstance(value, list) else value


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
    state = {name: _together(value, tensors) for name, value in header["state"].items()}
    if not all(torch.isfinite(value).all() for value in state["parameters"].values()):
        raise BrokenCheckpoint(f"{path} holds NaN or infinity; take an earlier one")
    return Checkpoint(
        step=header["step"],
        identity=header["identity"],
        history=header["history"],
        averaged_steps=header["averaged_steps"],
        **state,
    )


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in a folder, or None."""
    return next(reversed(checkpoints_in(folder)), None)
