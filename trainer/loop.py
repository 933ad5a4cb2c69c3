"""The training loop: noise, velocity, loss, step."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from adapters.lora import Lora
from adapters.placeholder import Placeholder
from families.family import Family
from trainer.batches import Batches
from trainer.checkpoint import Checkpoint, write_checkpoint
from trainer.features import Captions, Sample
from trainer.loss import draw, draw_sigma, flow_loss
from trainer.randomness import generator
from trainer.resume import exactness, identity
from trainer.settings import Settings

log = logging.getLogger(__name__)

Report = Callable[[str, float], None]  # a metric's name and value, for whoever watches


class Diverged(RuntimeError):
    """A loss that is no longer a finite number."""


@dataclass
class History:
    """What the loop tells of itself, step by step."""

    losses: list[Tensor] = field(default_factory=list)  # one per step, wherever they lie
    row_norms: list[Tensor] = field(default_factory=list)  # gradient, where the word was seen

    def plain(self) -> dict[str, list[float]]:
        """The same as numbers, oldest first."""
        return {
            name: torch.stack(values).tolist() if values else []
            for name, values in (("losses", self.losses), ("row_norms", self.row_norms))
        }


@dataclass(frozen=True)
class Trained:
    """What is left to tell when all steps are done."""

    losses: list[float]  # one per step
    steps_per_second: float
    row_norms: list[float]  # of the placeholder's gradient, one per step that saw it


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
        self.named = {f"lora.{k}": value for k, value in enumerate(self.lora_parameters)}
        self.named |= {f"placeholder.{k}": value for k, value in enumerate(self.rows)}

        self.done = 0  # steps
        self.history = History()
        self._stepping = False  # an optimiser step is half done

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

    def step(self, step: int) -> None:
        """One optimiser step, noted in the history."""
        latents_BCHW, noise_BCHW, sigma_B, captions = self.batch(step)
        text = self.captions.features(captions)
        loss = flow_loss(self.family, latents_BCHW, noise_BCHW, sigma_B, text)
        if loss.requires_grad:  # not where the placeholder is trained alone and was dropped
            loss.backward()
        limit = self.settings.max_grad_norm
        nn.utils.clip_grad_norm_(self.lora_parameters, limit)
        row_norm = nn.utils.clip_grad_norm_(self.rows, limit)
        self._stepping = True
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.history.losses.append(loss.detach())
        if self.captions.trained.intersection(captions):
            self.history.row_norms.append(row_norm)
        self.done = step + 1
        self._stepping = False

    def run(self, report: Report | None = None, checkpoints: Path | None = None) -> Trained:
        """The steps that are left, with a checkpoint every `checkpoint_every` of them.

        Where the run is cancelled, its state is written as a checkpoint before the cancellation
        goes on. Raises `Diverged` as soon as a loss is no longer finite.
        """
        steps, every = self.settings.steps, self.settings.checkpoint_every
        shown = max(1, steps // 200)  # reading a loss waits for the device
        start, begun = self.done, time.perf_counter()
        progress = tqdm(total=steps, initial=start, desc="training", unit="step")
        try:
            with progress:
                for step in range(start, steps):
                    self.step(step)
                    if self.done % shown == 0 or self.done in (1, steps):
                        self._show(progress, report, shown)
                    progress.update()
                    if checkpoints is not None and every and self.done % every == 0:
                        if not self.finite():  # before a good checkpoint makes room for it
                            raise Diverged(f"what is trained holds NaN at step {self.done}")
                        self._save(checkpoints)
        except Diverged:
            raise
        except BaseException:
            whole = self.done > start and not self._stepping and self.finite()
            if checkpoints is not None and whole:
                log.info(
                    "stopped after %d steps; go on from %s", self.done, self._save(checkpoints)
                )
            raise
        plain = self.history.plain()
        return Trained(
            losses=plain["losses"],
            steps_per_second=(steps - start) / (time.perf_counter() - begun),
            row_norms=plain["row_norms"],
        )

    def _show(self, progress: Any, report: Report | None, shown: int) -> None:
        loss = torch.stack(self.history.losses[-shown:]).mean().item()
        if not math.isfinite(loss):
            raise Diverged(
                f"the loss is {loss} at step {self.done}; lower learning_rate "
                f"({self.settings.learning_rate:g}) or leave it out"
            )
        progress.set_postfix(loss=f"{loss:.4f}", refresh=False)
        if report is not None:
            report("loss", loss)
            report("step", float(self.done))

    def finite(self) -> bool:
        """Whether all that is trained is still finite numbers."""
        return all(bool(value.isfinite().all()) for value in self.named.values())

    def _save(self, folder: Path) -> Path:
        facts = {**identity(self.settings), "settings": exactness(self.settings)}
        parameters = {name: value.detach() for name, value in self.named.items()}
        state = self.optimizer.state_dict()
        checkpoint = Checkpoint(self.done, facts, parameters, state, self.history.plain())
        return write_checkpoint(checkpoint, folder)

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """Takes over the whole state of a checkpoint, after which `run` does what is left."""
        for name, parameter in self.named.items():
            parameter.copy_(checkpoint.parameters[name])
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self.done = checkpoint.step
        self.schedule.last_epoch = self.done
        for group, base_rate in zip(
            self.optimizer.param_groups, self.schedule.base_lrs, strict=True
        ):
            group["lr"] = base_rate * self._rate_at(self.done)
        self.history = History(
            *(
                [torch.tensor(value) for value in checkpoint.history[name]]
                for name in ("losses", "row_norms")
            )
        )
