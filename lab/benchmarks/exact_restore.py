"""python -m lab.benchmarks.exact_restore: what original weights need besides the merged ones.

A merged weight is W' = round(W + dW). W is restored exactly from W', the LoRA, and something small:
round(W' - dW) is W in most places, and a list has the others, as an index of 4 bytes and a value of
2; or every weight has the distance from it, in steps of bfloat16, in 8 or 4 bits, with a list of
those that do not fit. Printed in bytes for each weight, where a copy takes 2. `difference` is that
of W and W' themselves in 8 bits, which needs no LoRA. On the miniature's weights and on normal
ones, for LoRAs of several norms. Products are float32; restoring needs the same result twice.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from families.loading import load_family
from families.registry import find_base
from lab.benchmarks.machine import machine

NORMS = (0.001, 0.01, 0.05, 0.3, 1.0)  # |dW| / |W|
RANK = 16
ENTRY = 6  # bytes of a list's entry
HEAD = "| weights | norm of the LoRA | a list | 8 bits | 4 bits | difference | entropy |"
HEAD += "\n" + "| --- " * 7 + "|"


@dataclass(frozen=True)
class Need:
    """Bytes for each weight."""

    listed: float
    eight_bits: float
    four_bits: float
    difference: float
    entropy: float  # bits of the distances: what no code can go below on average


def order(values: Tensor) -> Tensor:
    """bfloat16 numbers as integers, one apart for neighbours."""
    bits = values.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def merged(weight: Tensor, change: Tensor) -> Tensor:
    """A float32 sum that is rounded once."""
    return (weight.float() + change).bfloat16()


def restored(weight: Tensor, change: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """The original weight from the merged one, the LoRA's change and the list."""
    original = merged(weight, -change)
    original.view(-1)[places] = values
    return original


def need(weights: Sequence[Tensor], norm: float) -> Need:
    """What these bfloat16 weights need with a random LoRA; raises if one is not restored."""
    distances, differences = [], []
    for seed, weight in enumerate(weights):
        generator = torch.Generator().manual_seed(seed)
        down = torch.randn(RANK, weight.shape[1], generator=generator)
        change = torch.randn(weight.shape[0], RANK, generator=generator) @ down
        change *= norm * weight.float().norm() / change.norm()
        new = merged(weight, change)
        near = merged(new, -change)
        places = (near != weight).view(-1).nonzero().view(-1)
        if not torch.equal(restored(new, change, places, weight.view(-1)[places]), weight):
            raise ArithmeticError("a weight was not restored")
        distances.append((order(weight) - order(near)).view(-1))
        differences.append((order(weight) - order(new)).view(-1))
    distance, difference = torch.cat(distances), torch.cat(differences)
    counts = distance.clamp(-1000, 1000).unique(return_counts=True)[1]
    shares = counts.double() / counts.sum()
    return Need(
        ENTRY * _share(distance, 0),
        1 + ENTRY * _share(distance, 127),
        0.5 + ENTRY * _share(distance, 7),
        1 + ENTRY * _share(difference, 127),
        float(-(shares * shares.log2()).sum()),
    )


def _share(steps: Tensor, most: int) -> float:
    """The share that is further away than `most` steps."""
    return float((steps.abs() > most).double().mean())


def normal_weights(side: int = 2048) -> list[Tensor]:
    """Normal numbers of the size of published weights."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(side, side, generator=generator) * 0.02).bfloat16()]


def miniature_weights() -> list[Tensor]:
    """The trained linear layers of the miniature."""
    family = load_family(find_base("miniature-turbo"), torch.device("cpu"), torch.bfloat16)
    linears = [each for each in family.transformer.modules() if isinstance(each, nn.Linear)]
    return [each.weight.detach() for each in linears]


def rows() -> Iterator[str]:
    """The table."""
    for norm in NORMS:
        for name, weights in (("normal", normal_weights()), ("miniature", miniature_weights())):
            each = need(weights, norm)
            sizes = each.listed, each.eight_bits, each.four_bits, each.difference
            cells = [f"{size:.3f}" for size in sizes]
            yield f"| {name} | {norm:.1%} | {' | '.join(cells)} | {each.entropy:.2f} bits |"


def main() -> None:
    print(f"{machine()}\n{HEAD}")
    for row in rows():
        print(row, flush=True)


if __name__ == "__main__":
    main()
