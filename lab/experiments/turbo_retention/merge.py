"""The cost of merging the adapter, and how exactly it is removed for inference."""

import statistics
import time

import torch
from torch import Tensor, nn

from adapters.formats.lora_file import plain_factors
from adapters.lora import Lora
from adapters.merging import LoraMerger
from adapters.turbo import TurboAdapter
from families.family import Family
from families.loading import default_device, load_family
from families.registry import BASES
from lab.experiments.turbo_retention.design import CONDITIONS, TURBO, Plan
from lab.experiments.turbo_retention.training import train, training_adapter

STEPS = 20  # timed training steps
# One block of Z-Image: width 3,840, feed-forward 10,240, modulation from 256 to 4 x 3,840
# (diffusers, ZImageTransformer2DModel's defaults); the published adapter names these eight.
BLOCKS = 30
BLOCK = {
    **{f"attention.to_{name}": (3840, 3840) for name in ("q", "k", "v", "out")},
    "feed_forward.w1": (10240, 3840),
    "feed_forward.w2": (3840, 10240),
    "feed_forward.w3": (10240, 3840),
    "adaLN_modulation": (15360, 256),
}
RANK = 32


def main() -> None:
    """Prints the figures that docs/turbo.md quotes."""
    share = training_adapter().merge(load_family(BASES[TURBO]).transformer, TURBO)
    print(f"the miniature's adapter: |dW|/|W| = {share:.4f}")
    cost, steps = merging_seconds(), 1000 / steps_per_second()
    print(f"miniature: merging {1000 * cost:.1f} ms, 1000 steps {steps:.0f} s: {cost / steps:.3%}")
    block = block_seconds()
    print(f"Z-Image's size: {block:.3f} s a block, {BLOCKS * block:.1f} s for {BLOCKS}")
    for dtype, error in inversion_errors().items():
        print(
            f"merged base + LoRA - adapter against the pristine base + LoRA, {dtype}: {error:.1e}"
        )


def merging_seconds() -> float:
    """Median of five merges into the miniature, float32."""
    adapter, seconds = training_adapter(), []
    transformer = load_family(BASES[TURBO]).transformer
    for _ in range(5):
        begun = time.perf_counter()
        adapter.merge(transformer, TURBO)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def steps_per_second() -> float:
    """Of the miniature's own training."""
    return next(train(CONDITIONS[0], Plan("timed", (STEPS,)), seed=0)).steps_per_second


def block_seconds() -> float:
    """Best of three merges into one block of Z-Image's size in bfloat16.

    By the clock on a GPU, else time of the CPU core, which other programs do not lengthen.
    """
    random, device = torch.Generator().manual_seed(0), default_device()
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    layers, factors = nn.Module(), {}
    for name, (rows, columns) in BLOCK.items():
        layer = nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16, device=device)
        layers.add_module(name.replace(".", "_"), layer.requires_grad_(False))
        down = torch.randn(RANK, columns, generator=random) / columns**0.5
        factors[name.replace(".", "_")] = (down, torch.randn(rows, RANK, generator=random) / 10)
    adapter, seconds = TurboAdapter("random", "", factors), []
    for _ in range(3):
        begun = clock()
        adapter.merge(layers, "one block")
        seconds.append(clock() - begun)
    return min(seconds)


@torch.inference_mode()
def inversion_errors() -> dict[str, float]:
    """Relative error of one velocity when the adapter is merged, and taken out by -1 afterwards.

    Against the pristine base, which is what previews and predictions use; by data type.
    """
    adapter, errors = training_adapter(), {}
    for dtype in (torch.float32, torch.bfloat16):
        family = load_family(BASES[TURBO], torch.device("cpu"), dtype)
        lora = Lora(family.transformer, family.lora_targets(), 32, seed=0)
        random = torch.Generator().manual_seed(0)
        factors = {
            name: (down, torch.randn(up.shape, generator=random) / 50)
            for name, (down, up) in plain_factors(lora.deltas(), "the LoRA").items()
        }
        lora.remove()
        LoraMerger(family.transformer).apply([(factors, 1.0)])
        ours = _velocity(family)

        family = load_family(BASES[TURBO], torch.device("cpu"), dtype)
        adapter.merge(family.transformer, TURBO)
        LoraMerger(family.transformer).apply([(factors, 1.0)])
        adapter.merge(family.transformer, TURBO, weight=-1.0)
        theirs = _velocity(family)
        errors[str(dtype).removeprefix("torch.")] = ((ours - theirs).norm() / ours.norm()).item()
    return errors


def _velocity(family: Family) -> Tensor:
    noise = family.initial_noise([0], 64, 64)
    text = family.encode_prompts(["a red star in the snow"])
    return family.velocity(noise, torch.tensor([0.7]), text)
