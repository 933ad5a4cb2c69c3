"""Weight changes dW of one layer, in each parametrization that files contain (LoRA, LoKr, …).

dW is computed in float32; the file's own scale (alpha / rank) is already multiplied in. A change is
kept as its small factors and multiplied out when it is merged into the weight.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Names of factors, as in `adapters.formats.lora_formats`.
DOWN, UP, MAGNITUDE = "lora_A", "lora_B", "magnitude"


class Delta(Protocol):
    """A change of one weight."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of dW, without multiplying it out."""
        ...

    def tensors(self) -> tuple[Tensor, ...]:
        """The factors in memory."""
        ...

    def parts(self) -> dict[str, Tensor]:
        """The factors by their names in `adapters.formats.lora_formats`, at scale 1.

        `delta_of` is the inverse.
        """
        ...

    def norm(self) -> float | None:
        """The Frobenius norm of dW; None if it depends on the original weight."""
        ...

    def rows(self, start: int, stop: int) -> "Delta":
        """The change of some rows, to split a fused weight."""
        ...

    def add_to(self, total: Tensor, original: Tensor, scale: float) -> None:
        """Adds scale * dW to `total` (float32, W0's device) in place; `original` is W0."""
        ...


# Changes of weights by layer name, and of biases as `<layer>.bias`; plain pairs (A, B) are LoRA.
Deltas = Mapping[str, Delta | tuple[Tensor, Tensor]]


class LowRank(NamedTuple):
    """LoRA (Hu et al. 2021, arXiv 2106.09685): dW = B @ A."""

    down: Tensor  # A [rank, in]
    up: Tensor  # B [out, rank]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.up.shape[0], self.down.shape[1]

    def tensors(self) -> tuple[Tensor, ...]:
        return self

    def parts(self) -> dict[str, Tensor]:
        return {DOWN: self.down, UP: self.up}

    def norm(self) -> float:
        """Without the product: |BA|^2 = sum((B^T B) * (A A^T)), in float64."""
        down, up = self.down.double(), self.up.double()
        squared = float(((up.T @ up) * (down @ down.T)).sum())
        return math.sqrt(squared) if squared > 0 else 0.0 if squared <= 0 else math.nan

    def rows(self, start: int, stop: int) -> "LowRank":
        return LowRank(self.down, self.up[start:stop])

    def add_to(self, total: Tensor, original: Tensor, scale: float) -> None:
        total.addmm_(self.up.to(total), self.down.to(total), alpha=scale)


@dataclass(frozen=True)
class Dense:
    """A full dW, as in `.diff` and `.diff_b`."""

    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.value,)

    def parts(self) -> dict[str, Tensor]:
        return {"diff": self.value}

    def norm(self) -> float:
        return _norm(self.value)

    def rows(self, start: int, stop: int) -> "Dense":
        return Dense(self.value[start:stop])

    def add_to(self, total: Tensor, original: Tensor, scale: float) -> None:
        total.add_(self.value.to(total), alpha=scale)


@dataclass(frozen=True)
class Kronecker:
    """LoKr (Yeh et al. 2023, arXiv 2309.14859): dW = kron(left, right).

    Each side is one matrix or a product of two.
    """

    left: tuple[Tensor, ...]
    right: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        left, right = _product_shape(self.left), _product_shape(self.right)
        return left[0] * right[0], left[1] * right[1]

    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.left, *self.right)

    def parts(self) -> dict[str, Tensor]:
        return _side("lokr_w1", self.left) | _side("lokr_w2", self.right)

    def norm(self) -> float:
        return _norm_of_product(self.left) * _norm_of_product(self.right)

    def rows(self, start: int, stop: int) -> "Rows":
        return Rows(self, start, stop)

    def add_to(self, total: Tensor, original: Tensor, scale: float) -> None:
        total.add_(torch.kron(_product(self.left, total), _product(self.right, total)), alpha=scale)


@dataclass(frozen=True)
class Hadamard:
    """LoHa (Hyeon-Woo et al. 2021, arXiv 2108.06098): dW = (B1 @ A1) * (B2 @ A2)."""

    first: tuple[Tensor, Tensor]
    second: tuple[Tensor, Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        return _product_shape(self.first)

    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.first, *self.second)

    def parts(self) -> dict[str, Tensor]:
        return _side("hada_w1", self.first) | _side("hada_w2", self.second)

    def norm(self) -> float:
        return self.low_rank().norm()

    def low_rank(self) -> LowRank:
        """The same dW as a plain LoRA; its rank is the product of the two (Slyusar 1999).

        A row of A is the product of two rows, one of each A; a column of B of two columns.
        """
        (up1, down1), (up2, down2) = self.first, self.second
        down = (down1[:, None] * down2[None]).flatten(0, 1)
        return LowRank(down, (up1[:, :, None] * up2[:, None]).flatten(1))

    def rows(self, start: int, stop: int) -> "Hadamard":
        (up1, down1), (up2, down2) = self.first, self.second
        return Hadamard((up1[start:stop], down1), (up2[start:stop], down2))

    def add_to(self, total: Tensor, original: Tensor, scale: float) -> None:
        total.addcmul_(_product(self.first, total), _product(self.second, total), value=scale)


@dataclass(frozen=True)
class Rows:
    """Some rows of a change that can only be multiplied out as a whole."""

    whole: Delta
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stop - self.start, *self.whole.shape[1:]

    def tensors(self) -> tuple[Tensor, ...]:
        return self.whole.tensors()

    def parts(self) -> dict[str, Tensor]:
        return {"diff": self._dense()}

    def norm(self) -> float:
        return _norm(self._dense())

    def rows(self, start: int, stop: int) -> "Rows":
        return Rows(self.whole, self.start + start, self.start + stop)

    def add_to(self, total: Tensor, original: Tensor, scale: float) -> None:
        total.add_(self._dense(total), alpha=scale)

    def _dense(self, like: Tensor | None = None) -> Tensor:
        dense = (self.tensors()[0] if like is None else like).new_zeros(self.whole.shape)
        self.whole.add_to(dense, dense, 1.0)
        return dense[self.start : self.stop]


@dataclass(frozen=True)
class Dora:
    """DoRA (Liu et al. 2024, arXiv 2402.09353): W = magnitude * (W0 + dV) / ||W0 + dV||.

    The norm is per row, or per column if `magnitude` is [1, in]. dW is W - W0, so a scale
    interpolates linearly between the base and the adapted weight, as in ComfyUI.
    """

    direction: Delta  # dV
    magnitude: Tensor  # [out, 1], or [1, in]

    @property
    def by_column(self) -> bool:
        return self.magnitude.shape[0] == 1 and self.direction.shape[0] != 1

    @property
    def shape(self) -> tuple[int, ...]:
        return self.direction.shape

    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.direction.tensors(), self.magnitude)

    def parts(self) -> dict[str, Tensor]:
        return self.direction.parts() | {MAGNITUDE: self.magnitude}

    def norm(self) -> None:
        return None

    def rows(self, start: int, stop: int) -> "Dora":
        """Raises `ValueError` for norms per column, which depend on all rows."""
        if self.by_column:
            raise ValueError("DoRA magnitudes by column cannot be split into rows")
        return Dora(self.direction.rows(start, stop), self.magnitude[start:stop])

    def add_to(self, total: Tensor, original: Tensor, scale: float) -> None:
        weight = original.to(total)
        adapted = weight.clone()
        self.direction.add_to(adapted, original, 1.0)
        norm = adapted.norm(dim=0 if self.by_column else 1, keepdim=True)
        # A row of zeros has no direction and stays zero.
        adapted.mul_(self.magnitude.to(total) / norm.clamp_min(torch.finfo(norm.dtype).tiny))
        total.add_(adapted.sub_(weight), alpha=scale)


def as_delta(delta: Delta | tuple[Tensor, Tensor]) -> Delta:
    """A pair (A, B) as `LowRank`; any other change unchanged."""
    return LowRank(*delta) if isinstance(delta, tuple) else delta


def delta_of(parts: Mapping[str, Tensor]) -> Delta:
    """The change with these factors at scale 1: the inverse of `Delta.parts`."""
    if MAGNITUDE in parts:
        direction = {name: each for name, each in parts.items() if name != MAGNITUDE}
        return Dora(delta_of(direction), parts[MAGNITUDE])
    if DOWN in parts:
        return LowRank(parts[DOWN], parts[UP])
    if "hada_w1_a" in parts:
        first, second = (_factors(parts, f"hada_w{n}") for n in (1, 2))
        return Hadamard((first[0], first[1]), (second[0], second[1]))
    if "diff" in parts:
        return Dense(parts["diff"])
    return Kronecker(_factors(parts, "lokr_w1"), _factors(parts, "lokr_w2"))


def is_zero(delta: Delta | tuple[Tensor, Tensor]) -> bool:
    """Whether dW is zero because a factor is zero, as in an untrained LoRA."""
    if isinstance(delta, Rows):
        return is_zero(delta.whole)
    if isinstance(delta, Dora):
        return False  # the magnitude alone may change the weight
    return not all(bool(tensor.any()) for tensor in as_delta(delta).tensors())


def bytes_of(deltas: Deltas) -> int:
    """Bytes of memory of the factors; shared storage counts once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for delta in deltas.values()
        for tensor in as_delta(delta).tensors()
    }
    return sum(storages.values())


def _side(name: str, factors: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """A matrix, or the two factors of it, by their names in a file."""
    names = (name,) if len(factors) == 1 else (f"{name}_a", f"{name}_b")
    return dict(zip(names, factors, strict=True))


def _factors(parts: Mapping[str, Tensor], name: str) -> tuple[Tensor, ...]:
    """The inverse of `_side`."""
    return (parts[name],) if name in parts else (parts[f"{name}_a"], parts[f"{name}_b"])


def _norm(value: Tensor) -> float:
    return float(torch.linalg.vector_norm(value, dtype=torch.float64))


def _norm_of_product(factors: tuple[Tensor, ...]) -> float:
    return _norm(factors[0]) if len(factors) == 1 else LowRank(factors[1], factors[0]).norm()


def _product(factors: tuple[Tensor, ...], like: Tensor) -> Tensor:
    first, *rest = (factor.to(like) for factor in factors)
    return first @ rest[0] if rest else first


def _product_shape(factors: tuple[Tensor, ...]) -> tuple[int, int]:
    return factors[0].shape[0], factors[-1].shape[1]
