"""After the last step nothing that was trained is lost, and finished weights are handed over."""

import os
import signal
import weakref
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.archive import read_archive
from families.family import Family
from lab.benchmarks.kill import learned
from trainer import reading, run
from trainer.data.dataset import DatasetError
from trainer.learning.checkpoint import latest, read_checkpoint
from trainer.learning.loop import Loop
from trainer.learning.saving import SECONDS, Saver
from trainer.learning.zero_prior import ZeroPriorBroken, ZeroPriorProof
from trainer.monitor.preview_images import PreviewImages
from trainer.monitor.previews import Previews
from trainer.result import evaluation
from trainer.result.result_checks import PREVIEW, SKIPPED
from trainer.settings.fields import Settings, SettingsError

STEPS = 2
PREVIEWS: dict[str, Any] = {
    "sample_prompts": ("<zwx>",),
    "sample_options": {"width": 32, "height": 32, "num_inference_steps": 1},
}


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture
def tiny(
    small: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Settings]:
    """Settings of a short run on the embedded miniature."""
    monkeypatch.delenv("MODEL_VAULT")
    nothing = {"validation_every": 0, "checkpoint_every": 0, "caption_dropout": 0.0}
    return partial(small, base_model="miniature", batch_size=1, steps=STEPS, **nothing)


def raising(error: BaseException) -> Callable[..., Any]:
    """A function that does nothing but fail."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def folder_of(settings: Settings) -> Path:
    assert settings.output_dir is not None
    return settings.output_dir


def no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Loop, "step", lambda *_: pytest.fail("a step was done"))


# ---- Before weights.zip --------------------------------------------------------------------------

PLACES = {
    "proof": (ZeroPriorProof, "results"),
    "describe": (run.TrainingRecord, "of"),
    "judge": (run, "write_weights"),
    "a check": (evaluation.result_checks, "reloads"),
}


@pytest.mark.parametrize(
    "place", ["proof", *(slow(each) for each in ("describe", "judge", "a check"))]
)
def test_an_error_after_the_last_step_keeps_weights_and_state(
    place: str, tiny: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny()
    with monkeypatch.context() as patch:
        patch.setattr(*PLACES[place], raising(RuntimeError("anything")))
        with pytest.raises(RuntimeError, match="anything"):
            run.train(settings)
    folder = folder_of(settings)
    kept = ["checkpoints", "events.jsonl", "log.txt", "run.json", "run.lock", "weights-failed.zip"]
    assert sorted(each.name for each in folder.iterdir()) == kept
    failed = read_archive(folder / "weights-failed.zip")
    assert failed.base_model == settings.base.hub_id
    assert failed.placeholder is not None and failed.placeholder.token == "<zwx>"

    # The same run resumed does no step, and writes the weights.
    newest = latest(folder / "checkpoints")
    assert newest is not None and read_checkpoint(newest).step == STEPS
    no_step(monkeypatch)
    weights = run.train(tiny(resume_from=folder / "checkpoints"))
    got, wanted = learned(read_archive(weights)), learned(failed)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("place", "stop"), [("describe", SystemExit(143)), slow("proof", KeyboardInterrupt())]
)
def test_a_run_that_is_stopped_after_its_last_step_has_a_checkpoint_of_it(
    stop: BaseException,
    place: str,
    tiny: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = tiny()
    monkeypatch.setattr(*PLACES[place], raising(stop))
    with pytest.raises(type(stop)):
        run.train(settings)
    newest = latest(folder_of(settings) / "checkpoints")
    assert newest is not None and read_checkpoint(newest).step == STEPS


@pytest.mark.slow
def test_out_of_memory_after_the_last_step_does_no_step_again(
    tiny: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_weights, steps = run.write_weights, []

    def once(*arguments: Any) -> Any:
        monkeypatch.setattr(run, "write_weights", write_weights)
        monkeypatch.setattr(Loop, "step", lambda _, step: steps.append(step))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run, "write_weights", once)
    weights = run.train(tiny())
    assert weights.is_file() and steps == []
    assert not weights.with_name("weights-failed.zip").exists()


# ---- After weights.zip ---------------------------------------------------------------------------


def redrawn_no_more(patch: pytest.MonkeyPatch) -> None:
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    patch.setattr(evaluation, "generate", raising(error))


def gpu_is_gone(patch: pytest.MonkeyPatch) -> None:
    """After such an error the GPU answers nothing, not even that memory is given back."""
    redrawn_no_more(patch)
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "empty_cache", raising(RuntimeError("CUDA error")))


def no_second_writing(patch: pytest.MonkeyPatch) -> None:
    write = evaluation.write_archive

    def once(archive: Any, path: Path) -> Path:
        if path.name == "weights.zip":
            raise OSError(28, "No space left on device", str(path))
        return write(archive, path)

    patch.setattr(evaluation, "write_archive", once)


def no_report(patch: pytest.MonkeyPatch) -> None:
    full = raising(OSError(28, "No space left on device"))
    patch.setattr(evaluation.report, "write_report", full)


def no_sheet(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PreviewImages, "add", raising(OSError(28, "No space left on device")))


def no_processes(patch: pytest.MonkeyPatch) -> None:
    class Gone:
        num_processes, is_main_process = 1, True
        wait_for_everyone = staticmethod(raising(RuntimeError("a process is gone")))

    patch.setattr(run, "processes", Gone)


@pytest.mark.parametrize(
    ("breaks", "said"),
    [
        slow(redrawn_no_more, "a check of the result is skipped: AcceleratorError"),
        (no_second_writing, "lacks the check results: OSError"),
        slow(no_report, "report.html is not written: OSError"),
        slow(no_sheet, "the images of the last step are not written: OSError"),
        slow(no_processes, "is complete, but a later step failed"),
        (gpu_is_gone, "the GPU's memory cannot be freed"),
    ],
)
def test_what_fails_after_the_weights_are_written_is_a_warning(
    breaks: Callable[[pytest.MonkeyPatch], None],
    said: str,
    tiny: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    evaluate = run.evaluate

    def broken(outcome: Any) -> None:
        breaks(monkeypatch)
        evaluate(outcome)

    monkeypatch.setattr(run, "evaluate", broken)
    settings = tiny(**PREVIEWS) if breaks is not no_processes else tiny()
    if breaks is no_sheet:
        monkeypatch.setattr(Previews, "after_step", lambda *_: None)
    weights = run.train(settings)
    assert weights == folder_of(settings) / "weights.zip"
    assert said in caplog.text
    found = {
        check["name"]: check["state"] for check in read_archive(weights).meta.get("checks", [])
    }
    if breaks is redrawn_no_more:
        assert found[PREVIEW] == SKIPPED


@pytest.mark.slow
def test_an_upload_that_fails_in_any_way_is_a_warning(
    tiny: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(run, "check_repository", lambda *_: None)
    monkeypatch.setattr(run, "publish", raising(SettingsError("hf_token is gone")))
    assert run.train(tiny(hf_repo_id="me/robot")).is_file()
    assert "hf_token is gone" in caplog.text


def test_when_the_result_is_checked_only_the_base_is_left_of_the_training_and_is_not_loaded_again(
    tiny: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Any]] = []
    alive: list[Any] = []
    redrawn, begin, load = evaluation._compare_images, Saver.begin, reading.load_family

    def loaded(*arguments: Any) -> Family:
        family = load(*arguments)
        made.append(weakref.ref(family))
        return family

    def begun(self: Saver, loop: Loop) -> None:
        parts = (loop, loop.family.transformer, loop.family.text_encoder, loop.lora)
        made.extend(map(weakref.ref, parts))
        begin(self, loop)

    def look(*arguments: Any) -> None:
        alive.extend(ref() for ref in made)
        redrawn(*arguments)

    monkeypatch.setattr(reading, "load_family", loaded)
    monkeypatch.setattr(Saver, "begin", begun)
    monkeypatch.setattr(evaluation, "_compare_images", look)
    run.train(tiny(**PREVIEWS))
    family, loop, transformer, _, lora = alive
    assert loop is None and lora is None
    assert family is not None and family.transformer is transformer
    assert len(made) == 5  # one family


# ---- Previews and progress -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "error"),
    [
        ("trainer.monitor.preview_images.save_png", OSError(28, "No space left on device")),
        slow("trainer.monitor.previews.generate", RuntimeError("CUDA error: anything")),
        slow(
            "trainer.monitor.inference_weights.LoraMerger",
            torch.OutOfMemoryError("CUDA out of memory"),
        ),
        slow("trainer.monitor.preview_images.make_sheet", ValueError("anything")),
        slow(
            "trainer.monitor.preview_images.PreviewImages.begin", OSError(5, "Input/output error")
        ),
    ],
    ids=str,
)
def test_whatever_fails_for_a_preview_is_a_warning_and_the_next_step_runs(
    part: str,
    error: Exception,
    tiny: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = tiny()
    wanted = learned(read_archive(run.train(settings)))
    monkeypatch.setattr(part, raising(error))
    other = folder_of(settings).with_name("other")
    got = learned(read_archive(run.train(tiny(**PREVIEWS, sample_every=1, output_dir=other))))
    assert "no preview at step 0: " in caplog.text
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_progress_that_cannot_be_shown_or_reported_stops_no_run(
    tiny: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A terminal that is gone, a log on a full disk, a server that hears nothing."""

    class Full:
        def write(self, _: str) -> int:
            raise OSError(28, "No space left on device")

        def isatty(self) -> bool:
            return True

        flush = write

    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)  # there is a bar
    step = Loop.step

    def gone(self: Loop, number: int) -> None:
        step(self, number)
        monkeypatch.setattr("sys.stderr", Full())
        monkeypatch.setattr("inference.progress.Progress.status_printer", lambda *_: Full().write)

    monkeypatch.setattr(Loop, "step", gone)
    assert run.train(tiny(), raising(RuntimeError("nobody listens"))).is_file()
    assert "no longer reported (nobody listens)" in caplog.text


# ---- The placeholder's gradient ------------------------------------------------------------------


def test_a_placeholder_without_a_gradient_is_found_in_the_first_steps(
    tiny: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Loop.step

    def cut(self: Loop, number: int) -> None:
        self.rows[0].register_hook(torch.zeros_like)
        step(self, number)

    monkeypatch.setattr(Loop, "step", cut)
    settings = tiny(steps=50)
    with pytest.raises(ZeroPriorBroken, match="zero in every step with it"):
        run.train(settings)
    newest = latest(folder_of(settings) / "checkpoints")
    assert newest is not None and read_checkpoint(newest).step == 5


def captioned(path: Path, photos: Path, captions: list[str]) -> Path:
    """The photographs with other captions."""
    with zipfile.ZipFile(photos) as old, zipfile.ZipFile(path, "w") as new:
        images = [name for name in old.namelist() if not name.endswith(".txt")]
        for name, caption in zip(images, captions, strict=False):
            new.writestr(name, old.read(name))
            new.writestr(Path(name).stem + ".txt", caption)
    return path


LATE = "word " * 20_000 + "TOK"


@pytest.mark.parametrize("late", [LATE[-60_000:], "word " * 513 + "TOK"], ids=len)
def test_a_placeholder_that_no_caption_has_early_enough_is_refused_before_a_model_is_loaded(
    late: str,
    tiny: Callable[..., Settings],
    tmp_path: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset = captioned(tmp_path / "late.zip", photos, [late, late])
    monkeypatch.setattr(Family, "load_transformer", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(run, "encode_images", lambda *_: pytest.fail("images were encoded"))
    with pytest.raises(
        DatasetError, match="no caption mentions <zwx> within the text encoder's limit"
    ):
        run.train(tiny(dataset=dataset))


def test_a_placeholder_that_one_caption_has_early_enough_is_trained(
    tiny: Callable[..., Settings], tmp_path: Path, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = captioned(tmp_path / "late.zip", photos, ["word " * 600 + "TOK", "a photo of TOK"])
    meta = read_archive(run.train(tiny(dataset=dataset, steps=4))).meta
    assert "<zwx> is beyond the limit of 512 tokens" in caplog.text
    assert meta["zero_prior"]["steps_with_placeholder"] == 2  # of the other caption alone
    assert meta["zero_prior"]["norm_end"] > meta["zero_prior"]["norm_start"]


# ---- When checkpoints are written ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "steps", "due"),
    [(None, 20, [*range(2, 21, 2)]), (None, 25, [*range(3, 26, 3)]), (0, 9, []), (4, 9, [4, 8])],
)
def test_checkpoints_are_due_ten_times_in_a_run_or_as_asked(
    every: int | None, steps: int, due: list[int], tmp_path: Path
) -> None:
    saver = Saver(tmp_path)
    assert [done for done in range(1, steps + 1) if saver._due(done, steps, every)] == due


def test_without_a_number_a_checkpoint_is_due_after_ten_minutes(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    assert not saver._due(1, 1000, None)
    saver._time -= SECONDS
    assert saver._due(1, 1000, None)
    assert not saver._due(1, 1000, 0)


def test_a_signal_after_the_loop_leaves_the_state(
    tiny: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's own Ctrl-C, while the result is written."""
    settings = tiny()

    def interrupted(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        signal.sigtimedwait([], 1)

    monkeypatch.setattr(evaluation, "write_archive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.train(settings)
    newest = latest(folder_of(settings) / "checkpoints")
    assert newest is not None and read_checkpoint(newest).step == STEPS
