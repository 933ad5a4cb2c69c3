"""What a training shows to its trackers, step by step."""

from trainer.learning import Loop
from trainer.monitor.preview_images import PreviewImages
from trainer.monitor.trackers import Trackers
from trainer.monitor.validation import Curves

MOMENTS = 200  # at which numbers are sent; reading a loss waits for the device


class TrackerUpdates:
    """Reads the loop, the validation's curves and the album, and tells the trackers.

    Comes last among those who are called after a step, so that it sees what they made of it.
    """

    def __init__(self, trackers: Trackers, curves: Curves, preview_images: PreviewImages) -> None:
        self.trackers, self.curves, self.preview_images = trackers, curves, preview_images
        self._measured = 0  # measurements that were sent
        self._shown: set[int] = set()  # steps whose pictures were sent

    def begin(self, loop: Loop) -> None:
        """Sends what was measured and drawn before the first step."""
        self.send()

    def after_step(self, loop: Loop) -> None:
        """Sends what there is to say about the step that was just done."""
        if not self.trackers:
            return
        steps = loop.settings.steps
        every = max(1, steps // MOMENTS)
        if loop.done % every == 0 or loop.done in (1, steps):
            values = {"loss": loop.history.mean_loss(every)}
            for name, rate in loop.rates.items():
                values[f"learning_rate/{name}"] = rate
                values[f"gradient_norm/{name}"] = float(loop.norms[name])
            if loop.placeholder is not None:
                values["placeholder_norm"] = loop.placeholder.norm()
            self.trackers.log(values, loop.done)
        self.send()

    def send(self) -> None:
        """Sends the measurements and the pictures that are new."""
        for row in range(self._measured, len(self.curves.steps)):
            values = {f"{self.curves.kind}/loss": self.curves.means[row]}
            for sigma, loss in zip(self.curves.sigmas, self.curves.losses[row], strict=True):
                values[f"{self.curves.kind}/sigma_{sigma:.2f}"] = loss
            self.trackers.log(values, self.curves.steps[row])
        self._measured = len(self.curves.steps)
        generated = set(self.preview_images.thumbnails) - self._shown
        if (
            generated and self.preview_images.last
        ):  # a resumed run has earlier pictures, and none drawn last
            pictures = {f"samples/{k:02d}": each for k, each in enumerate(self.preview_images.last)}
            self.trackers.pictures(pictures, max(generated))
        self._shown |= generated
