"""Exact linear algebra on low-rank matrices B @ A, without multiplying them out."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from adapters.formats import Delta, Dora, as_delta
from adapters.tools.opened import ToolError


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
        raise ToolError(
            f"{name} is a DoRA, whose change depends on the base model's weights; "
            "`bake` it into the base, then `extract` a LoRA"
        )
    if len(delta.shape) != 2:
        raise ToolError(f"{name} changes a bias or a norm, which a LoRA cannot; it has no rank")
    if isinstance(delta, tuple):
        return singular(*delta)
    total = torch.zeros(delta.shape)
    as_delta(delta).add_to(total, total, 1.0)
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    return Singular(u, s, vh)


def approximate_singular(
    matrix: Tensor, rank: int, seed: int = 0, oversample: int = 8, iterations: int = 2
) -> Singular:
    """The first `rank` singular values and vectors of a matrix [out, in].

    Randomized subspace iteration (Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithm
    4.4): the error is within a few per cent of the best possible one.
    """
    generator = torch.Generator().manual_seed(seed)
    width = min(rank + oversample, *matrix.shape)
    basis = matrix @ torch.randn(matrix.shape[1], width, generator=generator)
    for _ in range(iterations):
        basis = torch.linalg.qr(basis).Q
        basis = matrix @ torch.linalg.qr(matrix.T @ basis).Q
    basis = torch.linalg.qr(basis).Q
    u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return Singular((basis @ u)[:, :rank], s[:rank], vh[:rank])


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
