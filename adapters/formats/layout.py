"""Maps the layer names in LoRA files to the layers of a model.

A name in a file must match exactly one of the model's layers (`adapters.formats.layer_names`).
Nothing is skipped.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapters.formats.deltas import Delta, Deltas, as_delta
from adapters.formats.factors import LoraMismatch, shown
from adapters.formats.file_kinds import family_of, is_text_encoder
from adapters.formats.layer_names import Names, Targets

BIAS = ".bias"

OriginalNames = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class Layout:
    """The layers of one transformer, and the names that files use for them."""

    base_name: str
    shapes: Mapping[str, tuple[int, ...]]  # of weights by layer, and of biases as `<layer>.bias`
    names: Names

    @classmethod
    def of(
        cls, transformer: nn.Module, base_name: str, original_names: OriginalNames | None = None
    ) -> "Layout":
        """Reads names and shapes from the modules, which may be on the meta device.

        `original_names` is the family's table (`Family.original_names`).
        """
        shapes: dict[str, tuple[int, ...]] = {}
        modules = dict(transformer.named_modules())
        wrapped = {name for name, each in modules.items() if is_linear(getattr(each, "base", None))}
        for name, module in modules.items():
            if name.rpartition(".")[0] not in wrapped:
                shapes |= _shapes(name, module)
        return cls._named(base_name, shapes, original_names)

    @classmethod
    def of_parameters(
        cls,
        parameters: Mapping[str, tuple[int, ...]],
        base_name: str,
        original_names: OriginalNames | None = None,
    ) -> "Layout":
        """The same from the shapes of the model's parameters by name."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in parameters.items():
            layer = name.removesuffix(".weight")
            if layer != name:
                shapes[layer] = shape
                if (bias := parameters.get(f"{layer}{BIAS}")) is not None:
                    shapes[f"{layer}{BIAS}"] = bias
        return cls._named(base_name, shapes, original_names)

    @classmethod
    def _named(
        cls,
        base_name: str,
        shapes: dict[str, tuple[int, ...]],
        original_names: OriginalNames | None,
    ) -> "Layout":
        layers = [name for name in shapes if not name.endswith(BIAS)]
        return cls(base_name, shapes, Names(spellings(layers, original_names or {})))

    def find(self, written: str) -> Targets | None:
        """The layers that a name in a file refers to; several for a fused layer.

        None if the name matches no layer or is ambiguous.
        """
        meant = self.names.meant(written)
        return meant[0] if len(meant) == 1 else None

    def fit(self, deltas: Deltas, source: str) -> dict[str, Delta]:
        """All changes by the model's layer names, with fused layers split.

        Raises `LoraMismatch` that lists names that the model lacks or has in another shape.
        """
        fitted: dict[str, Delta] = {}
        fused: dict[str, Delta] = {}
        absent, odd, unclear = [], [], []
        for written, each in deltas.items():
            delta = as_delta(each)
            meant = self._targets(written)
            if len(meant) > 1:
                both = " and ".join(", ".join(targets) for targets in meant)
                unclear.append(f"{written} (it may mean {both})")
            if len(meant) != 1:
                absent += [written] if not meant else []
                continue
            targets = meant[0]
            shapes = [self.shapes[target] for target in targets]
            whole = (sum(shape[0] for shape in shapes), *shapes[0][1:])
            if tuple(delta.shape) != whole:
                odd.append(f"{written} (LoRA {_times(delta.shape)}, model {_times(whole)})")
            elif len(targets) == 1:
                if _contradicts(fitted.get(targets[0]), delta):
                    unclear.append(
                        f"{written} (the file contains {targets[0]} twice, and they differ)"
                    )
                fitted[targets[0]] = delta
            else:
                try:
                    fused |= _split(delta, targets, shapes)
                except ValueError as error:
                    unclear.append(f"{written} ({error})")
        for target, delta in fused.items():
            if _contradicts(fitted.get(target), delta):
                unclear.append(f"{target} (the file also contains it fused, and they differ)")
            fitted.setdefault(target, delta)
        count = f"of {len(deltas)} layers"
        if absent:
            raise LoraMismatch(
                f"{source}: {len(absent)} {count} do not exist in {self.base_name}: "
                f"{shown(absent)}; {self._why(absent, deltas)}"
            )
        if odd:
            raise LoraMismatch(
                f"{source}: {len(odd)} {count} have another size in {self.base_name}: "
                f"{shown(odd)}; the LoRA was made for another size of the model"
            )
        if unclear:
            raise LoraMismatch(
                f"{source}: {len(unclear)} {count} cannot be applied to {self.base_name}: "
                f"{shown(unclear)}"
            )
        return fitted

    def _targets(self, written: str) -> list[Targets]:
        """All layers of the model that a name may refer to; biases as `<layer>.bias`."""
        meant = self.names.meant(written.removesuffix(BIAS))
        if written.endswith(BIAS):
            meant = [tuple(f"{name}{BIAS}" for name in targets) for targets in meant]
        return [targets for targets in meant if all(name in self.shapes for name in targets)]

    def _why(self, absent: list[str], deltas: Deltas) -> str:
        """The likely reason why the model lacks these names."""
        texts = [name for name in absent if is_text_encoder(name)]
        if texts == absent:
            return (
                "they belong to a text encoder, which LoRAs do not change here; "
                "save the LoRA without them"
            )
        family = family_of(deltas)
        own = family_of(self.shapes) or self.base_name
        if family is not None and own not in re.split(", | or ", family):
            return f"the LoRA was made for another model: {family}"
        layer = next(name for name in absent if name not in texts)
        name = layer.removesuffix(BIAS)
        if layer.endswith(BIAS) and self.names.meant(name):
            return f"{shown([name])} has no bias"
        return shown([self.names.obstacle(name)])


def spellings(names: Iterable[str], original_names: OriginalNames) -> dict[str, Targets]:
    """Each name that a file may use, and the model's names that it means.

    `names` are dotted names of layers or parameters.
    """
    known = dict.fromkeys(names)
    found: dict[str, Targets] = {name: (name,) for name in known}
    for written, parts in original_names.items():
        for name in known:
            if f".{parts[0]}." in f".{name}.":
                targets = tuple(_renamed(name, parts[0], part) for part in parts)
                if all(target in known for target in targets):
                    found.setdefault(_renamed(name, parts[0], written), targets)
    return found


def is_linear(module: object) -> bool:
    """Whether a module is a linear layer, including quantized ones of any library."""
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return all(isinstance(size, int) for size in sizes)


def _shapes(name: str, module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a module's weight and bias. For linear layers not from the weight, which may be
    quantized and packed."""
    shapes: dict[str, tuple[int, ...]] = {}
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if is_linear(module):
        shapes[name] = (int(module.out_features), int(module.in_features))  # type: ignore[arg-type]
    elif isinstance(weight, Tensor):
        shapes[name] = tuple(weight.shape)
    if name in shapes and isinstance(bias, Tensor):
        shapes[f"{name}{BIAS}"] = tuple(bias.shape)
    return shapes


def _renamed(name: str, part: str, new: str) -> str:
    return f".{name}.".replace(f".{part}.", f".{new}.", 1)[1:-1]


def _split(
    delta: Delta, targets: tuple[str, ...], shapes: list[tuple[int, ...]]
) -> dict[str, Delta]:
    parts, start = {}, 0
    for target, shape in zip(targets, shapes, strict=True):
        parts[target] = delta.rows(start, start + shape[0])
        start += shape[0]
    return parts


def _contradicts(one: Delta | None, other: Delta) -> bool:
    """Whether a file has two different changes for one layer; some have the same one twice."""
    if one is None or any(tensor.is_meta for tensor in one.tensors()):  # no values to compare
        return False
    start = torch.ones(one.shape)  # DoRA needs a weight
    ours, theirs = start.clone(), start.clone()
    one.add_to(ours, start, 1.0)
    other.add_to(theirs, start, 1.0)
    # Each may have been rounded to bfloat16 separately.
    return not (ours - theirs).norm() <= 2**-6 * (ours - start).norm()


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
