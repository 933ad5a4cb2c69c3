"""python -m lab.benchmarks.quantization_drift: what a quantized base changes, on the miniature.

Compares bfloat16 with int8, float8 weights (dequantized for each product) and float8 products, on
a CPU, whose `torch._scaled_mm` multiplies in float8 with the same scales as a GPU's. Prints, as
shares of the norm: the error of the weights; of a velocity, at several sigmas; of the LoRA's
gradients; and of final latents. Images are compared in levels of 255. `rounding` is bfloat16
against float32: what 16 bits change by themselves.
"""

import argparse
from typing import cast
from unittest.mock import patch

import torch
from torch import Tensor, nn

from adapters.lora import Lora
from adapters.trained_layers import LoraLinear
from families import quantization
from families.family import Family, WeightStorage
from families.frozen_linear import FrozenLinear
from families.loading import load_family
from families.registry import find_base
from inference.sampling import sample
from lab.benchmarks.machine import machine
from trainer.learning.loss import flow_loss

KINDS = ("rounding", "int8", "fp8", "fp8 products")
SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
PROMPTS = ("a red circle", "a blue square on grass", "a photo of a robot", "two green stars")
RANK = 16
HEAD = "| base | stored | weights | velocity | gradients | latents | levels | cosine |"
HEAD += "\n" + "| --- " * 8 + "|"


def loaded(base: str, kind: str) -> Family:
    """The base on the CPU; `fp8 products` as on a GPU that has them."""
    products = kind.endswith("products")
    stored = kind.partition(" ")[0]
    storage = WeightStorage(stored if stored in quantization.QUANTIZATIONS else "none")
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    family = load_family(find_base(base), torch.device("cpu"), dtype, storage)
    with patch.object(quantization, "has_float8_products", lambda _: products):
        family.transformer  # noqa: B018 (is loaded at its first use)
    return family


def weight_error(family: Family, plain: nn.Module) -> float:
    """|dequantized W - W| / |W| over all quantized layers."""
    squares = torch.zeros(2)
    for name, layer in family.transformer.named_modules():
        if isinstance(layer, FrozenLinear):
            weight = plain.get_parameter(f"{name}.weight").float()
            wrong = layer.dequantized(torch.float32) - weight
            squares += torch.stack([wrong.square().sum(), weight.square().sum()])
    return float((squares[0] / squares[1]).sqrt()) if squares[1] else 0.0


class Facts:
    """Velocities, images and gradients of one base."""

    def __init__(self, family: Family, steps: int, edge: int) -> None:
        random = torch.Generator().manual_seed(0)
        shape = (len(PROMPTS), family.latent_channels, *family.latent_size(edge, edge))
        latents = torch.randn(shape, generator=random)
        text = [each.to(family.dtype) for each in family.encode_prompts(list(PROMPTS))]
        with torch.no_grad():
            self.velocities = torch.cat(
                [family.velocity(latents, torch.full((len(text),), s), text) for s in SIGMAS]
            ).float()
            sigmas = torch.linspace(1.0, 0.0, steps + 1)
            self.latents = sample(family, latents, sigmas, text).float()
            self.images = family.decode(self.latents).float()
        lora = Lora(family.transformer, family.lora_targets(), RANK, 0)
        for each in lora.layers.values():
            cast(LoraLinear, each).up.data.normal_(std=0.01, generator=random)
        target = torch.randn(shape, generator=random)
        for sigma in SIGMAS:
            flow_loss(family, target, latents, torch.full((len(text),), sigma), text).backward()
        self.gradients = torch.cat([each.grad.flatten() for each in lora.parameters()])  # type: ignore[union-attr]


def share(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|."""
    return float((found - wanted).norm() / wanted.norm())


def rows(base: str, steps: int, edge: int) -> list[list[str]]:
    """The rows of one base: each kind against bfloat16."""
    plain = loaded(base, "bfloat16")
    wanted = Facts(plain, steps, edge)
    weights = loaded(base, "bfloat16").transformer
    found = []
    for kind in KINDS:
        family = loaded(base, "float32" if kind == "rounding" else kind)
        error = weight_error(family, weights)
        facts = Facts(family, steps, edge)
        levels = (facts.images - wanted.images).abs().mean() * 127.5
        cosine = torch.cosine_similarity(facts.gradients, wanted.gradients, dim=0)
        values = [error, share(facts.velocities, wanted.velocities)]
        values += [share(facts.gradients, wanted.gradients), share(facts.latents, wanted.latents)]
        cells = [f"{100 * each:.2f} %" for each in values]
        found.append([base, kind, *cells, f"{levels:.2f}", f"{cosine:.4f}"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lab.benchmarks.quantization_drift", description=__doc__
    )
    parser.add_argument("--base", nargs="*", default=["miniature", "miniature-turbo"])
    parser.add_argument("--edge", type=int, default=64)
    given = parser.parse_args()
    print(f"{machine()}\n{HEAD}")
    for base in given.base:
        for row in rows(base, find_base(base).inference_steps, given.edge):
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
