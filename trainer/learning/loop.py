"""The training loop: noise, velocity, loss, step."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from adapters.formats import Factors
from adapters.lora import Lora
from adapters.placeholder import Placeholder
from families.family import Family
from families.out_of_memory import free_frames
from families.transfer import onto
from inference.acceleration import with_fallback
from inference.progress import Progress
from trainer.learning.batches import Batches
from trainer.learning.checkpoint import Checkpoint
from trainer.learning.distributed import mean_of_all, processes
from trainer.learning.features import Captions, Sample
from trainer.learning.history import History, Trained
from trainer.learning.loss import draw_noise, flow_loss
from trainer.learning.optimizers import make_optimizer, rate_at, rows_optimizer
from trainer.learning.randomness import generator
from trainer.learning.saving import Diverged, Saver
from trainer.learning.timesteps import NoiseLevels
from trainer.learning.zero_prior import check_gradient
from trainer.settings import Settings

log = logging.getLogger(__name__)

Report = Callable[[str, float], None]  # a metric's name and value, for whoever watches


# A model that answers nothing at all has the variance of noise and latents together, 2 or so.
EXPLODED = 100.0
# Steps with the placeholder until its gradient is looked at, once: reading it waits for the device.
GRADIENT_STEPS = 5


class Loop:
    """One training run: the frozen family, the trainable LoRA and placeholder, and the data.

    Who watches is called after every optimiser step (`run(after_step=…)`) with the loop itself:
    `done` counts the steps, `history` holds the losses, `shipped()` gives copies of what would be
    written as weights now, and inside `averaged()` the model itself works with those weights.

    Started by `accelerate launch`, several processes share each batch: every one takes
    `batch_size` rows of it, and gradients become their mean over all, so that they do what one
    process with the whole batch would do.
    """

    def __init__(
        self,
        family: Family,
        settings: Settings,
        samples: Sequence[Sample],
        captions: Captions,
        lora: Lora | None,
        placeholder: Placeholder | None,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """`data` tells the dataset's identity to those who resume (`trainer.learning.resume`)."""
        self.family, self.settings = family, settings
        self.samples, self.captions = samples, captions
        self.lora, self.placeholder = lora, placeholder
        shapes = [sample.mean_CHW.shape for sample in samples]
        self.data = dict(data or {})
        self.processes = processes()
        # One batch of all processes, of which this one takes the rows from `first_row` on.
        rows = settings.batch_size * self.processes.num_processes
        self.batches = Batches(shapes, rows, settings.seed)
        self.first_row = settings.batch_size * self.processes.process_index
        self.noise_levels = NoiseLevels(family, settings.timestep_sampling, settings.training_shift)

        # LoRA and placeholder learn apart: a near-zero row's gradient is hundreds of times larger.
        self.lora_parameters = list(lora.parameters()) if lora is not None else []
        self.rows: list[nn.Parameter] = []
        if placeholder is not None:
            assert isinstance(placeholder.vectors, nn.Parameter)
            self.rows = [placeholder.vectors]
        self.parameters = [*self.lora_parameters, *self.rows]
        self.named = {f"lora.{k}": value for k, value in enumerate(self.lora_parameters)}
        self.named |= {f"placeholder.{k}": value for k, value in enumerate(self.rows)}
        lora_rate, rows_rate = settings.learning_rate, settings.placeholder_learning_rate
        groups = {
            "lora": (self.lora_parameters, lora_rate, settings.weight_decay),
            "placeholder": (self.rows, rows_rate, 0.0),
        }
        self._full_rates = {name: rate for name, (trained, rate, _) in groups.items() if trained}
        chosen = settings.optimizer
        kinds = {"lora": chosen, "placeholder": rows_optimizer(chosen)}
        self.optimizer_kinds = {name: kinds[name] for name in self._full_rates}
        self.optimizers = {
            name: make_optimizer(kind, *groups[name]) for name, kind in self.optimizer_kinds.items()
        }
        self.ema = (
            EMAModel(self.parameters, settings.ema_decay, foreach=True)
            if settings.ema_decay > 0
            else None
        )

        self.done = 0  # steps
        self.norms: dict[str, Tensor] = {}  # of the last step's gradients, before they were clipped
        self.history = History()
        self._stepping = False  # an optimizer step is half done
        self._ending: BaseException | None = None  # to be raised when it is done
        self._gradient_seen = False

    def batch(self, number: int) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        """latents_BCHW, noise_BCHW, sigma_B and captions of a batch, from its counters alone.

        Batches are counted over the whole training, `gradient_accumulation` of them per step.
        """
        settings, device = self.settings, self.family.device
        indices = self.batches.at(number)
        latents, noises, sigmas, captions = [], [], [], []
        for row in range(self.first_row, self.first_row + settings.batch_size):
            sample = self.samples[indices[row]]
            shape = sample.mean_CHW.shape
            posterior = draw_noise(shape, settings.seed, "posterior", number, row)
            latents.append(sample.mean_CHW + sample.std_CHW * posterior)
            noises.append(draw_noise(shape, settings.seed, "noise", number, row))
            random = generator(settings.seed, "sigma", number, row)
            sigmas.append(self.noise_levels.draw(shape, random))
            captions.append(self._caption(number, row))
        made = torch.stack(latents), torch.stack(noises), torch.tensor(sigmas)
        latents_BCHW, noise_BCHW, sigma_B = (onto(device, each) for each in made)
        return latents_BCHW, noise_BCHW, sigma_B, captions

    def _caption(self, number: int, row: int) -> str:
        """What a row of a batch is told of its picture: its caption or, by chance, nothing."""
        chance = torch.rand((), generator=generator(self.settings.seed, "dropout", number, row))
        if chance.item() < self.settings.caption_dropout:
            return self.family.empty_prompt
        return self.samples[self.batches.at(number)[row]].caption

    def step(self, step: int) -> None:
        """One optimiser step, noted in the history."""
        parts = self.settings.gradient_accumulation
        numbers = range(step * parts, (step + 1) * parts)
        loss = with_fallback(
            self.family.transformer, lambda: self._gradients(numbers), self._drop_gradients
        )

        # Whether any process saw the word is known without asking: captions are counter-based.
        rows = range(self.settings.batch_size * self.processes.num_processes)
        seen = {self._caption(number, row) for number in numbers for row in rows}
        saw_word = bool(self.captions.trained & seen)
        if self.processes.num_processes > 1:
            loss = mean_of_all(loss, self.parameters if saw_word else self.lora_parameters)

        limit = self.settings.max_grad_norm
        self.norms = {
            "lora": nn.utils.clip_grad_norm_(self.lora_parameters, limit),
            "placeholder": nn.utils.clip_grad_norm_(self.rows, limit),
        }
        self._stepping = True
        for name, optimizer in self.optimizers.items():
            optimizer.param_groups[0]["lr"] = self._full_rates[name] * self._share_of_rate(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.step(self.parameters)
        self.history.losses.append(loss)
        if saw_word:
            self.history.row_norms.append(self.norms["placeholder"])
        self.done = step + 1
        self._stepping = False
        if self._ending is not None:
            raise self._ending

    def stop(self, ending: BaseException) -> None:
        """Raises `ending`, now or when the optimizer step that is half done is whole.

        For signal handlers: a state in the middle of a step cannot be resumed.
        """
        if not self._stepping:
            raise ending
        self._ending = ending

    def _gradients(self, numbers: Sequence[int]) -> Tensor:
        """Adds the gradients of these batches, and gives their mean loss."""
        losses = []
        for number in numbers:
            latents_BCHW, noise_BCHW, sigma_B, captions = self.batch(number)
            text = self.captions.features(captions)
            loss = flow_loss(self.family, latents_BCHW, noise_BCHW, sigma_B, text) / len(numbers)
            if loss.requires_grad:  # not where the placeholder is trained alone and was dropped
                loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _drop_gradients(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    @property
    def rates(self) -> dict[str, float]:
        """The learning rates of the last step, with the factor that prodigy finds by itself."""
        groups = {name: each.param_groups[0] for name, each in self.optimizers.items()}
        return {name: group["lr"] * group.get("d", 1.0) for name, group in groups.items()}

    def _share_of_rate(self, step: int) -> float:
        settings = self.settings
        return rate_at(step, settings.lr_scheduler, settings.warmup, settings.steps)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, LoRA and placeholder hold the values that are shipped: their running averages
        where `ema_decay` is above 0, else what they hold anyway."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def final_weights(self) -> tuple[Factors, Placeholder | None]:
        """Copies on the CPU of what would be written as weights now."""
        with self.averaged():
            factors = self.lora.factors() if self.lora is not None else {}
            return factors, self.placeholder.detached() if self.placeholder is not None else None

    def run(
        self,
        report: Report | None = None,
        saver: Saver | None = None,
        after_step: Sequence[Callable[["Loop"], None]] = (),
    ) -> Trained:
        """Does the steps that are left. `saver` writes checkpoints, the last one at the end.

        Each of `after_step` is called after every optimizer step, before its checkpoint; what it
        draws at random is its own affair, since the loop's draws are counter-based. Of several
        processes the main one alone shows, calls and writes.

        Where the run is stopped, its state is saved before the error goes on. Raises `Diverged`,
        naming the last good checkpoint, and `ZeroPriorBroken` for a token without a gradient.
        """
        steps, main = self.settings.steps, self.processes.is_main_process
        if not main:
            report, saver, after_step = None, None, ()
        shown = max(1, steps // 200)  # reading a loss waits for the device
        start, begun = self.done, time.perf_counter()
        try:
            if saver is not None and start < steps:
                saver.begin(self)
            bar = Progress(
                desc="training", total=steps, initial=start, lines=main, disable=not main
            )
            with bar as progress:
                for step in range(start, steps):
                    self.step(step)
                    if self.done % shown == 0 or self.done in (1, steps):
                        report = self._show(progress, report, shown)
                    self._check_gradient()
                    progress.update()
                    paused = time.perf_counter()
                    for call in after_step:
                        call(self)
                    begun += time.perf_counter() - paused  # watching is not the steps' time
                    if saver is not None:
                        saver.after_step(self)
            if not self.finite():
                raise Diverged("what was trained holds NaN or infinity; lower learning_rate")
            if saver is not None and start < steps:
                saver.finish(self)
        except Diverged as error:
            if saver is None or saver.newest is None:
                raise
            raise Diverged(f"{error}; the last good checkpoint is {saver.newest}") from error
        except BaseException as error:
            free_frames(error)  # of the failed step, whose tensors may fill the device
            if saver is not None and self.done > start:
                self._save_on_the_way_out(saver)
            raise
        plain = self.history.plain()
        return Trained(
            losses=plain["losses"],
            steps_per_second=(steps - start) / (time.perf_counter() - begun),
            row_norms=plain["row_norms"],
        )

    def _show(self, progress: Any, report: Report | None, shown: int) -> Report | None:
        """Shows the mean loss of the last steps. Gives the report to go on with."""
        loss = self.history.mean_loss(shown)
        if not loss < EXPLODED:  # NaN, too
            raise Diverged(
                f"the loss is {loss} at step {self.done}; lower learning_rate "
                f"({self.settings.learning_rate:g}) or leave it out"
            )
        progress.set_postfix(loss=f"{loss:.4f}", refresh=False)
        if report is not None:
            try:
                report("loss", loss)
                report("step", float(self.done))
            except Exception as error:
                log.warning("the progress is no longer reported (%s)", error)
                return None
        return report

    def _check_gradient(self) -> None:
        """Looks once, after a few steps, whether any of them had a gradient for the placeholder."""
        if self._gradient_seen or len(self.history.row_norms) < GRADIENT_STEPS:
            return
        assert self.placeholder is not None
        check_gradient(self.placeholder, self.history.plain()["row_norms"])
        self._gradient_seen = True

    def finite(self) -> bool:
        """Whether all that is trained is still finite numbers."""
        return all(bool(value.isfinite().all()) for value in self.named.values())

    def _save_on_the_way_out(self, saver: Saver) -> None:
        if self._stepping:
            log.warning(
                "stopped in the middle of an optimizer step; the last checkpoint is %s",
                saver.newest,
            )
            return
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)  # their memory is of use for the copies
        saver.stopped(self)

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """Takes over the whole state of a checkpoint, after which `run` does what is left."""
        for name, parameter in self.named.items():
            parameter.copy_(checkpoint.parameters[name])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(checkpoint.optimizers[name])
        if self.ema is not None:  # averages that were not kept before begin here
            kept = checkpoint.averages or self.named
            for name, average in zip(self.named, self.ema.shadow_params, strict=True):
                average.copy_(kept[name])
            self.ema.optimization_step = checkpoint.averaged_steps
        self.done = checkpoint.step
        past = checkpoint.history
        self.history = History(
            losses=list(past["losses"]),
            row_norms=list(past["row_norms"]),
            validation=[list(row) for row in past.get("validation", [])],
        )
