"""Reports the steps of a run: progress bar, callback, and events."""

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

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
    """Reads the losses of a loop from time to time, and shows them."""

    def __init__(self, loop: "Loop", progress: Any, report: Report | None) -> None:
        self._loop, self._progress, self._report = loop, progress, report
        self._every = max(1, loop.settings.steps // MOMENTS)
        self._emitted = loop.done  # steps whose losses are in events
        self._time = time.monotonic()  # of the last such event
        self._norms: dict[str, float] = {}  # of the gradients, when the losses were read

    def after_step(self) -> None:
        """Shows the mean loss of the last steps if it is due. Raises `Diverged`."""
        done = self._loop.done
        if done % self._every == 0 or done in (1, self._loop.settings.steps):
            self.show()

    def show(self) -> None:
        """Shows the mean loss of the steps since it was last read."""
        loop = self._loop
        loss = loop.history.mean_loss(self._every)
        # The device has done all its work for the losses, so this waits for nothing more.
        self._norms = {name: float(norm) for name, norm in loop.norms.items()}
        if time.monotonic() - self._time >= SECONDS:
            self.emit()
        if not loss < EXPLODED:  # NaN, too
            self.emit()
            raise Diverged(
                f"the loss is {loss} at step {loop.done}; lower learning_rate "
                f"({loop.settings.learning_rate:g}) or use the default"
            )
        self._progress.set_postfix(loss=f"{loss:.4f}", refresh=False)
        if self._report is not None:
            try:
                self._report("loss", loss)
                self._report("step", float(loop.done))
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
