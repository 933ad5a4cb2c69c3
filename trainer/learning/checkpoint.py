"""Checkpoints: the whole state of a run in one file, to resume it from.

One safetensors file contains the float32 weights and the optimizers' tensors, and in its header the
rest as JSON. Randomness is counter-based (`trainer.learning.randomness`), so the step is its whole
state. `read_checkpoint` checks everything that does not depend on the run's settings; errors name
the file and the damaged part.
"""

import json
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from adapters.files.atomic import atomic_path
from adapters.formats import CHECKPOINT_HEADER as CHECKPOINT
from trainer.run_files import checkpoints_in
from trainer.settings import MAX_STEPS

FORMAT_VERSION = 2
_STATE = ("parameters", "optimizers", "averages", "best", "subject_weights")
KEPT = 2  # checkpoints of a run; older ones are removed
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


class BrokenCheckpoint(ValueError):
    """A checkpoint that is damaged, or belongs to another run."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `step` steps."""

    step: int
    identity: dict[str, Any]  # must be equal in a resumed run: base, rank, placeholder, …
    parameters: dict[str, Tensor]  # by name, float32; of a full training also bfloat16
    optimizers: dict[str, dict[str, Any]]  # state_dicts, by group of parameters
    history: dict[str, Any]  # losses etc., JSON types
    averages: dict[str, Tensor]  # EMA weights, by name; empty without EMA
    averaged_steps: int = 0
    # `trainer.learning.best_weights.Best` by name; empty without keep_best
    best: dict[str, Any] = field(default_factory=dict)
    # That generated the images of the subject (`trainer.learning.preservation`), by name; empty
    # before
    subject_weights: dict[str, Tensor] = field(default_factory=dict)


def write_checkpoint(checkpoint: Checkpoint, folder: Path, keep: int = KEPT) -> Path:
    """Writes `step-NNNNNN.safetensors` into the folder atomically.

    Keeps the last `keep` checkpoints up to this one. Removes those of later steps, which a resumed
    run has discarded. Other files, and links and their targets, are not removed.
    """
    tensors: dict[str, Tensor] = {}
    state = {name: _apart(getattr(checkpoint, name), name, tensors) for name in _STATE}
    header = {
        "format_version": FORMAT_VERSION,
        "step": checkpoint.step,
        "identity": checkpoint.identity,
        "history": checkpoint.history,
        "averaged_steps": checkpoint.averaged_steps,
        "state": state,
    }
    path = folder / f"step-{checkpoint.step:06d}.safetensors"
    metadata = {CHECKPOINT: json.dumps(header, ensure_ascii=False)}
    with atomic_path(path) as part:
        _save(_on_the_cpu(tensors), part, metadata)
    if not folder.is_symlink():
        found = [each for each in checkpoints_in(folder) if not each.is_symlink()]
        last = found.index(path) + 1
        for old in (*found[:last][:-keep], *found[last:]):
            old.unlink(missing_ok=True)
    return path


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors in nested dictionaries and lists, such as an optimizer's state."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_of(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_of(each)


def is_finite(value: Tensor) -> bool:
    """Whether all values of a tensor are finite."""
    return value.dtype in _WHOLE or (value.dtype in _FLOATS and bool(value.isfinite().all()))


def _on_the_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in CPU memory, copied only if necessary.

    Some optimizers share tensors, which safetensors refuses: all but the first are copied.
    """
    found, seen = {}, set[int]()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != value.nbytes:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        found[name] = value
    return found


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file. Raises OSError for a full disk."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _apart(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON, with `{"tensor": name}` for every tensor, which is added to `tensors`.

    Dictionaries become lists of pairs, since some keys in an optimizer's state are numbers.
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
    """The inverse of `_apart`; tuples become lists."""
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {k: _together(v, tensors) for k, v in value["pairs"]}
    return [_together(each, tensors) for each in value] if isinstance(value, list) else value


# ---- Reading -------------------------------------------------------------------------------------


def is_checkpoint(path: Path) -> bool:
    """Whether the file is a training checkpoint, not weights."""
    try:
        with safe_open(path, framework="pt") as file:
            return CHECKPOINT in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def read_header(path: Path) -> dict[str, Any]:
    """The checked header of a checkpoint, without its tensors.

    Raises `BrokenCheckpoint` naming the damaged part.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[CHECKPOINT])
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        raise BrokenCheckpoint(f"{path} is not a whole checkpoint ({error})") from error
    check = _Check(path)
    check(isinstance(header, dict), "header", "is not a JSON object")
    version = header.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise BrokenCheckpoint(
            f"{path}: format version {_shown(version)} is unknown (this is version "
            f"{FORMAT_VERSION}); resume with the version of zeroprior that wrote it"
        )
    step = check.whole(header, "step", MAX_STEPS)
    check.whole(header, "averaged_steps", MAX_STEPS)
    for name in ("identity", "history", "state"):
        check(isinstance(header.get(name), dict), name, "is missing or not a JSON object")
    for name in ("best", "subject_weights"):  # not in older checkpoints
        header["state"].setdefault(name, {"pairs": []})
    _check_identity(header["identity"], check)
    _check_history(header["history"], step, check)
    return header


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads and checks a checkpoint. Raises `BrokenCheckpoint` with the reason."""
    header, check = read_header(path), _Check(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise BrokenCheckpoint(f"{path} is not a whole checkpoint ({error})") from error
    state = {}
    for name in _STATE:
        try:
            state[name] = _together(header["state"][name], tensors)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            fault = f"{type(error).__name__}: {_shown(error)}"
            raise BrokenCheckpoint(f"{path}: its state of {name} is damaged ({fault})") from error
    best = _checked_best(state["best"], header["step"], check)
    copies = {name: state[name] for name in ("averages", "subject_weights")} | {"best": best}
    _check_parameters(state["parameters"], copies, check)
    _check_optimizers(state["optimizers"], state["parameters"], check)
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


class _Check:
    """Raises `BrokenCheckpoint` that names the file and the damaged part."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, right: bool, part: str, fault: str) -> None:
        if not right:
            raise BrokenCheckpoint(f"{self.path} is damaged: {part} {fault}; use an earlier one")

    def whole(self, values: dict[str, Any], name: str, most: int) -> int:
        """Checks and returns an integer from 0 to `most`."""
        value = values.get(name)
        right = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most
        self(right, name, f"is {_shown(value)}, not a whole number between 0 and {most:,}")
        assert isinstance(value, int)
        return value

    def each(self, values: Any, part: str, right: Callable[[Any], bool], of: str) -> None:
        """Checks a list of values of one kind."""
        self(isinstance(values, list), part, "is missing or not a list")
        for number, value in enumerate(values):
            self(right(value), f"{part}[{number}]", f"is {_shown(value)}, not {of}")


def _check_identity(identity: dict[str, Any], check: _Check) -> None:
    for name in ("settings", "data"):
        wrong = not isinstance(identity.get(name, {}), dict)
        check(not wrong, f"identity.{name}", "is not a JSON object")
    seed = identity.get("settings", {}).get("seed", 0)
    right = isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**63
    check(right, "identity.settings.seed", f"is {_shown(seed)}, not a seed")
    for name, hashes in identity.get("data", {}).items():
        part = f"identity.data[{_shown(name)}]"
        check.each(hashes, part, lambda each: isinstance(each, str), "text")
        check(2 <= len(hashes) <= 4, part, f"has {len(hashes)} hashes, not 2 to 4")


def _check_history(history: dict[str, Any], step: int, check: _Check) -> None:
    for name in ("losses", "row_norms"):
        check.each(history.get(name), f"history.{name}", _is_number, "a number")
    losses, norms = len(history["losses"]), len(history["row_norms"])
    check(losses == step, "history.losses", f"has {losses:,} values for {step:,} steps")
    check(norms <= step, "history.row_norms", f"has {norms:,} values for {step:,} steps")
    others = history.get("other_row_norms", [])
    check.each(others, "history.other_row_norms", lambda each: isinstance(each, list), "a list")
    for number, each in enumerate(others):
        check.each(each, f"history.other_row_norms[{number}]", _is_number, "a number")
        fault = f"has {len(each):,} values for {step:,} steps"
        check(len(each) <= step, f"history.other_row_norms[{number}]", fault)
    rows = history.setdefault("validation", [])
    check.each(rows, "history.validation", lambda each: isinstance(each, list), "a list")
    for number, row in enumerate(rows):
        check.each(row, f"history.validation[{number}]", _is_number, "a number")
        check(len(row) > 1, f"history.validation[{number}]", "contains no loss")


def _checked_best(best: Any, step: int, check: _Check) -> Any:
    """The best weights, whose step and loss are checked."""
    check(isinstance(best, dict), "best", "is not a table")
    if not best:
        return {}
    check(best.keys() == {"step", "loss", "weights"}, "best", "has no step, loss and weights")
    check.whole(best, "step", step)
    check(_is_number(best["loss"]) and math.isfinite(best["loss"]), "best.loss", "is not a number")
    return best["weights"]


def _check_parameters(parameters: Any, copies: dict[str, Any], check: _Check) -> None:
    """Checks the weights, and their copies of other times or kinds, if there are any."""
    for part, values in {"parameters": parameters, **copies}.items():
        check(isinstance(values, dict), part, "is not a table of tensors")
        for name, value in values.items():
            where = f"{part} {_shown(name)}"
            right = isinstance(name, str) and isinstance(value, Tensor)
            own = right and name.startswith("transformer.")  # in the base model's dtype
            right = right and value.dtype in (_FLOATS if own else (torch.float32,))
            check(right, where, "is not a float32 tensor")
            check(is_finite(value), where, "contains NaN or infinity")
    check(len(parameters) > 0, "parameters", "contains no tensors")
    for part, values in copies.items():
        same = not values or values.keys() == parameters.keys()
        same = same and all(values[name].shape == parameters[name].shape for name in values)
        check(same, part, "has other names or shapes than parameters")


def _check_optimizers(optimizers: Any, parameters: dict[str, Tensor], check: _Check) -> None:
    """Checks that each has one group with all parameters of its name, and states of these."""
    check(isinstance(optimizers, dict), "optimizers", "is not a table")
    names = {name.partition(".")[0] for name in parameters}
    check(optimizers.keys() == names, "optimizers", f"are not those of {', '.join(sorted(names))}")
    for name, found in optimizers.items():
        part = f"optimizers.{name}"
        right = isinstance(found, dict) and found.keys() >= {"state", "param_groups"}
        check(right, part, "has no state and param_groups")
        groups, state = found["param_groups"], found["state"]
        right = isinstance(groups, list) and len(groups) == 1 and isinstance(groups[0], dict)
        check(right, f"{part}.param_groups", "is not a list of one group")
        count = sum(each.partition(".")[0] == name for each in parameters)
        right = groups[0].get("params") == list(range(count))
        check(right, f"{part}.param_groups", f"does not name {count} parameters")
        check(isinstance(state, dict), f"{part}.state", "is not a table")
        for key, values in state.items():
            where = f"{part}.state[{_shown(key)}]"
            right = type(key) is int and 0 <= key < count and isinstance(values, dict)
            check(right, where, "does not belong to a parameter")
            right = all(map(is_finite, tensors_of(values)))
            check(right, where, "contains NaN, infinity or an unknown type")


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, float) or value.bit_length() < 64


def _shown(value: Any) -> str:
    """A value from a file for a message: printable and short."""
    text = str(value) if isinstance(value, Exception) else reprlib.repr(value)
    return "".join(each if each.isprintable() else "?" for each in text[:80])
