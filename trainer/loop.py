"""The training loop: noise, velocity, loss, step."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from adapters.lora import Lora
from adapters.placeholder import Placeholder
from families.family import Family
from trainer.batches import Batches
from trainer.features import Captions, Sample
from trainer.loss import draw, draw_sigma, flow_loss
from trainer.randomness import generator
from trainer.settings import Settings

log = logging.getLogger(__name__)

Report = Callable[[str, float], None]  # a metric's name and value, for whoever watches


class Diverged(RuntimeError):
    """A loss that is no longer a finite number."""


@dataclass(frozen=True)
class Trained:
    """What the loop tells of itself."""

    losses: list[float]  # one per step
    steps_per_second: float
    placeholder_gradient: float  # largest norm of the placeholder's gradient in any step


class Loop:
    """One training run: the frozen family, the trainable LoRA and placeholder, and the data."""

    def __init__(
        self,
        family: Family,
        settings: Settings,
        samples: Sequence[Sample],
        captions: Captions,
        lora: Lora | None,
        placeholder: Placeholder | None,
    ) -> None:
        self.family, self.settings = family, settings
        self.samples, self.captions = samples, captions
        shapes = [sample.mean_CHW.shape for sample in samples]
        self.batches = Batches(shapes, settings.batch_size, settings.seed)

        # LoRA and placeholder learn apart: a near-zero row's gradient is hundreds of times larger.
        self.lora_parameters = list(lora.parameters()) if lora is not None else []
        self.rows: list[nn.Parameter] = []
        if placeholder is not None:
            assert isinstance(placeholder.vectors, nn.Parameter)
            self.rows = [placeholder.vectors]
        groups = [
            {
                "params": self.lora_parameters,
                "lr": settings.learning_rate,
                "weight_decay": settings.weight_decay,
            },
            {"params": self.rows, "lr": settings.placeholder_learning_rate, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate_at)

    def _rate_at(self, step: int) -> float:
        """The share of the full learning rate at a step: linear warm-up, then the schedule."""
        warmup, steps = self.settings.lr_warmup_steps, self.settings.steps
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.settings.lr_scheduler == "cosine":
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
        return 1.0

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        """latents_BCHW, noise_BCHW, sigma_B and captions of a step, from its counters alone."""
        settings, device = self.settings, self.family.device
        latents, noises, sigmas, captions = [], [], [], []
        for row, index in enumerate(self.batches.at(step)):
            sample, shape = self.samples[index], self.samples[index].mean_CHW.shape
            posterior = draw(shape, settings.seed, "posterior", step, row)
            latents.append(sample.mean_CHW + sample.std_CHW * posterior)
            noises.append(draw(shape, settings.seed, "noise", step, row))
            random = generator(settings.seed, "sigma", step, row)
            sigmas.append(draw_sigma(settings.training_shift, random))
            dropped = torch.rand((), generator=random).item() < settings.caption_dropout
            captions.append(self.family.empty_prompt if dropped else sample.caption)
        sigma_B = torch.tensor(sigmas, device=device)
        return torch.stack(latents).to(device), torch.stack(noises).to(device), sigma_B, captions

    def step(self, step: int) -> tuple[Tensor, Tensor]:
        """One optimiser step; the loss and the norm of the placeholder's gradient."""
        latents_BCHW, noise_BCHW, sigma_B, captions = self.batch(step)
        text = self.captions.features(captions)
        loss = flow_loss(self.family, latents_BCHW, noise_BCHW, sigma_B, text)
        if loss.requires_grad:  # not where the placeholder is trained alone and was dropped
            loss.backward()
        limit = self.settings.max_grad_norm
        nn.utils.clip_grad_norm_(self.lora_parameters, limit)
        row_norm = nn.utils.clip_grad_norm_(self.rows, limit)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), row_norm

    def run(self, report: Report | None = None) -> Trained:
        """All steps. Raises `Diverged` as soon as a loss is no longer finite."""
        losses: list[Tensor] = []
        row_norms: list[Tensor] = []
        shown = max(1, self.settings.steps // 200)  # reading a loss waits for the device
        with tqdm(total=self.settings.steps, desc="training", unit="step") as progress:
            for step in range(self.settings.steps):
                loss, row_norm = self.step(step)
                losses.append(loss)
                row_norms.append(row_norm)
                last = step + 1 == self.settings.steps
                if step % shown == 0 or last:
                    value = torch.stack(losses[-shown:]).mean().item()
                    if not math.isfinite(value):
                        raise Diverged(
                            f"the loss is {value} at step {step + 1}; lower learning_rate "
                            f"({self.settings.learning_rate:g}) or leave it out"
                        )
                    progress.set_postfix(loss=f"{value:.4f}", refresh=False)
                    if report is not None:
                        report("loss", value)
                        report("step", float(step + 1))
                progress.update()
            rate = progress.format_dict["rate"] or progress.n / max(
                progress.format_dict["elapsed"], 1e-9
            )
        return Trained(
            losses=torch.stack(losses).tolist(),
            steps_per_second=float(rate),
            placeholder_gradient=torch.stack(row_norms).max().item(),
        )
