"""Exact linear algebra on low-rank matrices B @ A, without multiplying them out."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adapters.formats import Delta, Dora, as_delta
from adapters.tools.opened import ToolError

_EXACT = 256  # smaller side of a matrix whose decomposition takes less than 0.1 s
_OVERSAMPLE = 8
_PRODUCTS = 8  # at most
_GAIN = 1e-3


class Singular(NamedTuple):
    """A singular value decomposition U diag(S) Vh, S descending, in float32."""

    u: Tensor  # [out, rank]
    s: Tensor  # [rank]
    vh: Tensor  # [rank, in]

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """(A, B) of the best approximation of this rank (Eckart and Young 1936).

        Both factors get the square root of the singular values.
        """
        root = self.s[:rank].sqrt()
        return root[:, None] * self.vh[:rank], self.u[:, :rank] * root


def singular(down: Tensor, up: Tensor) -> Singular:
    """The singular values and vectors of B @ A from A [rank, in] and B [out, rank].

    QR of both factors, then the decomposition of a matrix of their ranks: exact to rounding, and a
    thousand times faster than that of the [out, in] matrix.
    """
    q_up, r_up = torch.linalg.qr(up.float())
    q_down, r_down = torch.linalg.qr(down.float().T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    return Singular(q_up @ u, s, vh @ q_down.T)


def singular_of(name: str, delta: Delta) -> Singular:
    """The same of a change of any kind. Raises `ToolError` for one that is no matrix, or a DoRA."""
    if isinstance(delta, Dora):
        raise ToolError(f"{name} is a DoRA, whose change depends on the base model's weights")
    if len(delta.shape) != 2:
        raise ToolError(f"{name} changes a bias or a norm, which a LoRA cannot; it has no rank")
    if isinstance(delta, tuple):
        return singular(*delta)
    total = torch.zeros(delta.shape)
    as_delta(delta).add_to(total, total, 1.0)
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    return Singular(u, s, vh)


def leading_singular(matrix: Tensor, rank: int) -> Singular:
    """The first `rank` singular values and vectors of a matrix [out, in] in float32.

    Exact for small matrices. Otherwise by randomized subspace iteration (Halko, Martinsson and
    Tropp 2011, arXiv 0909.4061, algorithm 4.4), until a further product explains less than
    `_GAIN` of the squared norm more. The same matrix always gives the same result.
    """
    width = min(rank + _OVERSAMPLE, *matrix.shape)
    if min(matrix.shape) <= max(_EXACT, 2 * width):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return Singular(u[:, :rank], s[:rank], vh[:rank])
    generator = torch.Generator().manual_seed(0)
    start = matrix @ torch.randn(matrix.shape[1], width, generator=generator)
    basis = torch.linalg.qr(start).Q
    sides = matrix.T, matrix
    enough = _GAIN * float(matrix.norm()) ** 2
    explained = 0.0
    for number in range(_PRODUCTS):
        product = sides[number % 2] @ basis
        gain = float(product.norm()) ** 2 - explained
        explained += gain
        if gain < enough:
            break
        if number + 1 < _PRODUCTS:
            basis = torch.linalg.qr(product).Q
    # product = side @ basis with an orthonormal basis: the other factor of the approximation.
    u, s, vh = torch.linalg.svd(product, full_matrices=False)
    inner = basis @ vh.T
    if number % 2:  # side is the matrix
        return Singular(u[:, :rank], s[:rank], inner.T[:rank])
    return Singular(inner[:, :rank], s[:rank], u.T[:rank])


def shares(values: Tensor, total: float | None = None) -> list[float]:
    """For each rank, the share of the squared norm that the first singular values have.

    total: the squared norm; by default that of the values.
    """
    squares = values.double() ** 2
    whole = float(squares.sum()) if total is None else total
    return (squares.cumsum(0) / max(whole, 1e-300)).tolist()


def rank_for(shares: Sequence[float], energy: float) -> int:
    """The lowest rank with this share; the highest one if none has it."""
    return min(1 + sum(each < energy * (1 - 1e-9) for each in shares), len(shares))


def norm(down: Tensor, up: Tensor) -> float:
    """The Frobenius norm of B @ A: the root of tr((B' B) (A A')).

    In the factors' dtype, which must be float64 for a sum that nearly cancels.
    """
    return math.sqrt(max(float(((up.T @ up).double() * (down @ down.T).double()).sum()), 0.0))


def distance(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """The Frobenius norm of the difference of two changes (A, B)."""
    (down, up), (other_down, other_up) = one, other
    if down.shape == other_down.shape:  # rounded: B A - B' A' = B (A - A') + (B - B') A'
        downs, ups = (down - other_down, other_down), (up, up - other_up)
        return norm(torch.cat(downs), torch.cat(ups, dim=1))
    downs, ups = (down.double(), other_down.double()), (up.double(), -other_up.double())
    return norm(torch.cat(downs), torch.cat(ups, dim=1))
