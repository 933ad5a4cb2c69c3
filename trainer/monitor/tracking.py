"""Sends losses, norms and preview images of a run to its trackers."""

from trainer.learning import Loop
from trainer.monitor.preview_images import PreviewImages
from trainer.monitor.trackers import Trackers
from trainer.monitor.validation import Curves

UPDATES = 200  # of numbers in a run; reading a loss waits for the device


class TrackerUpdates:
    """Sends values of the loop, validation losses and preview images to the trackers.

    Must be called last after a step, when losses and images of the step exist.
    """

    def __init__(self, trackers: Trackers, curves: Curves, preview_images: PreviewImages) -> None:
        self.trackers, self.curves, self.preview_images = trackers, curves, preview_images
        self._measured = 0  # measurements already sent
        self._shown: set[int] = set()  # steps whose images were sent

    def begin(self, loop: Loop) -> None:
        """Sends the losses and images from before the first step."""
        self.send()

    def after_step(self, loop: Loop) -> None:
        """Sends the values of the last step, about `UPDATES` times in a run."""
        if not self.trackers:
            return
        steps = loop.settings.steps
        every = max(1, steps // UPDATES)
        if loop.done % every == 0 or loop.done in (1, steps):
            values = {"loss": loop.history.mean_loss(every)}
            for name, rate in loop.rates.items():
                values[f"learning_rate/{name}"] = rate
                values[f"gradient_norm/{name}"] = float(loop.norms[name])
            for each in loop.placeholders:
                of = f"/{each.token.strip('<>')}" if len(loop.placeholders) > 1 else ""
                values[f"placeholder_norm{of}"] = each.norm()
            self.trackers.log(values, loop.done)
        self.send()

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
