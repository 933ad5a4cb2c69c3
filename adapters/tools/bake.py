"""Writes a base model's whole transformer with a LoRA in it, tensor by tensor.

Each changed weight is W0 + scale * dW in float32, rounded once: bit for bit what merging for
generation gives (`adapters.merging`).
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from adapters.archive_members import META, PLACEHOLDER
from adapters.baked import why_not_again
from adapters.files.atomic import atomic_file, atomic_folder, check_space
from adapters.files.tensor_writer import Planned, write_shards, write_tensors
from adapters.formats import BIAS, Delta, as_delta, spellings
from adapters.tools.baked_model import embeddings_of, facts_of, notes_of, placeholders_of
from adapters.tools.checkpoint import Checkpoint, open_checkpoint
from adapters.tools.low_rank import norm
from adapters.tools.opened import Opened, ToolError
from adapters.tools.outputs import check_files, check_place
from adapters.trained_model import TRANSFORMER, write_meta, write_placeholders
from families.base import Base
from families.registry import family_of
from families.repository import component_folder, transformer_source

_HEADER = 4 << 20  # bytes; more than the header and the small files take
_ROWS = 32  # that fit in a processor's cache
_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0
_MARKER = "scaled_fp8"
# Weights of the linear layers of the repeated blocks: what `families.quantization` quantizes.
_IN_BLOCK = re.compile(r"[^.]+\.\d+\.[^.]+\..*weight")

Targets = tuple[str, ...]  # parameters


@dataclass(frozen=True)
class Baked:
    """What was written, and what rounding cost."""

    files: tuple[Path, ...]
    nbytes: int
    layers: int  # changed ones
    change: float  # ||scale * dW|| / ||W0|| of the changed weights
    error: float  # ||rounding|| / ||W0|| of the changed weights
    error_of_change: float  # ||rounding|| / ||scale * dW||
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Output:
    """A tensor of the result, made of one parameter or, if fused, of the rows of several."""

    name: str
    targets: Targets
    shape: tuple[int, ...]
    fp8: bool

    def planned(self) -> dict[str, Planned]:
        """The tensors that it takes in the file."""
        if not self.fp8:
            return {self.name: Planned(torch.bfloat16, self.shape)}
        scale = f"{self.name.removesuffix('weight')}scale_weight"
        return {self.name: Planned(_FP8, self.shape), scale: Planned(torch.float32, ())}

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.planned().values())


def check_output(output: Path, dtype: str, layout: str, overwrite: bool) -> None:
    """Raises `ToolError` for a result that cannot be written, before anything is read."""
    if layout == "comfyui" and output.suffix != ".safetensors":
        raise ToolError(f"{output}: --layout comfyui writes one file; name it ….safetensors")
    if layout == "diffusers" and output.suffix == ".safetensors":
        raise ToolError(
            f"{output}: --layout diffusers writes a folder; name one, or choose comfyui"
        )
    if dtype == "fp8" and layout == "diffusers":
        raise ToolError(
            "diffusers reads no scaled fp8 files; add --layout comfyui, or write bf16 and set "
            "$QUANTIZE=fp8 to generate"
        )
    if layout == "comfyui":
        check_files([output], overwrite)
        return
    check_place(output)
    if not output.exists():
        return
    if not overwrite:
        raise ToolError(f"{output} exists already; name another with -o, or add --overwrite")
    if not output.is_dir():
        raise ToolError(f"{output} is a file, and --layout diffusers writes a folder; name another")
    own = {TRANSFORMER, Path(PLACEHOLDER).parts[0], META}
    other = sorted(each.name for each in output.iterdir() if each.name not in own)
    if other:
        raise ToolError(
            f"{output} also contains {', '.join(other[:3])}, which --overwrite would remove; "
            "name another folder"
        )


def bake(
    opened: Opened,
    output: Path,
    scale: float = 1.0,
    dtype: str = "bf16",
    layout: str = "diffusers",
    overwrite: bool = False,
) -> Baked:
    """Writes the transformer of `opened.base` with the LoRA at `scale`.

    In diffusers' layout `output` is a folder that can be used as a base model, in the form of
    `adapters.trained_model`; for ComfyUI it is one file, with the embeddings of tokens next to it.
    Both say in the weights' header which LoRA is in them (`adapters.baked`). An interrupted run
    leaves nothing. Raises `ToolError`, also for a LoRA that is in the base already, `MissingModel`
    for a base that cannot be found, and OSError if the disk has too little space, before anything
    is written.
    """
    check_output(output, dtype, layout, overwrite)
    if reason := why_not_again(opened.archive, f"weights {opened.name}", scale, opened.base):
        raise ToolError(reason)
    placeholders = placeholders_of(opened)
    embeddings = embeddings_of(placeholders, opened.base, output) if layout == "comfyui" else {}
    if embeddings:
        check_files([output, *embeddings], overwrite)
    with open_checkpoint(transformer_source(opened.base), opened.base) as base:
        outputs = _outputs(base, opened.base, dtype, layout)
        needed = sum(each.nbytes for each in outputs)
        check_space(output, needed + _HEADER)
        baker = _Baker(base, opened, scale)
        meta, header = facts_of(opened, placeholders, scale)
        given = _planned(outputs), _values(outputs, baker), header
        if layout == "comfyui":
            with atomic_file(output) as file:
                write_tensors(file, *given)
            for path, data in embeddings.items():
                with atomic_file(path) as file:
                    file.write(data)
        else:
            with atomic_folder(output) as folder:
                (folder / TRANSFORMER).mkdir()
                write_shards(folder / TRANSFORMER, *given)
                config = component_folder(opened.base, TRANSFORMER) / "config.json"
                (folder / TRANSFORMER / config.name).write_bytes(config.read_bytes())
                write_placeholders(placeholders, folder)
                write_meta(meta, folder)
        notes = tuple(notes_of(opened, placeholders, base, output, list(embeddings)))
        result = baker.result()
        return replace(result, files=(output, *embeddings), nbytes=needed, notes=notes)


def _outputs(base: Checkpoint, of: Base, dtype: str, layout: str) -> list[_Output]:
    """The tensors of the result, in their order."""
    written: dict[str, tuple[str, Targets]] = {name: (name, (name,)) for name in base.parameters}
    if layout == "comfyui":
        for name, targets in spellings(base.parameters, family_of(of).original_names).items():
            if targets != (name,):
                written |= {target: (name, targets) for target in targets}
    outputs = []
    for name, targets in dict.fromkeys(written.values()):
        shapes = [base.parameters[target] for target in targets]
        shape = (sum(each[0] for each in shapes), *shapes[0][1:])
        fp8 = dtype == "fp8" and len(shape) == 2 and bool(_IN_BLOCK.fullmatch(targets[0]))
        outputs.append(_Output(name, targets, shape, fp8))
    return outputs


class _Baker:
    """Computes the weights of the result one at a time, and sums up what rounding costs."""

    def __init__(self, base: Checkpoint, opened: Opened, scale: float) -> None:
        self._base, self._scale = base, scale
        self._deltas: dict[str, Delta] = {
            name if name.endswith(BIAS) else f"{name}.weight": delta
            for name, delta in opened.deltas.items()
        }
        self._before = self._change = self._error = 0.0  # squared norms of changed tensors
        # For one tensor; new memory takes longer than the sums.
        self._space = torch.empty(0)
        self._rounded = torch.empty(0, dtype=torch.bfloat16)

    @torch.no_grad()
    def tensors(self, output: _Output) -> Iterator[tuple[str, Tensor]]:
        """The tensors of one output, as planned. Raises `ToolError` for a weight that is NaN."""
        changed = not self._deltas.keys().isdisjoint(output.targets)
        if not changed and not output.fp8:
            parts = [self._base.read(name).to(torch.bfloat16) for name in output.targets]
            yield output.name, parts[0] if len(parts) == 1 else torch.cat(parts)
            return
        whole = self._sums(output, changed)
        if not output.fp8:
            rounded = self._rounded[: whole.numel()].view(whole.shape).copy_(whole)
            self._count(output, whole, rounded)
            yield output.name, rounded
            return
        name, scale_name = output.planned()
        scale = torch.tensor(float(whole.abs().max()) / _FP8_MAX or 1.0)
        rounded = whole.div_(scale).clamp_(-_FP8_MAX, _FP8_MAX).to(_FP8)
        if changed:
            self._count(output, whole, rounded, float(scale))
        yield name, rounded
        yield scale_name, scale

    def result(self) -> Baked:
        """The sums of all tensors so far."""
        before, change, error = map(math.sqrt, (self._before, self._change, self._error))
        return Baked(
            *((), 0, len(self._deltas)),
            change=change / before if before else 0.0,
            error=error / before if before else 0.0,
            error_of_change=error / change if change else 0.0,
            notes=(),
        )

    def _sums(self, output: _Output, changed: bool) -> Tensor:
        """W0 + scale * dW in float32, as `LoraMerger` computes it. The next call overwrites it."""
        size = math.prod(output.shape)
        if len(self._space) < size:
            self._space = torch.empty(size)
            self._rounded = torch.empty(size, dtype=torch.bfloat16)
        whole = self._space[:size].view(output.shape)
        rows = [self._base.parameters[name][0] for name in output.targets]
        for name, total in zip(output.targets, whole.split(rows), strict=True):
            original = self._base.read(name)
            total.copy_(original)
            if changed:
                self._before += float(total.norm()) ** 2
            if (delta := self._deltas.get(name)) is None:
                continue
            as_delta(delta).add_to(total, original, self._scale)
            if isinstance(delta, tuple):
                self._change += (self._scale * norm(*delta)) ** 2
            else:
                self._change += float((total - original.float()).norm()) ** 2
        return whole

    def _count(self, output: _Output, exact: Tensor, rounded: Tensor, unit: float = 1.0) -> None:
        parts = exact.split(_ROWS), rounded.split(_ROWS)
        for one, other in zip(*parts, strict=True):
            self._error += (unit * float((one - other.float()).norm())) ** 2
        if not math.isfinite(self._error):
            raise ToolError(f"{output.name} is NaN or infinite in the base with the LoRA")


def _planned(outputs: list[_Output]) -> dict[str, Planned]:
    """The tensors of the result in their order; `scaled_fp8` says that there are fp8 weights."""
    planned = {name: each for output in outputs for name, each in output.planned().items()}
    if any(output.fp8 for output in outputs):
        planned[_MARKER] = Planned(_FP8, (2,))  # of two: products in 16 bits
    return planned


def _values(outputs: list[_Output], baker: _Baker) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `_planned`."""
    for output in outputs:
        yield from baker.tensors(output)
    if any(output.fp8 for output in outputs):
        yield _MARKER, torch.zeros(2, dtype=_FP8)
