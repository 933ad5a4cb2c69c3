"""Parses the tensors of one layer in a LoRA file.

lora_A, lora_B        also lora_down/up, lora.down/up, optionally with PEFT's adapter name: LoRA
lokr_w1, lokr_w2      each also as w1_a, w1_b: LoKr
hada_w1_a … w2_b      LoHa
diff, w_norm          the full change of a weight, such as a norm's
diff_b, b_norm        the full change of a bias, alone or with any of these
lora_B.bias           a change of the bias, scaled as the LoRA
alpha                 scales LoRA, LoKr and LoHa by alpha / rank
lora_magnitude_vector, dora_scale   makes any of them a DoRA
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.formats.deltas import (
    DOWN,
    MAGNITUDE,
    UP,
    Delta,
    Dense,
    Dora,
    Hadamard,
    Kronecker,
    LowRank,
)
from adapters.formats.file_kinds import OTHER_ADAPTERS
from adapters.formats.layer_names import FRONTS, WRAPPERS, without_fronts, without_wrappers

MAX_RANK = 1024  # the largest known LoRA has 256
MAX_CHANGE = 1e30  # norm of dW: far beyond any weight, far below float32's maximum

ALPHA = "alpha"

# A tensor's name in files, after the layer's name and a dot -> its part.
SUFFIXES = {
    **{f"{down}.weight": DOWN for down in ("lora_A", "lora_down", "lora.down")},
    **{f"{up}.weight": UP for up in ("lora_B", "lora_up", "lora.up")},
    "lora_B.bias": "lora_B.bias",
    **{f"lora_magnitude_vector{rest}": MAGNITUDE for rest in ("", ".weight")},
    "dora_scale": MAGNITUDE,
    **{name: name for name in ("alpha", "diff", "diff_b")},
    "w_norm": "diff",
    "b_norm": "diff_b",
    **{f"lokr_w{n}{rest}": f"lokr_w{n}{rest}" for n in (1, 2) for rest in ("", "_a", "_b")},
    **{f"hada_w{n}_{rest}": f"hada_w{n}_{rest}" for n in (1, 2) for rest in "ab"},
}
# PEFT inserts the adapter's name: lora_A.default.weight.
_NAMED = {
    ("lora_A", "weight"): DOWN,
    ("lora_down", "weight"): DOWN,
    ("lora_B", "weight"): UP,
    ("lora_up", "weight"): UP,
    ("lora_B", "bias"): "lora_B.bias",
    ("lora_magnitude_vector", "weight"): MAGNITUDE,
}
# Known tensors that are not supported.
_UNREAD = (
    *((pattern, f"a part of {adapter}") for adapter, pattern in OTHER_ADAPTERS),
    (re.compile(r"\.(?:lokr_t[12]|hada_t[12]|lora_mid)(?:\.weight)?$"), "a Tucker factor"),
    (re.compile(r"\.lora_embedding_[AB](?:\.\w+)*$"), "a LoRA of an embedding layer"),
    (re.compile(r"\.(?:set_weight|reshape_weight)$"), "a weight that replaces the model's"),
    (re.compile(r"^bundle_emb\."), "a token's embedding"),
    (
        re.compile(r"\.(?:weight|bias)$"),
        "a whole weight, and the file does not say whether to add it or to replace the model's",
    ),
)

Parts = Mapping[str, Tensor]  # tensors of one layer by part


class Fault(ValueError):
    """A layer that cannot be read. The message is the end of a sentence "LAYER …"."""


@dataclass(frozen=True)
class Key:
    """A parsed tensor name of a LoRA file."""

    layer: str  # the file's name for it, without prefixes for the whole model
    part: str
    adapter: str = ""  # PEFT's adapter name


def split_key(key: str) -> Key | None:
    """Parses a tensor's name into layer and part; None if it is not known.

    `adapters.formats.layout.Layout.fit` finds the model's layer for it.
    """
    parts = key.split(".")
    for length in (1, 2, 3):  # of the suffix
        found = SUFFIXES.get(".".join(parts[-length:])) if length < len(parts) else None
        if found is not None:
            return _key(parts[:-length], found, "")
    if len(parts) > 3 and (parts[-3], parts[-1]) in _NAMED:
        return _key(parts[:-3], _NAMED[parts[-3], parts[-1]], parts[-2])
    if len(parts) > 2 and parts[-2] == "lora_magnitude_vector":
        return _key(parts[:-2], MAGNITUDE, parts[-1])
    return None


def _key(layer: list[str], part: str, adapter: str) -> Key:
    if layer[0] in FRONTS or not WRAPPERS.isdisjoint(layer):
        layer = without_fronts(without_wrappers(layer)) or layer
    return Key(".".join(layer), part, adapter)


def unread(key: str) -> str:
    """An error message for a tensor that `split_key` does not know."""
    for pattern, what in _UNREAD:
        if pattern.search(key):
            return f"{key} is {what}, which is not supported"
    return f"{key} is not a known LoRA tensor"


def read_layer(parts: Parts, header: Callable[[int], float | None]) -> dict[str, Delta]:
    """The changes of one layer: of its weight under "", of its bias under ".bias".

    `header` maps a rank to the alpha / rank in the file's header, or None if it has none. Raises
    `Fault`.
    """
    if all(part == ALPHA for part in parts):
        raise Fault("has only alpha")
    for part, tensor in parts.items():
        if not tensor.is_floating_point() and part != ALPHA:
            raise Fault(f"has {tensor.dtype} in {part}, not floating point numbers")
    for form in _FORMS:
        if form.has & parts.keys():
            deltas = form.read(parts, header)
            strange = parts.keys() - form.may_have
            if strange or ("diff_b" in parts and ".bias" in deltas and form.name == "LoRA"):
                strange = strange or {"diff_b", "lora_B.bias"}
                raise Fault(f"has {form.name} together with {', '.join(sorted(strange))}")
            return {**deltas, **_bias_change(parts)}
    raise Fault(f"has only {', '.join(sorted(parts))}")


def scale_of(parts: Parts, header: Callable[[int], float | None]) -> float:
    """alpha / rank of a layer with `lora_A` and `lora_B`. Raises `Fault`."""
    return _scale(parts, _rank(parts, UP, DOWN), header)


def _read_lora(parts: Parts, header: Callable[[int], float | None]) -> dict[str, Delta]:
    _demand(parts, DOWN, UP)
    rank = _rank(parts, UP, DOWN)
    scale = _scale(parts, rank, header)
    deltas: dict[str, Delta] = {"": LowRank(_owned(parts, DOWN), _owned(parts, UP, scale))}
    if "lora_B.bias" in parts:
        deltas[".bias"] = Dense(_owned(parts, "lora_B.bias", scale))
    _check_change(parts, (DOWN, UP), scale)
    return _with_magnitude(deltas, parts)


def _read_lokr(parts: Parts, header: Callable[[int], float | None]) -> dict[str, Delta]:
    sides: list[tuple[str, ...]] = []
    rank = None
    for side in ("lokr_w1", "lokr_w2"):
        pair = (f"{side}_a", f"{side}_b")
        if side in parts:
            if any(half in parts for half in pair):
                raise Fault(f"has {side} both whole and as factors")
            if parts[side].ndim != 2 or not parts[side].numel():
                raise Fault(f"has {side} of the shape {tuple(parts[side].shape)}, not a matrix")
            sides.append((side,))
        elif any(half in parts for half in pair):
            _demand(parts, *pair)
            rank = _rank(parts, *pair)
            sides.append(pair)
        else:
            has = ", ".join(sorted(part for part in parts if part.startswith("lokr")))
            raise Fault(f"has {has} but no {side}")
    # Two full matrices have no rank, and their alpha (ai-toolkit writes 1e10) has no meaning.
    scale = 1.0 if rank is None else _scale(parts, rank, header)
    left = tuple(_owned(parts, name, scale if i == 0 else 1) for i, name in enumerate(sides[0]))
    right = tuple(_owned(parts, name) for name in sides[1])
    _check_change(parts, sides[0] + sides[1], scale)
    return _with_magnitude({"": Kronecker(left, right)}, parts)


def _read_loha(parts: Parts, header: Callable[[int], float | None]) -> dict[str, Delta]:
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    _demand(parts, *names)
    rank = _rank(parts, *names[:2])
    _rank(parts, *names[2:])
    first, second = ((parts[names[n]].shape[0], parts[names[n + 1]].shape[1]) for n in (0, 2))
    if first != second:
        raise Fault(f"has two products of the shapes {first} and {second}")
    scale = _scale(parts, rank, header)
    up1, down1, up2, down2 = (_owned(parts, n, scale if n == names[0] else 1) for n in names)
    _check_change(parts, names, scale)
    return _with_magnitude({"": Hadamard((up1, down1), (up2, down2))}, parts)


def _read_diff(parts: Parts, header: Callable[[int], float | None]) -> dict[str, Delta]:
    if "diff" not in parts:
        return {}
    _check_change(parts, ("diff",), 1.0)
    return {"": Dense(_owned(parts, "diff"))}


def _bias_change(parts: Parts) -> dict[str, Delta]:
    """`diff_b`, which LoRAs extracted by ComfyUI have in addition to the weight's LoRA."""
    if "diff_b" not in parts:
        return {}
    _check_change(parts, ("diff_b",), 1.0)
    return {".bias": Dense(_owned(parts, "diff_b"))}


@dataclass(frozen=True)
class _Form:
    name: str
    has: frozenset[str]  # any of these parts identifies the form
    extra: frozenset[str]  # other parts that it may have
    read: Callable[[Parts, Callable[[int], float | None]], dict[str, Delta]]

    @property
    def may_have(self) -> frozenset[str]:
        return self.has | self.extra


def _starting(prefix: str) -> frozenset[str]:
    return frozenset(part for part in SUFFIXES.values() if part.startswith(prefix))


_SCALED = frozenset((ALPHA, MAGNITUDE, "diff_b"))
_FORMS = (
    _Form("LoRA", frozenset((DOWN, UP)), _SCALED | {"lora_B.bias"}, _read_lora),
    _Form("LoKr", _starting("lokr"), _SCALED, _read_lokr),
    _Form("LoHa", _starting("hada"), _SCALED, _read_loha),
    _Form("a whole change", _starting("diff"), frozenset(), _read_diff),
)


def _demand(parts: Parts, *names: str) -> None:
    missing = [name for name in names if name not in parts]
    if missing:
        present = ", ".join(name for name in names if name in parts)
        raise Fault(f"has {present} but no {', '.join(missing)}")


def _rank(parts: Parts, up: str, down: str) -> int:
    """The rank of [out, rank] and [rank, in]. Raises `Fault` for other shapes."""
    left, right = parts[up], parts[down]
    fits = left.ndim == right.ndim == 2 and left.shape[1] == right.shape[0]
    if not fits or not left.numel() or not right.numel():
        shapes = f"{tuple(right.shape)} and {tuple(left.shape)}"
        raise Fault(f"has the shapes {shapes}, not [rank, in] and [out, rank]")
    if len(right) > MAX_RANK:
        raise Fault(f"has rank {len(right)}; {MAX_RANK} is the limit")
    return len(right)


def _scale(parts: Parts, rank: int, header: Callable[[int], float | None]) -> float:
    """alpha / rank: by the layer's alpha, else by the header's; 1 without both."""
    if ALPHA not in parts:
        found = header(rank)
        return 1.0 if found is None else found
    alpha = parts[ALPHA]
    known = not alpha.is_meta  # on meta, only the header has been read
    if alpha.numel() != 1 or (known and not 0 < float(alpha) < math.inf):
        raise Fault("has an alpha that is not one positive number")
    if not known:
        return 1.0
    return float(alpha) / rank


def _owned(parts: Parts, name: str, scale: float = 1.0) -> Tensor:
    """A float32 copy of a part, independent of the file, which may be memory-mapped and change."""
    owned = parts[name].to(torch.float32, copy=True)
    return owned if scale == 1 else owned.mul_(scale)


def _check_change(parts: Parts, names: tuple[str, ...], scale: float) -> None:
    """Raises `Fault` unless all values and a bound of the product's norm are finite."""
    if any(parts[name].is_meta for name in names):  # only the header has been read
        return
    norms = {name: _norm(parts[name]) for name in parts if name != ALPHA}
    if not all(map(math.isfinite, norms.values())):
        raise Fault("contains NaN or infinity")
    bound = math.prod(norms[name] for name in names) * scale
    if not bound < MAX_CHANGE:
        raise Fault(f"changes its weight by up to {bound:.0e}; {MAX_CHANGE:.0e} is the limit")


_PIECE = 1 << 20  # values


def _norm(tensor: Tensor) -> float:
    """The norm in float64, in chunks: a whole copy of an 8-bit tensor takes 8 times its memory."""
    if tensor.numel() <= _PIECE:
        return float(torch.linalg.vector_norm(tensor.double()))
    return math.hypot(*map(_norm, tensor.flatten().split(_PIECE)))


def _with_magnitude(deltas: dict[str, Delta], parts: Parts) -> dict[str, Delta]:
    if MAGNITUDE not in parts:
        return deltas
    magnitude, (rows, columns) = _owned(parts, MAGNITUDE), deltas[""].shape
    if magnitude.ndim == 1:
        magnitude = magnitude[:, None]
    if tuple(magnitude.shape) not in ((rows, 1), (1, columns)):
        raise Fault(f"has DoRA magnitudes of the shape {tuple(magnitude.shape)} for {rows} rows")
    return {**deltas, "": Dora(deltas[""], magnitude)}
