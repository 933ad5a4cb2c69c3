"""python -m lab.benchmarks.peers: our training step beside PEFT's, in every mode.

Each is a whole step (loss, backward, clipping, AdamW) on the same model of diffusers with random
bfloat16 weights and cached text: our LoRA with float32 weights; PEFT's layers with bfloat16 LoRA
weights; PEFT's layers with float32 LoRA weights under autocast, as accelerate's mixed precision
runs them. Activations are kept or recomputed, blocks plain or compiled. Without a GPU it takes the
miniature, compiled by `eager`, which shows that the script works and measures nothing.
"""

import argparse
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from families.family import Family
from inference.acceleration import compile_blocks
from lab.benchmarks import gpu
from lab.benchmarks.machine import machine
from trainer.learning.loss import flow_loss
from trainer.learning.optimizers import make_optimizer

OURS = "ours"
BFLOAT16, AUTOCAST = "PEFT, bfloat16 LoRA", "PEFT, float32 LoRA, autocast"
PROGRAMS = (OURS, BFLOAT16, AUTOCAST)


@dataclass(frozen=True)
class Variant:
    """A program's step in one mode."""

    program: str
    checkpointing: bool
    compiled: bool

    @property
    def mode(self) -> str:
        """How activations and blocks are treated."""
        kept = "recomputed" if self.checkpointing else "kept"
        return f"activations {kept}, {'compiled' if self.compiled else 'plain'}"


@dataclass(frozen=True)
class Found:
    """A variant's figures, or why there are none."""

    variant: Variant
    measured: gpu.Measured | None
    why: str = ""

    def ratio(self, ours: "Found | None") -> float | None:
        """Our time in the same mode as a share of this one."""
        if self.measured is None or ours is None or ours.measured is None:
            return None
        return ours.measured.seconds / self.measured.seconds


# Compiled and recomputed first: what a run takes on most GPUs.
VARIANTS = tuple(
    Variant(program, checkpointing, compiled)
    for compiled, checkpointing in product((True, False), (True, False))
    for program in PROGRAMS
)


def peft_step(family: Family, case: gpu.Case, autocast: bool) -> Callable[[], None]:
    """A step with PEFT's layers on the transformer: bfloat16, or float32 under autocast."""
    transformer: Any = family.transformer
    if case.checkpointing:
        transformer.enable_gradient_checkpointing()
    config = LoraConfig(r=gpu.RANK, lora_alpha=gpu.RANK, target_modules=family.lora_targets())
    inject_adapter_in_model(config, transformer)
    trained: list[nn.Parameter] = []
    for name, each in transformer.named_parameters():
        if "lora_" in name:
            each.data = each.data.to(torch.float32 if autocast else torch.bfloat16)
            trained.append(each)
    optimizer = make_optimizer("adamw", trained, 1e-4, 0.0)
    latents, text = gpu.random_inputs(family, case)
    noise = torch.randn_like(latents)
    sigma = torch.full((case.batch,), 0.5, device=family.device)

    def step() -> None:
        device = family.device.type
        with torch.autocast(device, torch.bfloat16) if autocast else nullcontext():
            loss = flow_loss(family, latents, noise, sigma, text)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(variant: Variant, case: gpu.Case, device: torch.device, repeats: int) -> gpu.Measured:
    """Time and peak memory of one variant's step."""
    family = gpu.random_base(case.base, device)
    if variant.program == OURS:
        step = gpu.training_step(family, case)
    else:
        step = peft_step(family, case, variant.program == AUTOCAST)
    if variant.compiled:
        compile_blocks(family.transformer, "inductor" if device.type == "cuda" else "eager")
    gpu.reset_peak(device)
    return gpu.Measured(gpu.seconds(step, device, repeats), gpu.peak_memory(device))


def compared(
    base: str,
    edge: int,
    device: torch.device,
    repeats: int,
    variants: Sequence[Variant] = VARIANTS,
) -> Iterator[Found]:
    """Every variant in turn; one that fails has the reason, and the others still run."""
    for variant in variants:
        case = gpu.Case(base, gpu.STEP, edge, checkpointing=variant.checkpointing)
        measured, why = None, ""
        try:
            measured = measure(variant, case, device, repeats)
        except torch.OutOfMemoryError:
            why = "does not fit"
        except Exception as error:
            why = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        yield Found(variant, measured, why)


def table(all_found: Sequence[Found]) -> Iterator[str]:
    """Modes as rows; each program's time, peak memory, and our time as a share of it."""
    yield f"| a step | {' | '.join(PROGRAMS)} |"
    yield "| --- " * (1 + len(PROGRAMS)) + "|"
    by_mode: dict[str, dict[str, Found]] = {}
    for found in all_found:
        by_mode.setdefault(found.variant.mode, {})[found.variant.program] = found
    for mode, by_program in by_mode.items():
        cells = [_cell(by_program.get(name), by_program.get(OURS)) for name in PROGRAMS]
        yield f"| {mode} | {' | '.join(cells)} |"


def _cell(found: Found | None, ours: Found | None) -> str:
    if found is None or found.measured is None:
        return "" if found is None else found.why.replace("|", "\\|")
    text = f"{found.measured.seconds * 1e3:.0f} ms, {found.measured.peak / 1e9:.1f} GB"
    ratio = found.ratio(ours)
    return text if found is ours or ratio is None else f"{text}, ours {ratio:.2f} of it"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.benchmarks.peers", description=__doc__)
    parser.add_argument("--base", default="z-image-turbo")
    parser.add_argument("--edge", type=int, default=1024, help="pixels")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    device, base, edge = torch.device("cuda"), given.base, given.edge
    if not torch.cuda.is_available():
        device, base, edge = torch.device("cpu"), "miniature-turbo", 32
    print(f"{machine()}\n{base}, {edge} pixels, batch 1, rank {gpu.RANK}")
    for line in table(list(compared(base, edge, device, given.repeats))):
        print(line)


if __name__ == "__main__":
    main()
