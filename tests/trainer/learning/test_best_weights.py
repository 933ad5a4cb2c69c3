"""The best weights are saved, and a run ends early, by the loss on held-out images."""

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import make_loop

from adapters.archive import Archive, read_archive
from lab.benchmarks.kill import learned
from trainer import reading, run
from trainer.events import read_events
from trainer.learning.best_weights import Best, keep_best, restore_best, why_ended
from trainer.learning.checkpoint import latest, read_checkpoint, write_checkpoint
from trainer.learning.loop import Loop
from trainer.learning.saving import checkpoint_bytes, state_of
from trainer.monitor import validation
from trainer.monitor.validation import Curves, Validation
from trainer.result.model_card import model_card
from trainer.settings.fields import Settings, SettingsError, resolve
from trainer.settings.inputs import TrainingInputs
from trainer.state import run_state

# Its learning rate is far too high, so the loss is lowest early, and the run ends early.
RISING: dict[str, Any] = {
    **{"keep_best": True, "early_stopping": True, "learning_rate": 0.3, "ema_decay": 0.2},
    **{"lr_scheduler": "constant", "lr_warmup_steps": 0, "steps": 7, "batch_size": 2},
    **{"validation_every": 1, "validation_images": 2, "checkpoint_every": 1},
}


class Cancelled(BaseException):
    """What ends a run from outside."""


def settings_of(dataset: Path, output_dir: Path, **changes: Any) -> Settings:
    """Settings of a short run on the embedded miniature."""
    values: dict[str, Any] = {"dataset": dataset, "base_model": "miniature-turbo", "seed": 5}
    values |= {"resolution": "64", "rank": 2, "sample_prompts": (), "preserve": "off"}
    return resolve(TrainingInputs(**values | {"output_dir": output_dir} | changes))


@pytest.fixture(autouse=True)
def few_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "ITEMS", 1)  # a measurement is shorter


@pytest.fixture
def tiny(photos: Path, tmp_path: Path) -> Callable[..., Settings]:
    return partial(settings_of, photos, tmp_path / "out")


def assert_same(one: Archive, other: Archive) -> None:
    ours, theirs = learned(one), learned(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def curve_of(meta: dict[str, Any]) -> Curves:
    return Curves(**meta["validation"])


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a run that ended early, and saved weights that are earlier still."""
    root = logging.getLogger()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "ITEMS", 1)
        patch.setattr(root, "level", logging.INFO)  # as on the command line
        return run.train(settings_of(photos, tmp_path_factory.mktemp("whole"), **RISING))


def test_the_best_weights_are_saved_and_the_run_ends_early_and_says_so(
    whole: Path,
) -> None:
    archive = read_archive(whole)
    meta, curves = archive.meta, curve_of(archive.meta)
    best = min(range(1, len(curves.steps)), key=curves.means.__getitem__)
    shipped, end = curves.steps[best], curves.steps[-1]
    assert meta["shipped_step"] == shipped < shipped + 3 == end == meta["steps"] < RISING["steps"]
    checkpoints = whole.parent / "checkpoints"
    assert_same(archive, read_archive(checkpoints / f"step-{shipped:06d}.zip"))
    newest = latest(checkpoints)
    assert newest is not None and read_checkpoint(newest).step == end  # the last state stays

    why = f"ended early at step {end} of 7: the validation loss was lowest at step {shipped} "
    assert meta["ended_early"].startswith(why)
    page = (whole.parent / "report.html").read_text()
    for part in (why, f"the weights of step {shipped}", f"saved: step {shipped}"):
        assert part in page
    sentence = next(each for each in meta["checks"] if "loss fell" in each["name"])["sentence"]
    assert f"at step {shipped}, whose weights are saved" in sentence
    card = model_card("me/fox", meta, [])
    assert f"| step of these weights | {shipped} |" in card and why in card

    events = list(read_events(whole.parent))
    done = events[-1]
    assert (done["type"], done["step"], done["early"]) == ("done", end, True)
    assert (done["shipped"], done["why"]) == (shipped, meta["ended_early"])
    assert [each["step"] for each in events if each["type"] == "best"][-1] == shipped
    losses = [loss for each in events if each["type"] == "steps" for loss in each["loss"]]
    assert losses == json.loads((whole.parent / "record.json").read_text())["losses"]
    state = run_state(whole.parent)
    assert state is not None and str(state).startswith(f"done at step {end}: {why}")
    console = (whole.parent / "log.txt").read_text()
    assert why in console and f"weights.zip gets the weights of step {shipped}" in console


@pytest.mark.parametrize(
    "place", ["step", *(pytest.param(each, marks=pytest.mark.slow) for each in ("measure", "end"))]
)
def test_a_run_that_is_killed_and_resumed_saves_the_same_weights_at_the_same_end(
    place: str,
    whole: Path,
    tiny: Callable[..., Settings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed in a step, in a measurement, or after the last step, when no step is done again."""
    kind, name = {"step": (Loop, "step"), "measure": (Validation, "measure")}.get(
        place, (run, "write_weights")
    )
    original, calls = getattr(kind, name), []

    def killed(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 4 or place == "end":
            raise Cancelled
        return original(*arguments)

    settings = tiny(**RISING)
    with monkeypatch.context() as patch:
        patch.setattr(kind, name, killed)
        with pytest.raises(Cancelled):
            run.train(settings)
    folder = tmp_path / "out" / "checkpoints"
    if place == "end":
        monkeypatch.setattr(Loop, "step", lambda *_: pytest.fail("a step was done"))
    resumed = read_archive(run.train(settings.replace(resume_from=folder)))
    wanted = read_archive(whole)
    assert_same(resumed, wanted)
    for key in ("shipped_step", "ended_early", "steps", "validation"):
        assert resumed.meta[key] == wanted.meta[key]
    ours, theirs = (
        read_checkpoint(each)
        for each in (latest(folder), latest(whole.parent / "checkpoints"))
        if each is not None
    )
    assert (ours.identity, ours.history) == (theirs.identity, theirs.history)
    assert ours.best["step"] == theirs.best["step"] == wanted.meta["shipped_step"]
    for name, value in theirs.best["weights"].items():
        assert torch.equal(value, ours.best["weights"][name])


def test_best_weights_of_other_held_out_images_are_discarded(
    tiny: Callable[..., Settings], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = tiny(**RISING)
    loop = make_loop(settings, 4)
    loop.data = {"a.png": ["1", "2"]}
    loop.step(0)
    keep_best(loop, 0.5)
    keep_best(loop, 0.6)
    keep_best(loop, float("nan"))
    assert loop.best is not None and (loop.best.step, loop.best.loss) == (1, 0.5)
    path = write_checkpoint(state_of(loop), tmp_path)
    assert path.stat().st_size <= checkpoint_bytes(loop)  # room is reserved for them, too
    kept = read_checkpoint(path)
    for data, same in (({"a.png": ["1", "2"]}, True), ({"a.png": ["3", "2"]}, False)):
        loop.best, loop.data, loop.history.validation = None, data, [[0, 1.0]]
        restore_best(loop, kept)
        assert bool(loop.history.validation) == same
        assert isinstance(loop.best, Best) == same
    assert "begin again at step 1" in caplog.text
    loop.best = None
    loop.settings = settings.replace(keep_best=False)
    restore_best(loop, kept)
    assert loop.best is None


@pytest.mark.parametrize(
    ("losses", "ends"),
    [
        ((3, 2, 1, 1.1, 1.2), False),  # only two since the lowest
        ((3, 2, 1, 1.1, 1.2, 1.05), True),
        ((3, 2, 1, 1.1, 1.2, 0.999), False),  # a new minimum, however small
        ((0.1, 2, 1, 0.9, 0.8, 0.7), False),  # the base model's does not count
        ((3, 1, 1, 1, 1), True),  # equal is no improvement
        ((3,), False),
    ],
)
def test_a_run_ends_after_three_measurements_without_a_new_minimum(
    losses: tuple[float, ...], ends: bool, tiny: Callable[..., Settings]
) -> None:
    settings = tiny(**RISING | {"steps": 100})
    assert bool(why_ended([10 * k for k in range(len(losses))], losses, settings)) == ends
    # Measured more often, three measurements are less than 30 % of the steps.
    assert not why_ended([2 * k for k in range(len(losses))], losses, settings)
    off = settings.replace(early_stopping=False)
    assert not why_ended([10 * k for k in range(len(losses))], losses, off)


@pytest.mark.parametrize("name", ["keep_best", "early_stopping"])
def test_without_held_out_images_they_are_refused_before_a_model_is_loaded(
    name: str, tiny: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "load_family", lambda *_: pytest.fail("a model is loaded"))
    said = f"{name} needs held-out images, .* none of 6 .*; set validation_images, for example to 1"
    with pytest.raises(SettingsError, match=said):
        run.train(tiny(**{name: True}))
    for other in ("validation_images", "validation_every"):
        with pytest.raises(SettingsError, match=f"{name} needs the loss .* but {other} is 0"):
            tiny(**{name: True, other: 0})
