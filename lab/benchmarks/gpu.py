"""python -m lab.benchmarks.gpu: training and generation at the published sizes, on this GPU.

Needs no weights: models of the published sizes are filled with random numbers. Steps and images
are compiled as in training and inference (not with `COMPILE=0`) and timed with a sync before and
after. PyTorch counts the FLOPs of the operations that ran, recomputed activations included; they
are compared with the rate of a large bfloat16 product on the same GPU. Without a GPU it lists what
it would run.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from adapters.lora import Lora
from adapters.merging import LoraMerger
from families.family import Family
from families.recomputation import recompute
from families.registry import FAMILIES
from inference.acceleration import compile_blocks, wanted_in_training
from inference.sampling import sample
from lab.benchmarks.machine import machine
from lab.benchmarks.memory import random_family
from trainer.learning.loss import flow_loss
from trainer.learning.optimizers import make_optimizer
from trainer.memory.plan import Mode
from trainer.settings.fields import resolve
from trainer.settings.inputs import TrainingInputs

_LARGE = [family.auto_on_gpu for family in FAMILIES.values() if family.auto_on_gpu is not None]
BASES = tuple(each.name for each in sorted(_LARGE, key=lambda base: base.generation_memory))
EDGES = (512, 768, 1024)  # pixels
BATCHES = (1, 4)
IMAGE_STEPS = (8, 50)
RANK, TEXT_TOKENS = 16, 64
UNQUANTIZED = Mode()
PRODUCT = 8192  # rows and columns of the product that measures the GPU
STEP, IMAGE, LORA = "step", "image", "lora"  # kinds of work


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    base: str
    work: str  # STEP, IMAGE or LORA
    edge: int = 1024
    batch: int = 1
    steps: int = 0
    checkpointing: bool = False

    def __str__(self) -> str:
        if self.work == LORA:
            return f"{self.base}: another LoRA of rank {RANK}"
        if self.work == IMAGE:
            return f"{self.base}: an image of {self.edge} pixels in {self.steps} steps"
        kept = "recomputed" if self.checkpointing else "kept"
        return f"{self.base}: a step, {self.edge} pixels, batch {self.batch}, activations {kept}"


def cases(bases: tuple[str, ...] = BASES) -> Iterator[Case]:
    """All rows, in order."""
    for base in bases:
        for edge, batch, again in product(EDGES, BATCHES, (False, True)):
            yield Case(base, STEP, edge, batch, checkpointing=again)
        for steps in IMAGE_STEPS:
            yield Case(base, IMAGE, steps=steps)
        yield Case(base, LORA)


@dataclass(frozen=True)
class Measured:
    """One case's figures."""

    seconds: float
    peak: int  # bytes on the device, the base's weights included; 0 on a CPU
    flops: int = 0  # 0: not counted

    def cells(self, case: Case, rate: float) -> list[str]:
        """A row of the table; `rate` is that of a large product, in FLOPs per second."""
        taken = self.seconds
        time = f"{taken * 1e3:.1f} ms" if taken < 1 else f"{taken:.2f} s"
        cells = [str(case), time, f"{self.peak / 1e9:.1f} GB"]
        if not self.flops:
            return [*cells, "", ""]
        return [*cells, f"{self.flops / taken / 1e12:.1f}", f"{self.flops / taken / rate:.0%}"]


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median of `repeats` after two that warm up, the device waited for each time."""
    taken = []
    for _ in range(repeats + 2):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(device: torch.device, side: int = PRODUCT) -> float:
    """Operations per second of a square bfloat16 product."""
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / seconds(lambda: left @ right, device, 20)


def training_step(family: Family, case: Case) -> Callable[[], None]:
    """Loss, backward and optimizer of one batch, with text that was encoded before."""
    transformer = family.transformer
    recompute(family, float(case.checkpointing))
    lora = Lora(transformer, family.lora_targets(), RANK, 0)
    parameters = list(lora.parameters())
    optimizer = make_optimizer("adamw", parameters, 1e-4, 0.0)
    latents, text = random_inputs(family, case)
    noise = torch.randn_like(latents)
    sigma = torch.full((case.batch,), 0.5, device=family.device)

    def step() -> None:
        flow_loss(family, latents, noise, sigma, text).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def generation(family: Family, case: Case) -> Callable[[], Tensor]:
    """One image's latents from noise, without guidance."""
    latents, text = random_inputs(family, case)
    sigmas = torch.linspace(1.0, 0.0, case.steps + 1)

    @torch.inference_mode()
    def generate() -> Tensor:
        return sample(family, latents, sigmas, text)

    return generate


def random_lora(family: Family, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """A LoRA of random numbers on all targets, in CPU memory, as it comes from a file."""
    weights = dict(family.transformer.named_modules())
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(RANK, weights[name].in_features, generator=generator) / 64,
            torch.randn(weights[name].out_features, RANK, generator=generator) / 64,
        )
        for name in family.lora_targets()
    }


def lora_change(family: Family) -> Callable[[], None]:
    """Merges another LoRA, one of two in turn."""
    loras = [random_lora(family, seed) for seed in range(2)]
    merger = LoraMerger(family.transformer)
    turn = iter(range(1 << 30))

    def change() -> None:
        with torch.no_grad():
            merger.apply([(loras[next(turn) % 2], 1.0)])

    return change


def random_inputs(family: Family, case: Case) -> tuple[Tensor, list[Tensor]]:
    """Random latents_BCHW and text of each image."""
    device = family.device
    rows, columns = family.latent_size(case.edge, case.edge)
    latents = torch.randn(case.batch, family.latent_channels, rows, columns, device=device)
    config = family.transformer_config
    width = config.get("cap_feat_dim") or config["joint_attention_dim"]
    text = torch.randn(case.batch, TEXT_TOKENS, width, device=device, dtype=torch.bfloat16)
    return latents, list(text)


def random_base(base: str, device: torch.device, mode: Mode = UNQUANTIZED) -> Family:
    """A base at its published size with random weights, without a text encoder."""
    inputs = TrainingInputs(
        dataset=Path("unread.zip"), base_model=base, train_placeholder_token=False, seed=0
    )
    return random_family(resolve(inputs), mode, device)


def measure(case: Case, device: torch.device, repeats: int) -> Measured:
    """Time and peak memory of one case; FLOPs of a step or an image."""
    family = random_base(case.base, device)
    reset_peak(device)
    if case.work == LORA:
        return Measured(seconds(lora_change(family), device, repeats), peak_memory(device))
    work = generation(family, case) if case.work == IMAGE else training_step(family, case)
    with FlopCounterMode(display=False) as counter:  # before it is compiled, which hides them
        work()
    if wanted_in_training(device):
        compile_blocks(family.transformer)
        reset_peak(device)
    taken = seconds(work, device, repeats)
    return Measured(taken, peak_memory(device), counter.get_total_flops())


def reset_peak(device: torch.device) -> None:
    """Starts a new measurement of the peak memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes that were allocated at most on a GPU since `reset_peak`; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.benchmarks.gpu", description=__doc__)
    parser.add_argument("--base", nargs="*", default=list(BASES))
    parser.add_argument("--only", default="", help="a part of the rows' names")
    parser.add_argument("--repeats", type=int, default=10)
    given = parser.parse_args()
    chosen = [case for case in cases(tuple(given.base)) if given.only in str(case)]
    if not torch.cuda.is_available():
        print("no GPU here; with one, this would measure")
        print("\n".join(f"  {case}" for case in chosen))
        return
    device = torch.device("cuda")
    rate = matmul_rate(device)
    print(f"{machine()}; a bfloat16 product of {PRODUCT}: {rate / 1e12:.0f} TFLOP/s")
    print("| measured | time | peak memory | TFLOP/s | of the product's rate |")
    print("| --- | --- | --- | --- | --- |")
    for case in chosen:
        try:
            cells = measure(case, device, given.repeats).cells(case, rate)
        except torch.OutOfMemoryError:
            cells = [str(case), "does not fit", "", "", ""]
        print(f"| {' | '.join(cells)} |", flush=True)
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
