"""Stage 3: distills `miniature` (many steps, guidance) to `miniature-turbo` (8 steps, none).

Trajectory regression, progressive distillation (Salimans & Ho 2022) in one round: the teacher
generates whole trajectories with guidance, with two second-order steps per step of the student. The
student, initialized with the teacher's weights, learns the mean velocity of each interval from the
state at its beginning. Targets are a function of the state, so the regression is well posed, and
every cached trajectory gives eight examples. The text encoder is not trained: both models share it.

B batch, C channels, H rows, W columns of latents; T = 9 states of a trajectory.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor
from tqdm import trange

from miniature.batched import batched_forward
from miniature.checkpoint import Checkpoint
from miniature.device import DEVICE, bfloat16_products
from miniature.models import Transformer
from miniature.parallel import average_gradients, gather_rows, rank, rows
from miniature.pretrain import Ema, build_optimizers
from miniature.sampling import Base, TextFeatures, encode_prompts, shifted_sigmas, velocity
from miniature.world import caption, sample_scene


@dataclass(frozen=True)
class DistillSettings:
    student_steps: int = 8
    substeps: int = 2  # of the teacher, per step of the student
    guidance: float = 1.0  # of the teacher, on the pipeline's scale (0 is off)
    trajectories: int = 1600
    steps: int = 500
    batch: int = 64
    muon_rate: float = 1.5e-3
    adam_rate: float = 5e-4
    ema: float = 0.995
    seed: int = 0


def training_prompts(count: int, stream: str) -> list[str]:
    """Captions of the `train` split that fit in 32 tokens, one in twenty empty."""
    prompts = []
    for i in range(count):
        rng = random.Random(f"{stream} {i}")
        empty = rng.random() < 0.05
        prompts.append("" if empty else caption(sample_scene(20_000_000 + i), rng))
    return prompts


@torch.no_grad()
def teacher_trajectories(
    base: Base, text: TextFeatures, noise_BCHW: Tensor, settings: DistillSettings
) -> Tensor:
    """States [B, T, C, H, W] at the student's sigmas, from noise to image.

    Two-step Adams-Bashforth with the ratio of the step lengths, so that it is second-order accurate
    for unequal steps too.
    """
    coarse = shifted_sigmas(settings.student_steps, base.shift)
    fine = torch.cat(
        [torch.linspace(float(a), float(b), settings.substeps + 1, dtype=torch.float64)[:-1]
         for a, b in zip(coarse[:-1], coarse[1:], strict=True)] + [coarse[-1:]]
    ).tolist()  # fmt: skip
    empty = encode_prompts(base, [""])
    x, before, length = noise_BCHW.float(), None, 0.0
    states = [x]
    for i, (now, after) in enumerate(zip(fine[:-1], fine[1:], strict=True)):
        sigma_B = torch.full((len(x),), now, device=x.device)
        v = velocity(base, x, sigma_B, text, empty, settings.guidance)
        step = after - now
        slope = v if before is None else v + 0.5 * step / length * (v - before)
        x, before, length = x + step * slope, v, step
        if (i + 1) % settings.substeps == 0:
            states.append(x)
    return torch.stack(states, dim=1)


def trajectory_cache(base: Base, path: Path, settings: DistillSettings) -> Tensor:
    """float16 trajectories [N, T, C, H, W] of `training_prompts`, cached at `path`."""
    if path.exists():
        kept: Tensor = torch.load(path, weights_only=True)
        return kept
    prompts = training_prompts(settings.trajectories, "distill")
    mine = range(settings.trajectories)[rows(settings.trajectories)]
    channels = base.transformer.config.in_channels
    base = replace(base, forward=torch.compile(batched_forward, dynamic=False))
    chunks = []
    for first in trange(0, len(mine), 40, desc="trajectories", disable=rank() > 0):
        numbers = mine[first : first + 40]
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + numbers[0])
        noise = torch.randn((len(numbers), channels, 16, 16), generator=generator).to(DEVICE)
        with bfloat16_products():
            text = encode_prompts(base, [prompts[i] for i in numbers])
            chunks.append(teacher_trajectories(base, text, noise, settings).half().cpu())
    cache = gather_rows(torch.cat(chunks))
    if rank() == 0:
        torch.save(cache, path)
    return cache


def distill(
    teacher: Base,
    work: Path,
    settings: DistillSettings | None = None,
    preview: Callable[[Transformer, int], None] | None = None,
    preview_every: int = 300,
) -> Transformer:
    """The student's EMA weights, float32. Resumes from `work/turbo.pt`."""
    settings = settings or DistillSettings()
    states = trajectory_cache(teacher, work / "trajectories.pt", settings)
    prompts = training_prompts(len(states), "distill")
    sigmas = shifted_sigmas(settings.student_steps, teacher.shift).float()
    student = ZImageTransformer2DModel.from_config(teacher.transformer.config)
    student.load_state_dict(teacher.transformer.state_dict())
    student.to(DEVICE, torch.float32).requires_grad_(True)
    optimizers = build_optimizers(student, None, settings.muon_rate, settings.adam_rate)
    ema = Ema({"transformer": student})
    checkpoint, first = Checkpoint(work / "turbo.pt"), 0
    if state := checkpoint.load():
        student.load_state_dict(state["transformer"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        ema.weights, ema.count, first = state["ema"], state["ema_count"], state["step"]

    compiled = torch.compile(batched_forward, dynamic=False)
    mine = rows(settings.batch)
    smooth = 0.0
    progress = trange(first, settings.steps, initial=first, total=settings.steps, desc="turbo",
                      disable=rank() > 0)  # fmt: skip
    for step in progress:
        factor = min(1.0, (step + 1) / 50, 2 * (1 - step / settings.steps))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        picks = torch.randint(len(states), (settings.batch,), generator=generator)[mine]
        # Every step of the schedule equally often within a batch.
        at = torch.arange(settings.batch)[mine] % settings.student_steps
        now, after = sigmas[at].to(DEVICE), sigmas[at + 1].to(DEVICE)
        x_BCHW, next_BCHW = (states[picks, i].float().to(DEVICE) for i in (at, at + 1))
        target = (next_BCHW - x_BCHW) / (after - now)[:, None, None, None]
        with bfloat16_products():
            text = encode_prompts(teacher, [prompts[i] for i in picks.tolist()])
            out = compiled(student, x_BCHW, 1 - now, text.text_BLD, text.mask_BL)
        loss = (-out.float() - target).square().mean()
        loss.backward()
        average_gradients(student.parameters())
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ema.update(settings.ema)
        smooth = float(loss) if step == first else 0.97 * smooth + 0.03 * float(loss)
        progress.set_postfix(loss=f"{smooth:.4f}")
        if rank() == 0 and (checkpoint.due() or step + 1 == settings.steps):
            checkpoint.save(
                {"transformer": student.state_dict(), "ema": ema.weights, "ema_count": ema.count,
                 "optimizers": [o.state_dict() for o in optimizers], "step": step + 1}
            )  # fmt: skip
        if rank() == 0 and preview and (step + 1) % preview_every == 0:
            ema.swap()
            preview(student, step + 1)
            ema.swap()
    ema.swap()
    return student.eval().requires_grad_(False)
