"""The training loop: noise, velocity, loss, step."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any, cast

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from adapters.formats import Deltas
from adapters.full_weights import FullWeights
from adapters.lora import Lora
from adapters.placeholder import Placeholder
from families.family import Family
from families.out_of_memory import free_frames
from families.transfer import onto
from inference.acceleration import with_fallback
from inference.progress import Progress
from trainer.learning.batches import Batches
from trainer.learning.best_weights import Best
from trainer.learning.checkpoint import Checkpoint
from trainer.learning.control import Control
from trainer.learning.distributed import mean_of_all, processes
from trainer.learning.features import Captions
from trainer.learning.fused import FusedOptimizer
from trainer.learning.history import History, Trained
from trainer.learning.loss import draw_noise, flow_loss
from trainer.learning.optimizers import make_optimizers, rate_at
from trainer.learning.preservation import Preservation
from trainer.learning.randomness import generator
from trainer.learning.restoring import restore
from trainer.learning.samples import Sample, references_of, weights_of
from trainer.learning.saving import Diverged, Saver
from trainer.learning.step_report import Report, StepReport
from trainer.learning.timesteps import NoiseLevels
from trainer.learning.zero_prior import check_gradient
from trainer.settings import Settings

log = logging.getLogger(__name__)

# Steps with the placeholder before its gradient is checked, once: this waits for the device.
GRADIENT_STEPS = 5


class Loop:
    """One training run: the frozen family, the trainable LoRA and placeholders, and the data.

    In a full training, the transformer's own parameters take the place of a LoRA.
    Callbacks (`run(after_step=…)`) are called after every optimizer step with the loop: `done` is
    the number of steps, `history` has the losses, `final_weights()` returns copies of the weights
    that would be saved now, and within `averaged()` the model uses those weights.

    With `accelerate launch`, several processes share each batch: each uses `batch_size` rows of it,
    and gradients are averaged, which is equal to one process with the whole batch.
    """

    def __init__(
        self,
        family: Family,
        settings: Settings,
        samples: Sequence[Sample],
        captions: Captions,
        trained: Lora | FullWeights | None,
        placeholders: Sequence[Placeholder],
        data: Mapping[str, Any] | None = None,
        control: Control | None = None,
        preservation: Preservation | None = None,
    ) -> None:
        """`data` is the dataset's identity in checkpoints (`trainer.learning.resume`)."""
        self.preservation = preservation
        self.control = control or Control()
        self.events = self.control.events
        self.family, self.settings = family, settings
        self.samples, self.captions = samples, captions
        self.lora = trained if isinstance(trained, Lora) else None
        self.full = trained if isinstance(trained, FullWeights) else None
        self.placeholders = tuple(placeholders)
        shapes = [sample.mean_CHW.shape for sample in samples]
        self.data = dict(data or {})
        self.processes = processes()
        # One batch for all processes; this one uses the rows from `first_row`.
        rows = settings.batch_size * self.processes.num_processes
        self.batches = Batches(shapes, rows, settings.seed, [each.repeats for each in samples])
        self.first_row = settings.batch_size * self.processes.process_index
        self.noise_levels = NoiseLevels(family, settings.timestep_sampling, settings.training_shift)

        # Separate optimizers: the gradient of a near-zero embedding is hundreds of times larger.
        self.lora_parameters = list(self.lora.parameters()) if self.lora is not None else []
        self.rows = [cast(nn.Parameter, each.vectors) for each in self.placeholders]
        groups = {
            "transformer": self.full.parameters() if self.full is not None else [],
            "lora": self.lora_parameters,
            "placeholder": self.rows,
        }
        self.parameters = [each for group in groups.values() for each in group]
        self.named = {f"{name}.{k}": each for name, g in groups.items() for k, each in enumerate(g)}
        optimizers = make_optimizers(groups, settings)
        self.optimizers, self.optimizer_kinds = optimizers.of, optimizers.kinds
        self._full_rates = optimizers.rates
        found = self.optimizers.get("transformer")
        self.fused = found if isinstance(found, FusedOptimizer) else None
        decay = settings.ema_decay
        self.ema = EMAModel(self.parameters, decay, foreach=True) if decay > 0 else None

        self.done = 0  # steps
        self.norms: dict[str, Tensor] = {}  # of the last step's gradients, before clipping
        self.history = History(row_norms=[[] for _ in self.placeholders])
        self.best: Best | None = None  # with keep_best
        self._stepping = False  # within an optimizer step
        self._ending: BaseException | None = None  # to be raised after it
        self._gradients_seen = set[str]()  # tokens

    def batch(self, number: int) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        """latents_BCHW, noise_BCHW, sigma_B and captions of a batch, by its number.

        Batches are counted over the whole run, `gradient_accumulation` of them per step.
        """
        settings, device = self.settings, self.family.device
        latents, noises, sigmas, captions = [], [], [], []
        for row, sample in self._rows_of(number):
            shape = sample.mean_CHW.shape
            posterior = draw_noise(shape, settings.seed, "posterior", number, row)
            latents.append(sample.mean_CHW + sample.std_CHW * posterior)
            noises.append(draw_noise(shape, settings.seed, "noise", number, row))
            random = generator(settings.seed, "sigma", number, row)
            sigmas.append(self.noise_levels.draw(shape, random))
            captions.append(self._caption(number, row))
        stacked = torch.stack(latents), torch.stack(noises), torch.tensor(sigmas)
        latents_BCHW, noise_BCHW, sigma_B = (onto(device, each) for each in stacked)
        return latents_BCHW, noise_BCHW, sigma_B, captions

    def _rows_of(self, number: int) -> list[tuple[int, Sample]]:
        """The rows of a batch that this process uses, and their samples."""
        indices, end = self.batches.at(number), self.first_row + self.settings.batch_size
        return [(row, self.samples[indices[row]]) for row in range(self.first_row, end)]

    def _caption(self, number: int, row: int) -> str:
        """The caption of a row of a batch; the empty prompt by caption dropout."""
        chance = torch.rand((), generator=generator(self.settings.seed, "dropout", number, row))
        if chance.item() < self.settings.caption_dropout:
            return self.family.empty_prompt
        texts = self.samples[self.batches.at(number)[row]].captions
        random = generator(self.settings.seed, "caption", number, row)
        return texts[int(torch.randint(len(texts), (), generator=random))]

    def _captions_of_all(self, number: int) -> list[str]:  # counter-based: without communication
        return [self._caption(number, row) for row in range(len(self.batches.at(number)))]

    def step(self, step: int) -> None:
        """Runs one optimizer step and adds it to the history."""
        parts = self.settings.gradient_accumulation
        numbers = range(step * parts, (step + 1) * parts)
        reset, text_encoders = self._drop_gradients, self.captions.text_encoders
        for name, optimizer in self.optimizers.items():
            optimizer.param_groups[0]["lr"] = self._full_rates[name] * self._share_of_rate(step)
        self._stepping = self.fused is not None  # its backward pass changes the weights
        loss = with_fallback(
            self.family.transformer, lambda: self._gradients(numbers), reset, text_encoders
        )

        tokens = self.captions.tokens_in(each for k in numbers for each in self._captions_of_all(k))
        if self.processes.num_processes > 1:
            kept = self.preservation
            used = tokens if kept is None else tokens | kept.tokens_in(numbers)
            rows = [self.rows[k] for k, p in enumerate(self.placeholders) if p.token in used]
            loss = mean_of_all(loss, [*self.lora_parameters, *rows])

        limit = self.settings.max_grad_norm
        row_norms = [nn.utils.clip_grad_norm_([row], limit) for row in self.rows]
        clipped = nn.utils.clip_grad_norm_(self.lora_parameters, limit)
        self.norms = {
            **({"lora": clipped} if self.fused is None else {"transformer": self.fused.norm()}),
            "placeholder": reduce(torch.maximum, row_norms) if row_norms else torch.zeros(()),
        }
        self._stepping = True
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.step(self.parameters)
        self.history.losses.append(loss)
        for number, norm in enumerate(row_norms):
            if self.placeholders[number].token in tokens:
                self.history.row_norms[number].append(norm)
        self.done = step + 1
        self._stepping = False
        if self._ending is not None:
            raise self._ending

    def stop(self, ending: BaseException) -> None:
        """Raises `ending`, now or after the current optimizer step.

        For signal handlers: a state within an optimizer step cannot be resumed.
        """
        if not self._stepping:
            raise ending
        self._ending = ending

    def _gradients(self, numbers: Sequence[int]) -> Tensor:
        """Accumulates the gradients of these batches; returns their mean loss."""
        losses = []
        for number in numbers:
            if self.fused is not None:
                self.fused.begin(number)
            latents_BCHW, noise_BCHW, sigma_B, captions = self.batch(number)
            samples = [each for _, each in self._rows_of(number)]
            refs = references_of(samples)
            text = self.captions.features(captions, refs, self._captions_of_all(number))
            beside = text, weights_of(samples, self.family.device), refs
            loss = flow_loss(self.family, latents_BCHW, noise_BCHW, sigma_B, *beside)
            loss = loss / len(numbers)
            losses.append(loss.detach())
            preserve = number, len(numbers), self.named
            if self.fused is not None and self.preservation is not None:
                rows = self.preservation.weighted_loss(*preserve)  # one pass: it is the step
                loss = loss if rows is None else loss + rows
            if loss.requires_grad:  # False if only the placeholder is trained and was dropped
                loss.backward()
            if self.fused is None and self.preservation is not None:  # after: less memory
                self.preservation.add_gradients(*preserve)
        return torch.stack(losses).sum()

    def _drop_gradients(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    @property
    def rates(self) -> dict[str, float]:
        """The learning rates of the last step, including prodigy's estimate."""
        groups = {name: each.param_groups[0] for name, each in self.optimizers.items()}
        return {name: group["lr"] * group.get("d", 1.0) for name, group in groups.items()}

    def _share_of_rate(self, step: int) -> float:
        settings = self.settings
        return rate_at(step, settings.lr_scheduler, settings.warmup, settings.steps)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the context, LoRA and placeholder have the weights that are saved: EMA weights if
        `ema_decay` is above 0, else their current ones."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def final_weights(self) -> tuple[Deltas, tuple[Placeholder, ...]]:
        """Copies on the CPU of the LoRA and placeholders that would be saved now."""
        with self.averaged():
            deltas = self.lora.deltas() if self.lora is not None else {}
            return deltas, tuple(each.detached() for each in self.placeholders)

    def run(
        self,
        report: Report | None = None,
        saver: Saver | None = None,
        after_step: Sequence[Callable[["Loop"], None]] = (),
    ) -> Trained:
        """Runs the remaining steps. `saver` writes checkpoints, the last one at the end.

        Each of `after_step` is called after every optimizer step, before its checkpoint. It may use
        random numbers, since those of the loop are counter-based. With several processes, only the
        main one logs and writes.

        If the run is stopped, its state is saved before the error is raised. Raises `Diverged`,
        naming the last good checkpoint, and `ZeroPriorBroken` for a token without a gradient.
        """
        steps, main = self.settings.steps, self.processes.is_main_process
        if not main:
            report, saver = None, None
        start, begun = self.done, time.perf_counter()
        self.events.phase("training")
        progress = Progress(
            desc="training", total=steps, initial=start, lines=main, disable=not main
        )
        shown = StepReport(self, progress, report)
        try:
            if saver is not None and start < steps:
                saver.begin(self)
            with progress:
                while self.done < self.settings.steps:
                    self.step(self.done)
                    shown.after_step()
                    self._check_gradient()
                    progress.update()
                    paused = time.perf_counter()
                    for call in after_step:
                        call(self)
                    begun += time.perf_counter() - paused  # not part of the steps' time
                    if saver is not None:
                        saver.after_step(self)
                    paused = time.perf_counter()
                    self.control.between_steps(self, saver)
                    progress.total = self.settings.steps
                    begun += time.perf_counter() - paused
            if not self.finite():
                raise Diverged("the trained weights contain NaN or infinity; lower learning_rate")
            if saver is not None and start < steps:
                saver.finish(self)
        except Diverged as error:
            if saver is None or saver.newest is None:
                raise
            raise Diverged(f"{error}; the last good checkpoint is {saver.newest}") from error
        except BaseException as error:
            free_frames(error)  # tensors of the failed step may fill the device
            if saver is not None and self.done > start:
                self._save_on_error(saver)
            raise
        finally:
            shown.emit()
        plain = self.history.plain()
        return Trained(
            losses=plain["losses"],
            steps_per_second=(self.done - start) / (time.perf_counter() - begun),
            row_norms=[[float(norm) for norm in each] for each in self.history.row_norms],
            preservation=self.preservation.last_loss if self.preservation is not None else None,
            ended_early=self.control.why,
        )

    def _check_gradient(self) -> None:
        """Checks once, after a few steps with a token, that it had a gradient."""
        for each, norms in zip(self.placeholders, self.history.row_norms, strict=True):
            if each.token not in self._gradients_seen and len(norms) >= GRADIENT_STEPS:
                self.history.read()
                check_gradient(each, [float(norm) for norm in norms])
                self._gradients_seen.add(each.token)

    def finite(self) -> bool:
        """Whether all trained weights are finite."""
        return all(bool(value.isfinite().all()) for value in self.named.values())

    def _save_on_error(self, saver: Saver) -> None:
        if self._stepping and (self.fused is None or self.fused.begun):
            log.warning("stopped within an optimizer step; the last checkpoint is %s", saver.newest)
            return
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)  # frees memory for copies
        saver.stopped(self)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Loads the state of a checkpoint; `run` then runs the remaining steps."""
        restore(self, checkpoint)
