"""What an adapter changes about one weight, in each of the forms that files come in.

Every form answers with dW for a weight W0 in float32; scales that belong to the file (alpha / rank)
are already multiplied in. A form is kept as its small factors and multiplied out when it is laid
over the weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Delta(Protocol):
    """A change of one weight."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of dW, known without multiplying it out."""
        ...

    def tensors(self) -> tuple[Tensor, ...]:
        """The factors it is kept as."""
        ...

    def rows(self, start: int, stop: int) -> "Delta":
        """The same change of a part of the rows, for a weight that files keep fused."""
        ...

    def add_to(self, total: Tensor, original: Tensor, scale: float) -> None:
        """Adds scale * dW to `total` (float32, W0's device) in place; `pristine` is W0."""
        ...


# Weights, or biases as `<layer>.bias`, by their layer's name; plain pairs (A, B) are LoRA.
Deltas = Mapping[str, Delta | tuple[Tensor, Tensor]]


class LowRank(NamedTuple):
    """LoRA (Hu et al. 2021, arXiv 2106.09685): dW = B @ A. A pair like any other (A, B)."""

    down: Tensor  # A [rank, in]
    up: Tensor  # B [out, rank]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.up.shape[0], self.down.shape[1]

    def tensors(self) -> tuple[Tensor, ...]:
        return self

    def rows(self, start: int, stop: int) -> "LowRank":
        return LowRank(self.down, self.up[start:stop])

    def add_to(self, total: Tensor, original: Tensor, scale: float) -> None:
        total.addmm_(self.up.to(total), self.down.to(total), alpha=scale)


@dataclass(frozen=True)
class Dense:
    """A whole dW, as `.diff` and `.diff_b` hold it."""

    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.value,)

    def rows(self, start: int, stop: int) -> "Dense":
        return Dense(self.value[start:stop])

    def add_to(self, total: Tensor, original: Tensor, scale: float) -> None:
        total.add_(self.value.to(total), alpha=scale)


@dataclass(frozen=True)
class Kronecker:
    """LoKr (Yeh et al. 2023, arXiv 2309.14859): dW = kron(left, right).

    Either side is one matrix, or two whose product it is.
    """

    left: tuple[Tensor, ...]
    right: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        left, right = _product_shape(self.left), _product_shape(self.right)
        return left[0] * right[0], left[1] * right[1]

    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.left, *self.right)

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

    def rows(self, start: int, stop: int) -> "Hadamard":
        (up1, down1), (up2, down2) = self.first, self.second
        return Hadamard((up1[start:stop], down1), (up2[start:stop], down2))

    def add_to(self, total: Tensor, original: Tensor, scale: float) -> None:
        total.addcmul_(_product(self.first, total), _product(self.second, total), value=scale)


@dataclass(frozen=True)
class Rows:
    """Some rows of a change that has to be multiplied out as a whole."""

    whole: Delta
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stop - self.start, *self.whole.shape[1:]

    def tensors(self) -> tuple[Tensor, ...]:
        return self.whole.tensors()

    def rows(self, start: int, stop: int) -> "Rows":
        return Rows(self.whole, self.start + start, self.start + stop)

    def add_to(self, total: Tensor, original: Tensor, scale: float) -> None:
        dense = total.new_zeros(self.whole.shape)
        self.whole.add_to(dense, dense, 1.0)
        total.add_(dense[self.start : self.stop], alpha=scale)


@dataclass(frozen=True)
class Dora:
    """DoRA (Liu et al. 2024, arXiv 2402.09353): W = magnitude * (W0 + dV) / ||W0 + dV||.

    The norm is taken of every row, or of every column where `magnitude` is [1, in]. dW is W - W0,
    so a scale goes in a straight line from the base through the adapted weight, as in ComfyUI.
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

    def rows(self, start: int, stop: int) -> "Dora":
        """Raises `ValueError` where the norm goes down the rows, which then belong together."""
        if self.by_column:
            raise ValueError("DoRA magnitudes by column cannot be split into rows")
        return Dora(self.direction.rows(start, stop), self.magnitude[start:stop])

    def add_to(self, total: Tensor, original: Tensor, scale: float) -> None:
        weight = original.to(total)
        adapted = weight.clone()
        self.direction.add_to(adapted, original, 1.0)
        norm = adapted.norm(dim=0 if self.by_column else 1, keepdim=True)
        # A row of zeros has no direction, and stays.
        adapted.mul_(self.magnitude.to(total) / norm.clamp_min(torch.finfo(norm.dtype).tiny))
        total.add_(adapted.sub_(weight), alpha=scale)


def as_delta(delta: Delta | tuple[Tensor, Tensor]) -> Delta:
    """A pair (A, B) as the LoRA it is; any other change as it comes."""
    return LowRank(*delta) if isinstance(delta, tuple) else delta


def is_zero(delta: Delta | tuple[Tensor, Tensor]) -> bool:
    """Whether a change is zero because one of its factors is, as in a LoRA that learned nothing."""
    if isinstance(delta, Rows):
        return is_zero(delta.whole)
    if isinstance(delta, Dora):
        return False  # its magnitude may change the weight all the same
    return not all(bool(tensor.any()) for tensor in as_delta(delta).tensors())


def bytes_of(deltas: Deltas) -> int:
    """Memory that the factors take; what several layers share counts once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for delta in deltas.values()
        for tensor in as_delta(delta).tensors()
    }
    return sum(storages.values())


def _product(factors: tuple[Tensor, ...], like: Tensor) -> Tensor:
    first, *rest = (factor.to(like) for factor in factors)
    return first @ rest[0] if rest else first


def _product_shape(factors: tuple[Tensor, ...]) -> tuple[int, int]:
    return factors[0].shape[0], factors[-1].shape[1]
