"""Trains the miniature from one seed: `python -m miniature.build`.

Stages: vae, judge, base, turbo, adapter, and qwen_vae and qwen_base of the second miniature, with
Qwen-Image-2.1's classes. Each resumes from its checkpoint in the work folder and is
skipped when finished. Every stage writes its result to `miniature/weights/`, or to the folder of
`--weights`. `--quick` runs all of them with very few steps, as a test.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage21

from miniature.adapter import AdapterSettings, save_adapter, train_adapter
from miniature.device import DEVICE
from miniature.distill import DistillSettings, distill
from miniature.drawing import grid
from miniature.judge import JudgeSettings, accuracy, load_judge, save_judge, train_judge
from miniature.models import ARCHITECTURE, TextEncoder, Transformer, Vae, write_base
from miniature.parallel import launch, rank
from miniature.pretrain import PretrainSettings, train_base
from miniature.qwen import pretrain as qwen
from miniature.qwen.models import build_vae as build_qwen_vae
from miniature.qwen.models import write_base as write_qwen
from miniature.sampling import Base, generate
from miniature.tokenizer import build_tokenizer
from miniature.vae import VaeSettings, held_out_pixels, preview, psnr, train_vae
from miniature.weights import (
    ADAPTER,
    JUDGE,
    QWEN,
    TURBO,
    UNDISTILLED,
    WEIGHTS,
    load_base,
    load_qwen,
)
from miniature.world import evaluation_prompts

STAGES = ("vae", "judge", "base", "turbo", "adapter", "qwen_vae", "qwen_base")


@dataclass(frozen=True)
class Recipe:
    """The settings of every stage, and the folders."""

    work: Path  # checkpoints, caches and previews
    weights: Path = WEIGHTS  # results
    resume_shipped: bool = False  # the base starts from the included weights
    vae: VaeSettings = field(default_factory=VaeSettings)
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    base: PretrainSettings = field(default_factory=PretrainSettings)
    turbo: DistillSettings = field(default_factory=DistillSettings)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    qwen_vae: VaeSettings = field(default_factory=lambda: qwen.VAE)
    qwen_base: qwen.QwenSettings = field(default_factory=qwen.QwenSettings)


QUICK = {
    "vae": VaeSettings(steps=2, batch=4),
    "judge": JudgeSettings(steps=2, batch=8),
    "base": PretrainSettings(steps=2, batch=8, scenes=64, text_steps=2, long_every=2),
    "turbo": DistillSettings(steps=2, batch=8, trajectories=8),
    "adapter": AdapterSettings(steps=2, batch=8, images=8),
    "qwen_vae": replace(qwen.VAE, steps=2, batch=4),
    "qwen_base": qwen.QwenSettings(steps=2, batch=8, scenes=16, edits=16, text_steps=2),
}


def _preview(recipe: Recipe, base: Base, path: Path, steps: int, guidance: float) -> None:
    """Generates held-out prompts, writes a grid of the images and prints the judge's accuracy."""
    prompts = evaluation_prompts(48)
    images = generate(base, [p.text for p in prompts], list(range(48)), steps, guidance)
    grid(images, columns=12).save(path)
    tally = accuracy(load_judge(recipe.weights / JUDGE), images, [p.asked for p in prompts])
    shares = " ".join(f"{key} {right / asked:.2f}" for key, (right, asked) in tally.items())
    print(f"\n{path.name}: {shares}", flush=True)


def _load_vae(recipe: Recipe) -> Vae:
    """The work folder's VAE, or the included one."""
    own = recipe.work / "vae"
    shipped = recipe.weights / TURBO / "vae"
    vae: Vae = AutoencoderKL.from_pretrained(own if own.exists() else shipped)
    return vae.to(DEVICE).eval().requires_grad_(False)


def run_vae(recipe: Recipe) -> None:
    work = recipe.work
    vae = train_vae(work, recipe.vae)
    if rank() == 0:
        print(f"\nvae: {psnr(vae, held_out_pixels()):.2f} dB on held-out scenes")
        preview(vae, work / "vae.png")
        vae.save_pretrained(work / "vae")


def run_judge(recipe: Recipe) -> None:
    judge = train_judge(_load_vae(recipe), recipe.work, recipe.judge)
    if rank() == 0:
        save_judge(judge, recipe.weights / JUDGE)


def run_base(recipe: Recipe) -> None:
    """Trains `miniature`, and writes a first `miniature-turbo` that is not distilled yet.

    Both share one text encoder, so run the stages turbo and adapter again after this one.
    """
    work, weights, vae = recipe.work, recipe.weights, _load_vae(recipe)

    def show(transformer: Transformer, text_encoder: TextEncoder, step: int) -> None:
        base = Base(transformer, text_encoder, build_tokenizer(), vae, ARCHITECTURE.sigma_shift)
        _preview(recipe, base, work / f"base_{step:05d}.png", steps=20, guidance=1.0)

    start = None
    if recipe.resume_shipped:
        shipped = load_base(UNDISTILLED, weights)
        start = shipped.transformer, shipped.text_encoder
    transformer, text_encoder = train_base(vae, work, recipe.base, show, start=start)
    if rank() == 0:
        transformer.to(torch.bfloat16)
        write_base(weights / TURBO, transformer, text_encoder.to(torch.bfloat16), vae)
        write_base(weights / UNDISTILLED, transformer)


def run_turbo(recipe: Recipe) -> None:
    work, weights = recipe.work, recipe.weights
    teacher = load_base(UNDISTILLED, weights)

    def show(student: Transformer, step: int) -> None:
        distilled = replace(teacher, transformer=student)
        _preview(recipe, distilled, work / f"turbo_{step:05d}.png", 8, 0.0)

    student = distill(teacher, work, recipe.turbo, show)
    if rank() == 0:
        write_base(
            weights / TURBO, student.to(torch.bfloat16), teacher.text_encoder.to(torch.bfloat16),
            teacher.vae,
        )  # fmt: skip


def run_adapter(recipe: Recipe) -> None:
    tensors = train_adapter(load_base(TURBO, recipe.weights), recipe.work, recipe.adapter)
    if rank() == 0:
        save_adapter(tensors, recipe.weights / ADAPTER)


def run_qwen_vae(recipe: Recipe) -> None:
    work = recipe.work / "qwen"
    vae = train_vae(work, recipe.qwen_vae, build_qwen_vae)
    if rank() == 0:
        decibel = psnr(vae, held_out_pixels(pixels=recipe.qwen_vae.pixels))
        print(f"\nqwen_vae: {decibel:.2f} dB on held-out scenes")
        preview(vae, work / "vae.png", recipe.qwen_vae.pixels)
        vae.save_pretrained(work / "vae")


def run_qwen_base(recipe: Recipe) -> None:
    work = recipe.work / "qwen"
    own, shipped = work / "vae", recipe.weights / QWEN / "vae"
    vae = AutoencoderKLQwenImage21.from_pretrained(own if own.exists() else shipped)
    vae = vae.to(DEVICE).eval().requires_grad_(False)
    start = None
    if recipe.resume_shipped:
        base = load_qwen(recipe.weights)
        start = base.transformer, base.text_encoder
    parts = qwen.train_base(vae, work, recipe.qwen_base, start=start)
    if rank() == 0:
        write_qwen(recipe.weights / QWEN, *(each.to(torch.bfloat16) for each in (*parts, vae)))


RUN: dict[str, Callable[[Recipe], None]] = {
    "vae": run_vae, "judge": run_judge, "base": run_base, "turbo": run_turbo,
    "adapter": run_adapter, "qwen_vae": run_qwen_vae, "qwen_base": run_qwen_base,
}  # fmt: skip


def _processes() -> int:
    """One on a GPU; on a CPU one per core, up to four."""
    return 1 if DEVICE.type == "cuda" else min(4, os.cpu_count() or 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=STAGES, action="append", help="default: all")
    parser.add_argument("--work", type=Path, default=Path("miniature_work"))
    parser.add_argument("--steps", type=int, help="number of steps instead of the stage's default")
    parser.add_argument("--quick", action="store_true", help="very few steps; needs --weights")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="output folder of the models")
    parser.add_argument("--resume-shipped", action="store_true", help="base: start from the "
                        "included weights instead of random ones")  # fmt: skip
    parser.add_argument("--processes", type=int, default=_processes())
    options = parser.parse_args()
    if options.quick and options.weights == WEIGHTS:
        parser.error("--quick would overwrite the included models; pass another --weights")
    options.work.mkdir(parents=True, exist_ok=True)
    stages: dict[str, Any] = QUICK if options.quick else {}
    recipe = Recipe(options.work, options.weights, options.resume_shipped, **stages)
    for stage in options.stage or STAGES:
        if options.steps is not None:
            changed: dict[str, Any] = {stage: replace(getattr(recipe, stage), steps=options.steps)}
            recipe = replace(recipe, **changed)
        launch(partial(RUN[stage], recipe), options.processes)


if __name__ == "__main__":
    main()
