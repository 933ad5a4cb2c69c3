"""Merges plain LoRAs into bfloat16 weights on a GPU, with one matrix product for each layer.

A float32 sum of a whole layer is written to memory and read again: 20 bytes for each weight. A
product of bfloat16 factors adds to the weight itself, in float32, and rounds once: 8 bytes. For
this, each float32 factor is split into the three bfloat16 numbers that add up to it (3 * 8 bits of
mantissa), and those products of terms are summed that count in float32.

Factors are copied to the GPU for many layers at once: a copy waits until the GPU has done what was
called before, and each small copy costs the same as a large one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # A [rank, in], B [out, rank]

# Float32 values of factors that are copied at once: 32 MB. A larger pair is copied alone.
GROUP = 8 << 20
# Pairs of terms of A and of B. The other pairs are below 2^-25 of the product.
_OF_DOWN = (0, 1, 2, 0, 1, 0)
_OF_UP = (0, 0, 0, 1, 1, 2)


class Merge(NamedTuple):
    """LoRAs to be merged into a weight."""

    weight: Tensor  # bfloat16 [out, in]
    set_original: Callable[[], object]  # sets the weight to its original value
    parts: Sequence[tuple[Pair, float]]  # LoRAs and scales


def fuses(weight: Tensor) -> bool:
    """Whether LoRAs are merged into this weight here."""
    plain = weight.device.type in ("cpu", "mps")  # Apple's products may not add in float32
    return not plain and weight.dtype == torch.bfloat16 and weight.dim() == 2


def merge_all(merges: Sequence[Merge]) -> None:
    """Sets each weight to its original value plus its LoRAs. Waits for nothing on the GPU."""
    with _float32_sums():
        for group in _groups(merges):
            pairs = [pair for merge in group for pair, _ in merge.parts]
            device = group[0].weight.device
            downs = iter(_terms([down for down, _ in pairs], _OF_DOWN, device))
            scaled = [up for merge in group for up in _scaled_ups(merge)]
            ups = iter(_terms(scaled, _OF_UP, device))
            for merge in group:
                _merge(merge, downs, ups)


def _merge(merge: Merge, downs: Iterator[Tensor], ups: Iterator[Tensor]) -> None:
    out, columns = merge.weight.shape
    rights = [next(downs).reshape(-1, columns) for _ in merge.parts]
    # [terms, out * rank] as [out, terms * rank]
    lefts = [
        next(ups).view(len(_OF_UP), out, -1).transpose(0, 1).reshape(out, -1) for _ in merge.parts
    ]
    alone = len(merge.parts) == 1
    left, right = (lefts[0], rights[0]) if alone else (torch.cat(lefts, 1), torch.cat(rights))
    merge.set_original()
    merge.weight.addmm_(left, right, alpha=merge.parts[0][1] if alone else 1.0)


def _scaled_ups(merge: Merge) -> list[Tensor]:
    """The factors B; those of several LoRAs are added in one product and contain their scales."""
    alone = len(merge.parts) == 1
    return [up if alone else up.float() * scale for (_, up), scale in merge.parts]


def _terms(tensors: Sequence[Tensor], order: Sequence[int], device: torch.device) -> list[Tensor]:
    """The bfloat16 terms of each tensor in that order, [len(order), values], on the device."""
    sizes = [each.numel() for each in tensors]
    pin = device.type == "cuda" and not any(each.is_cuda for each in tensors)
    packed = torch.empty(sum(sizes), dtype=torch.float32, device=tensors[0].device, pin_memory=pin)
    torch.cat([each.reshape(-1).float() for each in tensors], out=packed)
    whole = packed.to(device, non_blocking=True)
    high = whole.bfloat16()
    rest = whole - high
    middle = rest.bfloat16()
    terms = high, middle, (rest - middle).bfloat16()
    return list(torch.stack([terms[number] for number in order]).split(sizes, dim=1))


def _groups(merges: Sequence[Merge]) -> Iterator[list[Merge]]:
    """Merges in groups whose factors are copied at once."""
    group: list[Merge] = []
    size = 0
    for merge in merges:
        values = sum(each.numel() for pair, _ in merge.parts for each in pair)
        if group and size + values > GROUP:
            yield group
            group, size = [], 0
        group.append(merge)
        size += values
    if group:
        yield group


@contextmanager
def _float32_sums() -> Iterator[None]:
    """Within the context, cuBLAS adds parts of a bfloat16 product in float32 only."""
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before
