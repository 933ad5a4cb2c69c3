"""A run on another device than the CPU can be stopped and resumed: no tensors of two are mixed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import loop_on_meta
from torch.utils._python_dispatch import TorchDispatchMode

from families.recomputation import recompute
from trainer.learning.checkpoint import read_checkpoint
from trainer.learning.history import History
from trainer.learning.saving import Saver
from trainer.learning.step_report import StepReport
from trainer.memory.fitting import RanOut, running_out
from trainer.memory.plan import Mode
from trainer.monitor.inference_weights import InferenceWeights
from trainer.monitor.preview_images import PreviewImages
from trainer.monitor.previews import Previews
from trainer.monitor.tracking import TrackerUpdates
from trainer.monitor.validation import Validation, measure_fit
from trainer.result.drift import velocity_drift
from trainer.result.result_checks import update_size
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
            tracker_updates.finish()
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


def test_trackers_read_the_values_of_a_step_after_the_next_one(
    small: Callable[..., Settings], tmp_path: Path, readable: None
) -> None:
    loop, heard = loop_on_meta(small(steps=3)), Heard()
    updates = TrackerUpdates(heard, Validation(loop, []).curves, PreviewImages(tmp_path, []))
    loop.norms = dict.fromkeys(("lora", "placeholder"), torch.zeros((), device="meta"))
    sent = []
    for done in (1, 2, 3):
        loop.history.losses.append(torch.zeros((), device="meta"))
        loop.done = done
        updates.after_step(loop)
        sent.append(sum("loss" in values for values in heard.values))
        if done == 2:
            assert isinstance(loop.history.losses[-1], torch.Tensor)  # not waited for
    assert sent == [0, 1, 3]  # after the last step, all


def test_losses_of_a_checkpoint_and_of_a_device_stand_in_one_history(readable: None) -> None:
    nowhere = torch.zeros((), device="meta")
    history = History(losses=[0.25, nowhere, torch.tensor(1.0), nowhere], row_norms=[[nowhere]])
    assert history.mean_loss(2) == 0.75
    assert history.plain()["losses"] == [0.25, 0.5, 1.0, 0.5]
    assert history.plain()["row_norms"] == [0.5]


def test_previews_and_checks_of_a_run_on_another_device_leave_it_able_to_go_on(
    small: Callable[..., Settings], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The weights change places for an image, and back; the checks mix nothing either."""
    options = {"width": 64, "height": 64, "num_inference_steps": 2}
    settings = small(batch_size=2, sample_prompts=("a <zwx>", "a tree"), sample_options=options)
    loop = loop_on_meta(settings)
    loop.family.vae.to(loop.family.device)
    weights = InferenceWeights(loop.family)
    with Readable():
        for _ in range(2):
            for optimizer in loop.optimizers.values():
                optimizer.step = lambda *_: None  # fused ones run on real devices alone
            loop.step(loop.done)
            previews = Previews(loop.family, settings, weights, tmp_path)
            previews._generate(loop)
            assert len(previews.last) == 2
        fit = measure_fit(loop)
        assert [len(each) for each in fit.losses] == [len(fit.sigmas)] * 2
        assert loop.lora is not None
        assert update_size(loop.lora.changes()).value > 0
        assert velocity_drift(loop, [sample.caption for sample in loop.samples[:2]]) > 0
    assert "no preview" not in caplog.text
    layers = [each for each in loop.family.transformer.modules() if hasattr(each, "lora_A")]
    assert len(layers) == len(loop.lora.layers)


def test_a_run_on_another_device_that_runs_out_of_memory_is_resumed_in_the_next_mode(
    small: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small(steps=3, batch_size=2, sample_every=0, validation_every=0)
    loop, saver = loop_on_meta(settings), Saver(tmp_path)

    def full(number: int) -> Any:
        if number >= 2 * settings.gradient_accumulation:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return batch(number)

    batch = loop.batch
    monkeypatch.setattr(loop, "batch", full)
    for optimizer in loop.optimizers.values():
        optimizer.step = lambda *_: None
    device, dtype = loop.family.device, loop.family.dtype
    with Readable(), pytest.raises(RanOut) as short:
        with running_out(settings, dtype, device, Mode(), saver):
            loop.run(saver=saver)
    saver.release()
    leaner = short.value.leaner
    assert leaner is not None and leaner.gradient_checkpointing
    assert leaner.resume_from == saver.newest
    again = loop_on_meta(leaner)
    recompute(again.family, 0.5)
    with Readable():
        again.restore(read_checkpoint(saver.newest))
        for optimizer in again.optimizers.values():
            optimizer.step = lambda *_: None
        assert again.done == 2
        again.step(again.done)
        assert again.history.plain()["losses"] == [0.5] * 3
