"""Reports the steps of a run: progress bar, callback, and events."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trainer.events import SECONDS
from trainer.learning.saving import Diverged

if TYPE_CHECKING:
    from trainer.learning.loop import Loop

log = logging.getLogger(__name__)

Report = Callable[[str, float], None]  # called with a metric's name and value

# A model that predicts zero has a loss of about 2, the variance of noise and latents together.
EXPLODED = 100.0
MOMENTS = 200  # in a run at which losses are read; reading waits for the device


class StepReport:
    """Reads the losses of a loop from time to time, and shows them.

    On a GPU they are read one step late, when the next step is queued: the GPU would be idle while
    the process prepares a step.
    """

    def __init__(self, loop: "Loop", progress: Any, report: Report | None) -> None:
        self._loop, self._progress, self._report = loop, progress, report
        self._every = max(1, loop.settings.steps // MOMENTS)
        self._emitted = loop.done  # steps whose losses are in events
        self._time = time.monotonic()  # of the last such event
        self._norms: dict[str, float] = {}  # of the gradients, when the losses were read
        self._late = loop.family.device.type != "cpu"
        self._due: tuple[int, dict[str, Tensor]] | None = None  # a step, and its gradients' norms

    def after_step(self) -> None:
        """Shows the mean loss of the last steps if it is due. Raises `Diverged`."""
        done, last = self._loop.done, self._loop.settings.steps
        if self._due is not None:
            self.show(*self._due)
            self._due = None
        if done % self._every == 0 or done in (1, last):
            if self._late and done < last:
                self._due = done, self._loop.norms
            else:
                self.show(done, self._loop.norms)

    def show(self, done: int, norms: Mapping[str, Tensor]) -> None:
        """Shows the mean loss of the steps before `done` since it was last read."""
        loop = self._loop
        loss = loop.history.mean_loss(self._every, done)
        # The device has done all its work for the losses, so this waits for nothing more.
        self._norms = {name: float(norm) for name, norm in norms.items()}
        if time.monotonic() - self._time >= SECONDS:
            self.emit()
        if not loss < EXPLODED:  # NaN, too
            self.emit()
            raise Diverged(
                f"the loss is {loss} at step {done}; lower learning_rate "
                f"({loop.settings.learning_rate:g}) or use the default"
            )
        self._progress.set_postfix(loss=f"{loss:.4f}", refresh=False)
        if self._report is not None:
            try:
                self._report("loss", loss)
                self._report("step", float(done))
            except Exception as error:
                log.warning("progress is no longer reported (%s)", error)
                self._report = None

    def emit(self) -> None:
        """Emits the steps whose losses have been read; never waits for the device."""
        loop, now = self._loop, time.monotonic()
        losses = loop.history.losses_read()
        if len(losses) > self._emitted:
            loop.events.emit(
                "steps",
                **{"from": self._emitted + 1},
                loss=losses[self._emitted :],
                rate=loop.rates,
                norm=self._norms,
                seconds=round(now - self._time, 3),
            )
            self._emitted, self._time = len(losses), now
