"""A run on another device than the CPU can be stopped and resumed: no tensors of two are mixed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import loop_on_meta
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.learning.checkpoint import read_checkpoint
from trainer.learning.history import History
from trainer.learning.saving import Saver
from trainer.learning.step_report import StepReport
from trainer.monitor.preview_images import PreviewImages
from trainer.monitor.tracking import TrackerUpdates
from trainer.monitor.validation import Validation
from trainer.settings.fields import Settings


class Readable(TorchDispatchMode):
    """Lets the meta device be read, as a GPU is: every value is 0.5. Mixing stays an error."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, torch.Tensor) and first.is_meta:
            if func is torch.ops.aten._local_scalar_dense.default:
                return 0.5
            if func is torch.ops.aten._to_copy.default and str(options.get("device")) == "cpu":
                return torch.full(first.shape, 0.5, dtype=options.get("dtype") or first.dtype)
        return func(*args, **options)


class Heard:
    """A tracker that keeps what it is given."""

    def __init__(self) -> None:
        self.values: list[dict[str, float]] = []

    def log(self, values: dict[str, float], step: int) -> None:
        self.values.append(values)


@pytest.fixture
def readable() -> Iterator[None]:
    with Readable():
        yield


def test_a_resumed_run_on_another_device_saves_shows_tracks_and_measures(
    small: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = small(steps=4, batch_size=2, checkpoint_every=1, validation_every=1)
    reported: list[tuple[str, float]] = []

    def run(steps: int, checkpoint: Path | None) -> tuple[Any, Heard, Saver]:
        """Goes on from a checkpoint for so many steps, with all that watches."""
        loop = loop_on_meta(settings)
        with Readable():
            if checkpoint is not None:
                loop.restore(read_checkpoint(checkpoint))
            heard, saver = Heard(), Saver(tmp_path)
            validation = Validation(loop, [])
            tracker_updates = TrackerUpdates(heard, validation.curves, PreviewImages(tmp_path, []))
            watchers = (validation, tracker_updates)
            for each in watchers:
                each.begin(loop)
            saver.begin(loop)
            shown = StepReport(loop, progress, lambda *values: reported.append(values))
            for _ in range(steps):
                for optimizer in loop.optimizers.values():
                    optimizer.step = lambda *_: None  # fused ones run on real devices alone
                loop.step(loop.done)
                shown.show(loop.done, loop.norms)
                loop._check_gradient()
                for each in watchers:
                    each.after_step(loop)
                saver.after_step(loop)
            saver.release()
        return loop, heard, saver

    class Silent:
        def set_postfix(self, **_: Any) -> None:
            pass

    progress = Silent()
    _, _, first = run(2, None)
    assert first.newest is not None
    loop, heard, second = run(2, first.newest)
    assert second.newest is not None
    kept = read_checkpoint(second.newest)
    assert kept.step == 4
    assert kept.history["losses"] == [0.5] * 4
    assert [row[0] for row in kept.history["validation"]] == [0, 1, 2, 3, 4]
    assert loop.history.plain() == kept.history
    assert [values["loss"] for values in heard.values if "loss" in values] == [0.5, 0.5]
    assert ("loss", 0.5) in reported


def test_losses_of_a_checkpoint_and_of_a_device_stand_in_one_history(readable: None) -> None:
    nowhere = torch.zeros((), device="meta")
    history = History(losses=[0.25, nowhere, torch.tensor(1.0), nowhere], row_norms=[[nowhere]])
    assert history.mean_loss(2) == 0.75
    assert history.plain()["losses"] == [0.25, 0.5, 1.0, 0.5]
    assert history.plain()["row_norms"] == [0.5]
