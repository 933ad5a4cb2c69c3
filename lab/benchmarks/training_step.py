"""python -m lab.benchmarks.training_step: the cost of a training step over the bare base.

The floor is the frozen base without any adapter, forward and backward to its latents. Every way
takes its turn on the same weights, latents and text; medians of one step, and the median of its
ratios to the floor of the same round. `kept` is what autograd holds for the backward pass, the
base's own weights left out.
"""

import argparse
import logging
import statistics
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from adapters.lora import Lora
from adapters.placeholder import Placeholder
from families.family import Family
from families.loading import load_family
from families.registry import find_base_or_folder
from inference.acceleration import compile_blocks
from lab.benchmarks.machine import machine
from miniature.models import ARCHITECTURE, Architecture, write_random
from trainer.learning.features import Captions
from trainer.learning.loop import Loop
from trainer.learning.loss import flow_loss
from trainer.learning.optimizers import make_optimizer
from trainer.learning.samples import Sample
from trainer.settings.fields import resolve
from trainer.settings.inputs import TrainingInputs

RANK = 16
RATE = 1e-4
SUBJECT = "<zwx>"


@dataclass(frozen=True)
class Size:
    """A base and the length of what it reads."""

    label: str
    architecture: Architecture
    image_rows: int  # of tokens, and as many columns
    text_tokens: int
    dtype: torch.dtype


# Text encoder to transformer, in parameters that are read: 0.6, as Qwen3-4B to Z-Image's 6 B.
SMALL = Architecture(
    dim=768,
    layers=8,
    refiner_layers=2,
    heads=6,
    rope_axes=(32, 48, 48),
    latent_channels=16,
    vae_widths=(32, 64, 64, 64),
    text_width=768,
    text_layers=9,
    text_heads=6,
)
SIZES = {
    "small": Size("94 M parameters, bfloat16", SMALL, 16, 64, torch.bfloat16),
    "miniature": Size("the miniature, float32", ARCHITECTURE, 8, 32, torch.float32),
}

Step = Callable[[], None]


class Ways:
    """The ways to take one step at one size, each over a base of its own with equal weights."""

    def __init__(self, size: Size, folder: Path) -> None:
        write_random(folder, dtype=size.dtype, arch=size.architecture)
        self.size, self.folder = size, folder
        self.weights: list[weakref.ref[Tensor]] = []  # of the bases
        family = self.family()
        side = size.image_rows * family.patch_size
        generator = torch.Generator().manual_seed(0)
        shape = (family.latent_channels, side, side)
        self.sample = Sample("", "", torch.randn(shape, generator=generator), torch.zeros(shape))
        self.noise = torch.randn(1, *shape, generator=generator)
        self.words = self._words(family, "a photo of a cat")
        self.text = family.encode_prompts([self.words])[0].detach()

    def family(self) -> Family:
        """The base, loaded anew."""
        family = load_family(
            find_base_or_folder(str(self.folder)), torch.device("cpu"), self.size.dtype
        )
        for model in (family.transformer, family.text_encoder):
            self.weights += map(weakref.ref, model.parameters())
        return family

    @property
    def frozen(self) -> set[int]:
        """Where the bases' weights lie that are still there."""
        there = [weights for each in self.weights if (weights := each()) is not None]
        return {weights.untyped_storage().data_ptr() for weights in there}

    def _words(self, family: Family, start: str) -> str:
        """A caption of as many tokens as the size has, its template included."""
        vectors = {SUBJECT: torch.zeros(1, 1)}
        text = start
        while len(family.tokenize(text + " red", vectors).ids) <= self.size.text_tokens:
            text += " red"
        return text

    def loss(self, family: Family, latents_BCHW: Tensor) -> Tensor:
        """The loss at the middle noise level."""
        return flow_loss(family, latents_BCHW, self.noise, torch.tensor([0.5]), [self.text])

    def forward(self) -> Step:
        """The frozen base alone."""
        family, latents = self.family(), self.sample.mean_CHW[None]

        def step() -> None:
            with torch.no_grad():
                self.loss(family, latents)

        return step

    def floor(self, compiled: bool = False) -> Step:
        """The frozen base, forward and backward to its latents."""
        family = self.family()
        if compiled:
            compile_blocks(family.transformer)
        latents = self.sample.mean_CHW[None].clone().requires_grad_()

        def step() -> None:
            latents.grad = None
            self.loss(family, latents).backward()

        return step

    def bare(self) -> Step:
        """Our LoRA, forward and backward, without optimizer."""
        family = self.family()
        lora = Lora(family.transformer, family.lora_targets(), RANK, 0)
        parameters = list(lora.parameters())

        def step() -> None:
            for each in parameters:
                each.grad = None
            self.loss(family, self.sample.mean_CHW[None]).backward()

        return step

    def ours(self, placeholder: bool = False, compiled: bool = False) -> Step:
        """The whole step of a training run: noise, loss, backward, clip, optimizer."""
        family = self.family()
        words = self._words(family, f"a photo of {SUBJECT}") if placeholder else self.words
        settings = resolve(
            TrainingInputs(
                dataset=Path("unread.zip"),
                base_model=str(self.folder),
                rank=RANK,
                learning_rate=RATE,
                batch_size=1,
                steps=100_000,
                caption_dropout=0.0,
                train_placeholder_token=placeholder,
                seed=0,
            )
        )
        rows = []
        if placeholder:
            rows = [Placeholder.create(SUBJECT, family.text_width, 1e-5, 0)]
        captions = Captions(family, [words], {each.token: each.vectors for each in rows})
        lora = Lora(family.transformer, family.lora_targets(), RANK, 0)
        if compiled:
            compile_blocks(family.transformer)
        loop = Loop(family, settings, [replace(self.sample, caption=words)], captions, lora, rows)
        return lambda: loop.step(loop.done)

    def peft(self, masters: torch.dtype, autocast: bool) -> Step:
        """PEFT as it comes, with the optimizer."""
        family = self.family()
        model: Any = family.transformer
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=family.lora_targets())
        inject_adapter_in_model(config, model)
        parameters: list[nn.Parameter] = []
        for name, each in model.named_parameters():
            if "lora_" in name:
                each.data = each.data.to(masters)
                parameters.append(each)
        optimizer = make_optimizer("adamw", parameters, RATE, 0.0)
        latents = self.sample.mean_CHW[None]

        def step() -> None:
            lower = torch.autocast("cpu", self.size.dtype) if autocast else nullcontext()
            with lower:
                loss = self.loss(family, latents)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    def all(self, compiled: bool) -> dict[str, Callable[[], Step]]:
        """Every way by what the table calls it; the floor is the second."""
        bf16 = self.size.dtype == torch.bfloat16
        ways: dict[str, Callable[[], Step]] = {
            "forward": self.forward,
            "floor: the frozen base, forward and backward": self.floor,
            "ours: forward and backward": self.bare,
            "ours: whole step, float32 masters": self.ours,
            "ours: the same, placeholder in every caption": partial(self.ours, placeholder=True),
            "PEFT, float32 masters": partial(self.peft, torch.float32, False),
        }
        if bf16:
            ways |= {
                "PEFT, float32 masters under autocast": partial(self.peft, torch.float32, True),
                "PEFT, bfloat16 LoRA": partial(self.peft, torch.bfloat16, False),
            }
        if compiled:
            ways |= {
                "floor, blocks compiled": partial(self.floor, compiled=True),
                "ours: whole step, blocks compiled": partial(self.ours, compiled=True),
            }
        return ways


def kept_bytes(step: Step, frozen: set[int]) -> int:
    """Bytes that autograd holds at the end of a forward pass; each storage counts once."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(storages.values())


def measure(
    size: Size, rounds: int, only: Sequence[str], compiled: bool, clock: Callable[[], float]
) -> list[list[str]]:
    """The rows of one size."""
    with tempfile.TemporaryDirectory() as scratch:
        ways = Ways(size, Path(scratch) / "base")
        floor = "floor: the frozen base, forward and backward"
        chosen = {
            name: make()
            for name, make in ways.all(compiled).items()
            if name == floor or not only or any(each in name for each in only)
        }
        for step in chosen.values():  # warm up; compile
            step()
            step()
        seconds: dict[str, list[float]] = {name: [] for name in chosen}
        for _ in range(rounds):
            for name, step in chosen.items():
                start = clock()
                step()
                seconds[name].append(clock() - start)
        kept = {name: kept_bytes(step, ways.frozen) for name, step in chosen.items()}
    rows = []
    for name, each in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(each, seconds[floor], strict=True))
        median = statistics.median(each)
        shown = f"{median * 1e3:.1f} ms", f"{ratio:.3f}", f"{kept[name] / 1e6:.1f} MB"
        rows.append([size.label, name, *shown])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lab.benchmarks.training_step", description=__doc__
    )
    parser.add_argument("--size", choices=SIZES, nargs="*", default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="*", default=[], help="parts of the rows' names")
    parser.add_argument("--compile", action="store_true", help="compiled blocks too (minutes)")
    parser.add_argument(
        "--processor-time", action="store_true", help="for a busy machine, on one thread"
    )
    given = parser.parse_args()
    torch.set_num_threads(1 if given.processor_time else given.threads)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    clock = time.process_time if given.processor_time else time.perf_counter
    print(machine())
    print("| base | measured | a step | to the floor | kept |\n| --- | --- | --- | --- | --- |")
    for name in given.size:
        for row in measure(SIZES[name], given.rounds, given.only, given.compile, clock):
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
