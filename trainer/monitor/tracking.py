"""Sends losses, norms and preview images of a run to its trackers."""

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from trainer.learning import History, Loop
from trainer.monitor.preview_images import PreviewImages
from trainer.monitor.trackers import Trackers
from trainer.monitor.validation import Curves

UPDATES = 200  # of numbers in a run; reading a loss waits for the device


class TrackerUpdates:
    """Sends values of the loop, validation losses and preview images to the trackers.

    Must be called last after a step, when losses and images of the step exist. On a GPU the values
    of a step are read one step later, so that the process can prepare that step meanwhile.
    """

    def __init__(self, trackers: Trackers, curves: Curves, preview_images: PreviewImages) -> None:
        self.trackers, self.curves, self.preview_images = trackers, curves, preview_images
        self._measured = 0  # measurements already sent
        self._shown: set[int] = set()  # steps whose images were sent
        self._due: Callable[[], None] | None = None  # reads and sends the values of a step

    def begin(self, loop: Loop) -> None:
        """Sends the losses and images from before the first step."""
        self.send()

    def after_step(self, loop: Loop) -> None:
        """Sends the values of the last step, about `UPDATES` times in a run."""
        if not self.trackers:
            return
        self._send_due()
        steps, done = loop.settings.steps, loop.done
        every = max(1, steps // UPDATES)
        if done % every == 0 or done in (1, steps):
            self._due = partial(self._log, loop.history, every, done, _values(loop))
            if loop.family.device.type == "cpu" or done >= steps:
                self._send_due()
        self.send()

    def finish(self) -> None:
        """Sends what has not been sent."""
        self._send_due()
        self.send()

    def _send_due(self) -> None:
        due, self._due = self._due, None
        if due is not None:
            due()

    def _log(
        self, history: History, every: int, done: int, values: Mapping[str, float | Tensor]
    ) -> None:
        """Waits for the device until it has done the step."""
        read = {name: float(value) for name, value in values.items()}
        self.trackers.log({"loss": history.mean_loss(every, done)} | read, done)

    def send(self) -> None:
        """Sends new validation losses and preview images."""
        for row in range(self._measured, len(self.curves.steps)):
            values = {f"{self.curves.kind}/loss": self.curves.means[row]}
            for sigma, loss in zip(self.curves.sigmas, self.curves.losses[row], strict=True):
                values[f"{self.curves.kind}/sigma_{sigma:.2f}"] = loss
            self.trackers.log(values, self.curves.steps[row])
        self._measured = len(self.curves.steps)
        generated = set(self.preview_images.thumbnails) - self._shown
        # A resumed run has thumbnails of earlier steps before it generates images.
        if generated and self.preview_images.last:
            images = {f"samples/{k:02d}": each for k, each in enumerate(self.preview_images.last)}
            self.trackers.images(images, max(generated))
        self._shown |= generated


def _values(loop: Loop) -> dict[str, float | Tensor]:
    """Rates and norms of the last step; those on the device are not read."""
    values: dict[str, float | Tensor] = {}
    for name, rate in loop.rates.items():
        values[f"learning_rate/{name}"] = rate
        values[f"gradient_norm/{name}"] = loop.norms[name]
    for each in loop.placeholders:
        of = f"/{each.token.strip('<>')}" if len(loop.placeholders) > 1 else ""
        values[f"placeholder_norm{of}"] = each.norm_on_device()
    return values
