"""Repeats the miniature from one seed: `python -m miniature.build`.

Stages, each resumable from its checkpoint in the work folder and skipped when finished:
vae, judge, base, turbo, adapter. Every stage exports what it made to `miniature/weights/`.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from .adapter import AdapterSettings, save_adapter, train_adapter
from .distill import DistillSettings, distill
from .drawing import grid
from .judge import JudgeSettings, accuracy, load_judge, save_judge, train_judge
from .models import ARCHITECTURE, TextEncoder, Transformer, Vae, write_base
from .parallel import launch, rank
from .pretrain import PretrainSettings, train_base
from .sampling import Base, draw
from .tokenizer import build_tokenizer
from .vae import VaeSettings, held_out_pixels, preview, psnr, train_vae
from .weights import ADAPTER, TURBO, UNDISTILLED, WEIGHTS, load_base
from .world import evaluation_prompts

STAGES = ("vae", "judge", "base", "turbo", "adapter")


def _preview(base: Base, path: Path, steps: int, guidance: float, images: int = 48) -> None:
    """Draws held-out prompts, writes their grid and prints what the judge reads."""
    prompts = evaluation_prompts(images)
    pictures = draw(base, [p.text for p in prompts], list(range(images)), steps, guidance)
    grid(pictures, columns=12).save(path)
    tally = accuracy(load_judge(), pictures, [p.asked for p in prompts])
    shares = " ".join(f"{key} {right / asked:.2f}" for key, (right, asked) in tally.items())
    print(f"\n{path.name}: {shares}", flush=True)


def _load_vae(work: Path) -> Vae:
    """The work folder's VAE, or the shipped one."""
    own = work / "vae"
    vae: Vae = AutoencoderKL.from_pretrained(own if own.exists() else WEIGHTS / TURBO / "vae")
    return vae.eval().requires_grad_(False)


def run_vae(work: Path, steps: int | None) -> None:
    settings = VaeSettings() if steps is None else VaeSettings(steps=steps)
    vae = train_vae(work, settings)
    if rank() == 0:
        print(f"\nvae: {psnr(vae, held_out_pixels()):.2f} dB on held-out scenes")
        preview(vae, work / "vae.png")
        vae.save_pretrained(work / "vae")


def run_judge(work: Path, steps: int | None) -> None:
    settings = JudgeSettings() if steps is None else JudgeSettings(steps=steps)
    judge = train_judge(_load_vae(work), work, settings)
    if rank() == 0:
        save_judge(judge)


def run_base(work: Path, steps: int | None, resume: bool = False) -> None:
    """`miniature`, and a first `miniature-turbo` that is not distilled yet.

    Both must share one text encoder, so after this stage the other two are due again.
    """
    settings = PretrainSettings() if steps is None else PretrainSettings(steps=steps)
    vae = _load_vae(work)

    def show(transformer: Transformer, text_encoder: TextEncoder, step: int) -> None:
        base = Base(transformer, text_encoder, build_tokenizer(), vae, ARCHITECTURE.sigma_shift)
        _preview(base, work / f"base_{step:05d}.png", steps=20, guidance=1.0)

    start = None
    if resume:
        shipped = load_base(UNDISTILLED)
        start = shipped.transformer, shipped.text_encoder
    transformer, text_encoder = train_base(vae, work, settings, show, start=start)
    if rank() == 0:
        transformer.to(torch.bfloat16)
        write_base(WEIGHTS / TURBO, transformer, text_encoder.to(torch.bfloat16), vae)
        write_base(WEIGHTS / UNDISTILLED, transformer)


def run_turbo(work: Path, steps: int | None) -> None:
    settings = DistillSettings() if steps is None else DistillSettings(steps=steps)
    teacher = load_base(UNDISTILLED)

    def show(student: Transformer, step: int) -> None:
        _preview(replace(teacher, transformer=student), work / f"turbo_{step:05d}.png", 8, 0.0)

    student = distill(teacher, work, settings, show)
    if rank() == 0:
        write_base(
            WEIGHTS / TURBO, student.to(torch.bfloat16), teacher.text_encoder.to(torch.bfloat16),
            teacher.vae,
        )  # fmt: skip


def run_adapter(work: Path, steps: int | None) -> None:
    settings = AdapterSettings() if steps is None else AdapterSettings(steps=steps)
    tensors = train_adapter(load_base(TURBO), work, settings)
    if rank() == 0:
        save_adapter(tensors, WEIGHTS / ADAPTER)


RUN: dict[str, Callable[..., None]] = {
    "vae": run_vae, "judge": run_judge, "base": run_base, "turbo": run_turbo,
    "adapter": run_adapter,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=STAGES, action="append", help="default: all in turn")
    parser.add_argument("--work", type=Path, default=Path("miniature_work"))
    parser.add_argument("--steps", type=int, help="instead of the stage's own number")
    parser.add_argument("--resume-shipped", action="store_true", help="base: begin with the "
                        "shipped weights instead of fresh ones")  # fmt: skip
    parser.add_argument("--processes", type=int, default=min(4, os.cpu_count() or 1))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for stage in options.stage or STAGES:
        extra = {"resume": True} if stage == "base" and options.resume_shipped else {}
        launch(partial(RUN[stage], options.work, options.steps, **extra), options.processes)


if __name__ == "__main__":
    main()
