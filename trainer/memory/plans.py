"""Plans of many runs in one process, as a page asks for while settings change."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from families.device import device_name
from families.loading import default_device
from families.memory import RESERVE, free_and_total
from families.quantization import usable
from trainer.memory.fitting import mode_on_cpu, preview_size, wishes_of
from trainer.memory.plan import Figures, Mode, choose, ladder_of
from trainer.memory.plan_table import count
from trainer.memory.speed import GPUS, step_seconds
from trainer.settings import Settings, extent_of, missing_here

KEPT = 256  # counted figures
BASE_BYTES = 16 << 20  # of reports, logs and previews on disk


class Plans:
    """Plans runs. What memory depends on is counted once; other changes use it again."""

    def __init__(self) -> None:
        # With the number of images of preservation, which needs no other count.
        self._figures: dict[object, tuple[Figures, int]] = {}

    def plan(self, settings: Settings) -> dict[str, Any]:
        """Memory in each mode, time of a step and disk space, in JSON types.

        fits, gpu_bytes and seconds_per_step are None without a GPU; the last also for a GPU whose
        speed is not known.
        """
        counted, wishes = self._counted(settings), wishes_of(settings)
        device = default_device()
        fits, room, seconds, gpu_bytes = None, None, None, None
        if device.type == "cpu":
            mode = mode_on_cpu(wishes)
            peak = counted.peak(mode)
        else:
            # The whole GPU: what is in use now may be free when the run starts.
            gpu_bytes = free_and_total(device)[1]
            choice = choose(counted, gpu_bytes, wishes, usable(device))
            mode, fits, peak = choice.mode, choice.fits, choice.peak
            room = gpu_bytes * (1 - RESERVE)
            name = device_name(device)
            known = next((gpu for each, gpu in GPUS.items() if each in name), None)
            flops = counted.flops(mode), counted.fetched(mode)
            seconds = step_seconds(known, *flops) if known else None
        return {
            "fits": fits,
            "mode": mode.label,
            "modes": [
                {
                    "mode": each.label,
                    "peak_bytes": counted.peak(each),
                    "fits": None if room is None else counted.peak(each) <= room,
                }
                for each in _with(mode, ladder_of(counted))
            ],
            "parts": [{"name": k, "bytes": v} for k, v in counted.parts(mode).items()],
            "peak_bytes": peak,
            "gpu_bytes": gpu_bytes,
            "seconds_per_step": seconds,
            # Two checkpoints, the weights of ten previews and of `weights_every`, and the result.
            "disk_bytes": 2 * counted.checkpoint()
            + (settings.weights_saved() + (1 if counted.full else 12)) * counted.lora_file
            + BASE_BYTES,
            "missing": missing_here(settings),
        }

    def _counted(self, settings: Settings) -> Figures:
        extent = extent_of(settings) if settings.preserve else None
        images = extent.images + extent.subject_images if extent is not None else 0
        key = (
            settings.base.name,
            settings.training,
            settings.lora_targets,
            settings.form,
            settings.batch_size,
            settings.resolutions,
            settings.subject is None,
            settings.optimizer,
            settings.ema_decay > 0,
            settings.keep_best,
            settings.gradient_accumulation > 1,
            preview_size(settings) if settings.sample_prompts else None,
            extent and replace(extent, images=0, subject_images=0),
            settings.pairs,
        )
        if key not in self._figures:
            while len(self._figures) >= KEPT:
                self._figures.pop(next(iter(self._figures)))
            self._figures[key] = count(settings), images
        figures, counted = self._figures[key]
        if images == counted:
            return figures
        load = figures.preservation
        return replace(figures, preservation=replace(load, images=load.images // counted * images))


def _with(mode: Mode, ladder: Sequence[Mode]) -> Iterator[Mode]:
    """The ladder, and in its place a mode that recomputes a part of the blocks."""
    for each in ladder:
        if not mode.whole and each == replace(mode, checkpointing=1.0):
            yield mode
        yield each
