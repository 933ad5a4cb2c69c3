"""LoRA factors: the form of a plain LoRA in memory.

A LoRA changes a linear layer's weight W [out, in] by dW = B @ A. `Factors` maps the layer's name
in the transformer to (A [rank, in], B [out, rank]); a scale other than 1 (alpha / rank) is already
multiplied into B.
"""

from collections.abc import Iterable

from torch import Tensor, nn

from adapters.formats.layer_names import Names

Factors = dict[str, tuple[Tensor, Tensor]]


class LoraMismatch(ValueError):
    """A LoRA whose layers do not match the transformer."""


def check_fits(factors: Factors, transformer: nn.Module, source: str, base_name: str) -> None:
    """Raises `LoraMismatch` unless the transformer has every layer, with the same shape."""
    layers = {name: module for name, module in transformer.named_modules() if _has_matrix(module)}
    absent = [name for name in factors if name not in layers]
    if absent:
        names = Names({name: (name,) for name in layers})
        raise LoraMismatch(
            f"{source}: {len(absent)} of {len(factors)} layers do not exist in {base_name}: "
            f"{shown(absent)}; {shown([names.obstacle(absent[0])])}"
        )
    odd = []
    for name, (down, up) in factors.items():
        shape = tuple(layers[name].weight.shape)
        if (up.shape[0], down.shape[1]) != shape:
            odd.append(f"{name} (LoRA {up.shape[0]}x{down.shape[1]}, model {shape[0]}x{shape[1]})")
    if odd:
        raise LoraMismatch(
            f"{source}: {len(odd)} of {len(factors)} layers have another size in {base_name}: "
            f"{shown(odd)}; the LoRA was made for another size of the model"
        )


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2


def shown(names: Iterable[str], separator: str = ", ") -> str:
    """The first five names for a message, shortened and printable; they are untrusted input."""
    names = list(names)
    first = ["".join(c if c.isprintable() else "?" for c in name[:160]) for name in names[:5]]
    return separator.join(first) + (f"{separator}and {len(names) - 5} more" if names[5:] else "")
