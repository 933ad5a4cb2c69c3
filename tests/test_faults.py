"""Whatever happens to a training, nothing that was written is lost, and it says what happened.

Processes are really killed and writes really fail. One thing is pretended: a GPU that is full.
"""

import os
import signal
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from adapters.archive import read_archive
from adapters.atomic import FULL
from benchmarks.kill import kill, learned
from inference.disk_cache import DiskCache
from inference.sources import Sources
from train import train as face
from trainer import run
from trainer.checkpoint import read_checkpoint
from trainer.fitting import TooLarge
from trainer.loop import Diverged, Loop
from trainer.settings import Settings


@pytest.fixture
def tiny(
    small: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Settings]:
    """Settings of a short training on the embedded miniature, with nothing measured."""
    monkeypatch.delenv("MODEL_VAULT")
    return partial(small, base_model="miniature", validation_every=0, batch_size=1)


def after_step(
    monkeypatch: pytest.MonkeyPatch, number: int, happens: Callable[[Loop], None], times: int = 1
) -> None:
    """Has something happen after so many steps, and after the next as often as `times` asks."""
    step, left = Loop.step, iter(range(times))

    def changed(self: Loop, index: int) -> None:
        step(self, index)
        if self.done >= number and next(left, None) is not None:
            happens(self)

    monkeypatch.setattr(Loop, "step", changed)


def folder_of(settings: Settings) -> Path:
    assert settings.output_dir is not None
    return settings.output_dir


def checkpoints(settings: Settings) -> list[int]:
    """The steps of all checkpoints, each of which is whole."""
    files = sorted((folder_of(settings) / "checkpoints").iterdir())
    return [read_checkpoint(file).step for file in files]


# ---- Killed --------------------------------------------------------------------------------------


def test_killed_at_random_moments_a_training_ends_as_if_nothing_had_happened(
    tmp_path: Path,
) -> None:
    """The short form of `python -m benchmarks.kill`."""
    found = kill(kills=4, seed=3, folder=tmp_path)
    assert found.kills == {"SIGTERM": 1, "SIGKILL": 1, "fsync": 1, "replace": 1}
    assert found.abandoned > 0
    assert found.left == 0
    assert found.same


def test_a_polite_end_leaves_a_checkpoint_even_where_none_was_asked_for(
    tiny: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM, as a machine sends it before it goes away."""
    settings = tiny(steps=5)
    after_step(monkeypatch, 2, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as end:
        run.train(settings)
    assert end.value.code == 128 + signal.SIGTERM
    assert checkpoints(settings) == [2]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_resumed_run_gives_up_later_checkpoints_in_its_own_folder_alone(
    tiny: Callable[..., Settings], tmp_path: Path
) -> None:
    """What it resumes must be the newest again when it is resumed once more."""
    settings = tiny(steps=6, checkpoint_every=2)
    run.train(settings)
    first = folder_of(settings) / "checkpoints"
    late, behind = first / "step-000006.safetensors", tmp_path / "behind.safetensors"
    late.rename(behind)
    for name in ("step-000007.safetensors", "step-000006-good.safetensors"):
        (first / name).write_bytes(behind.read_bytes())
    late.symlink_to(behind)
    before = {file: file.read_bytes() for file in (*first.iterdir(), behind)}

    early = first / "step-000004.safetensors"
    shorter = {"steps": 5, "checkpoint_every": 1, "resume_from": early}
    run.train(tiny(**shorter, output_dir=tmp_path / "other"))
    assert {file: file.read_bytes() for file in before} == before

    run.train(tiny(**shorter))
    assert sorted(each.name for each in first.iterdir()) == [
        "step-000004.safetensors",
        "step-000005.safetensors",
        "step-000006-good.safetensors",
        "step-000006.safetensors",  # a link, and so a person's
    ]
    assert behind.read_bytes() == before[behind]


# ---- A full disk ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "file", "kept"),
    [(4, "step-000004.safetensors", [1, 2]), (5, "weights-unchecked.zip", [2, 4])],
)
def test_a_full_disk_costs_no_earlier_file(
    step: int,
    file: str,
    kept: list[int],
    tiny: Callable[..., Settings],
    fill_the_disk: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While a checkpoint is written, and while the weights are."""
    settings = tiny(rank=64, steps=5, checkpoint_every=2)
    before = run.train(replace(settings, steps=1, checkpoint_every=1)).read_bytes()
    settings = replace(settings, resume_from=folder_of(settings) / "checkpoints")
    after_step(monkeypatch, step, lambda _: fill_the_disk())
    with pytest.raises(OSError, match="no room to write it") as error:
        run.train(settings)
    assert error.value.errno in FULL
    assert Path(error.value.filename).name == file
    assert checkpoints(settings) == kept
    assert (folder_of(settings) / "weights.zip").read_bytes() == before
    assert list(folder_of(settings).rglob("*.part")) == []


def test_a_cancellation_is_not_hidden_by_a_full_disk(
    tiny: Callable[..., Settings],
    fill_the_disk: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def cancel(_: Loop) -> None:
        fill_the_disk()
        raise KeyboardInterrupt

    after_step(monkeypatch, 2, cancel)
    with pytest.raises(KeyboardInterrupt):
        run.train(tiny(rank=64))
    assert "of which no checkpoint is" in caplog.text


def test_a_full_disk_while_weights_are_fetched_is_said_and_nothing_is_kept(
    tmp_path: Path, fill_the_disk: Callable[[], None]
) -> None:
    sources = Sources(cache=DiskCache(tmp_path / "cache"))
    fill_the_disk()
    with pytest.raises(OSError, match="set XDG_CACHE_HOME") as error:
        sources.file("data:application/zip;base64," + "A" * 400_000)
    assert error.value.errno in FULL
    assert [each for each in (tmp_path / "cache").rglob("*") if each.is_file()] == []


# ---- Memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken_off", [True, False])
def test_nothing_of_a_training_stays_in_memory(
    broken_off: bool, tiny: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even while somebody still looks at the error that ended it."""
    held: list[weakref.ref[torch.nn.Module]] = []

    def fail(_: Loop) -> None:
        raise ValueError

    def hold(loop: Loop) -> None:
        held.extend(map(weakref.ref, (loop.family.transformer, loop.family.text_encoder)))
        if broken_off:
            try:
                fail(loop)
            except ValueError as error:
                raise KeyboardInterrupt from error

    after_step(monkeypatch, 2, hold)
    if broken_off:
        with pytest.raises(KeyboardInterrupt) as error:
            run.train(tiny())
        assert error.traceback
    else:
        run.train(tiny())
    assert [each() for each in held] == [None, None]


# ---- Diverged ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_a_loss_that_explodes_ends_the_training_and_says_where_the_last_good_state_is(
    value: float, tiny: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(loop: Loop) -> None:
        for name, weight in loop.family.transformer.named_parameters():
            if "final_layer" in name and name.endswith("linear.weight"):
                weight.mul_(value)

    settings = tiny(steps=6, checkpoint_every=2)
    after_step(monkeypatch, 3, explode)
    with pytest.raises(Diverged, match="lower learning_rate.*step-000002.safetensors"):
        run.train(settings)
    assert checkpoints(settings) == [2]
    assert not (folder_of(settings) / "weights.zip").exists()


# ---- A full GPU ----------------------------------------------------------------------------------


def full(_: Loop) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_out_of_memory_a_training_goes_on_in_the_next_leaner_mode(
    tiny: Callable[..., Settings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    settings = tiny(steps=4)
    wanted = learned(read_archive(run.train(settings)))
    after_step(monkeypatch, 2, full)
    archive = read_archive(run.train(replace(settings, output_dir=tmp_path / "again")))
    assert "out of memory with the unquantised base: CUDA out of memory" in caplog.text
    assert "trying once more" in caplog.text
    assert "after 2 steps" in caplog.text
    assert archive.meta["settings"]["gradient_checkpointing"] is True
    got = learned(archive)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_out_of_memory_twice_is_an_error_that_says_what_to_do(
    tiny: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny(steps=4)
    after_step(monkeypatch, 2, full, times=2)
    said = "unquantised base; unquantised base, gradient checkpointing. Lower resolution"
    with pytest.raises(TooLarge, match=said):
        run.train(settings)
    assert checkpoints(settings) == [2, 3]


def test_out_of_memory_in_the_leanest_mode_is_not_tried_again(
    tiny: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a user has asked for one mode, no other is taken."""
    wishes = {"quantize": "none", "gradient_checkpointing": True, "low_memory": False}
    after_step(monkeypatch, 1, full)
    with pytest.raises(TooLarge, match="tried with: unquantised base, gradient checkpointing"):
        run.train(tiny(**wishes))


def test_an_earlier_result_outlives_a_training_that_fails(
    tiny: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = tiny().dataset.resolve()
    monkeypatch.chdir(tmp_path)
    short = partial(
        face, dataset=dataset, base_model="miniature", steps=1, rank=2, batch_size=1,
        validation_every=0,
    )  # fmt: skip
    weights = Path(short().weights)
    written = weights.read_bytes()

    def fail(_: Loop) -> None:
        raise RuntimeError("the power is out")

    after_step(monkeypatch, 1, fail)
    with pytest.raises(RuntimeError, match="the power is out"):
        short()
    assert weights.read_bytes() == written
    assert (tmp_path / "outputs" / "latest" / "weights.zip").samefile(weights)
