"""Whatever happens to a training, nothing that was written is lost, and it says what happened.

Processes are really killed and writes really fail. One thing is pretended: a GPU that is full.
"""

import os
import resource
import shutil
import signal
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import make_loop

from adapters.archive import Archive, read_archive
from adapters.files.atomic import FULL
from families.out_of_memory import is_out_of_memory
from inference.fetch.disk_cache import DiskCache
from inference.fetch.sources import Sources
from lab.benchmarks.kill import KINDS, kill, learned
from lab.benchmarks.small_disk import NotAllowed, fill, small_disk
from train import train as face
from trainer import run
from trainer.learning import saving
from trainer.learning.checkpoint import read_checkpoint, write_checkpoint
from trainer.learning.loop import Diverged, Loop
from trainer.learning.saving import checkpoint_bytes, state_of, weights_bytes
from trainer.memory.fitting import TooLarge
from trainer.result import evaluation
from trainer.settings.fields import Settings


@pytest.fixture
def tiny(
    small: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Settings]:
    """Settings of a short training on the embedded miniature, with nothing measured."""
    monkeypatch.delenv("MODEL_VAULT")
    nothing = {"validation_every": 0, "checkpoint_every": 0}
    return partial(small, base_model="miniature", batch_size=1, **nothing)


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


def raising(error: BaseException) -> Callable[..., Any]:
    """A function that does nothing but fail."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def folder_of(settings: Settings) -> Path:
    assert settings.output_dir is not None
    return settings.output_dir


def checkpoints(settings: Settings) -> list[int]:
    """The steps of all checkpoints, each of which is whole."""
    files = sorted((folder_of(settings) / "checkpoints").glob("*.safetensors"))
    return [read_checkpoint(file).step for file in files]


# ---- Killed --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_disturbed_at_random_moments_a_run_ends_as_if_nothing_had_happened(
    tmp_path: Path,
) -> None:
    """The short form of `python -m lab.benchmarks.kill`: a moment of each kind in each phase."""
    outcomes = kill(moments=5, seed=3, folder=tmp_path)
    assert {each.blow.kind for each in outcomes} == {*KINDS}
    assert [each for each in outcomes if each.faults] == []
    assert sum(each.struck for each in outcomes) > 20


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


class Again(BaseException):
    """A second cancellation."""


def test_a_second_signal_does_not_interrupt_the_saving(
    tiny: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM, Ctrl-C and a cancellation by another thread, each while the state is written."""
    write, again = saving.write_checkpoint, iter([Again(), None])

    def disturbed(*arguments: Any, **options: Any) -> Path:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        if (error := next(again)) is not None:
            raise error
        return write(*arguments, **options)

    monkeypatch.setattr(saving, "write_checkpoint", disturbed)
    settings = tiny(steps=5)
    after_step(monkeypatch, 2, lambda _: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run.train(settings)
    assert checkpoints(settings) == [2]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
def test_a_signal_in_the_middle_of_an_optimizer_step_waits_for_its_end(
    tiny: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    def signalled(loop: Loop) -> None:
        lora = loop.optimizers["lora"]
        lora.register_step_post_hook(lambda *_: os.kill(os.getpid(), signal.SIGTERM))

    settings = tiny(steps=5)
    after_step(monkeypatch, 1, signalled)
    with pytest.raises(SystemExit):
        run.train(settings)
    assert checkpoints(settings) == [2]


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
        "step-000002.zip",  # weights of earlier steps are kept
        "step-000004.safetensors",
        "step-000004.zip",
        "step-000005.safetensors",
        "step-000005.zip",
        "step-000006-good.safetensors",
        "step-000006.safetensors",  # a link, and so a person's
    ]
    assert behind.read_bytes() == before[behind]


# ---- A full disk ---------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder that is a disk of its own, of 16 MB."""
    try:
        with small_disk(tmp_path / "out", 16 << 20):
            yield tmp_path / "out"
    except NotAllowed as error:
        pytest.skip(f"no disk can be mounted here ({error})")


def test_a_disk_that_fills_up_in_the_middle_of_a_run_costs_nothing_that_was_trained(
    tiny: Callable[..., Settings],
    disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Not one byte is left, and still each checkpoint and the weights are written."""
    wishes = {"steps": 5, "checkpoint_every": 1, "sample_prompts": ("<zwx>",), "sample_every": 2}
    options = {"sample_options": {"width": 32, "height": 32, "num_inference_steps": 1}}
    settings = tiny(**wishes, **options)
    wanted = learned(read_archive(run.train(settings.replace(output_dir=tmp_path / "whole"))))
    seen: list[list[str]] = []

    def full_from_here(loop: Loop) -> None:
        fill(disk)
        seen.append(sorted(each.name for each in (disk / "checkpoints").glob("step-*.safetensors")))

    after_step(monkeypatch, 2, full_from_here, times=4)
    weights = run.train(settings)
    got = learned(read_archive(weights))
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert seen[1:] == [[f"step-00000{step}.safetensors"] for step in (2, 3, 4)]
    assert checkpoints(settings) == [5]
    assert "no preview at step 4" in caplog.text
    assert "only one checkpoint is kept" in caplog.text
    assert list(disk.rglob("*.part")) == []


def test_a_run_that_is_stopped_on_a_full_disk_keeps_its_last_step(
    tiny: Callable[..., Settings], disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no earlier checkpoint whose room could be used."""

    def stop(_: Loop) -> None:
        fill(disk)
        os.kill(os.getpid(), signal.SIGTERM)

    settings = tiny(steps=5)
    after_step(monkeypatch, 3, stop)
    with pytest.raises(SystemExit):
        run.train(settings)
    assert checkpoints(settings) == [3]


@pytest.mark.slow
def test_without_an_earlier_checkpoint_the_last_room_is_kept_for_the_end(
    tiny: Callable[..., Settings],
    disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = tiny(steps=4, checkpoint_every=1)
    after_step(monkeypatch, 1, lambda _: fill(disk), times=4)
    weights = run.train(settings)
    assert "no checkpoint at step 1" in caplog.text
    assert read_archive(weights).meta["steps"] == 4
    assert checkpoints(settings) == [4]


def test_a_disk_without_room_for_the_results_is_refused_before_the_first_step(
    tiny: Callable[..., Settings], disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny(steps=2)
    fill(disk, left=200_000)
    monkeypatch.setattr(Loop, "step", lambda *_: pytest.fail("a step was done"))
    with pytest.raises(OSError, match=r"a checkpoint and the weights take [\d,]+ bytes") as error:
        run.train(settings)
    assert error.value.errno in FULL


def test_the_reserved_room_is_enough_and_not_much_more(tiny: Callable[..., Settings]) -> None:
    for optimizer in ("adamw", "adafactor", "prodigy"):
        settings = tiny(steps=3, optimizer=optimizer, ema_decay=0.5, rank=16)
        loop = make_loop(settings)
        for step in range(3):
            loop.step(step)
        written = write_checkpoint(state_of(loop), folder_of(settings)).stat().st_size
        assert written <= checkpoint_bytes(loop) <= 1.5 * written + 300_000
    weights = run.train(settings).stat().st_size
    assert weights <= weights_bytes(loop) <= 1.5 * weights + 100_000


@pytest.mark.slow
def test_weights_that_find_no_room_are_an_error_and_the_last_step_stays(
    tiny: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And an earlier weights.zip. What was reserved is of no use where files may not grow."""
    settings = tiny(rank=64, steps=3)
    before = run.train(settings.replace(steps=1)).read_bytes()
    settings = settings.replace(resume_from=folder_of(settings) / "checkpoints")
    write = evaluation.write_archive

    def full_disk(archive: Archive, path: Path) -> Path:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            return write(archive, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(evaluation, "write_archive", full_disk)
    with pytest.raises(OSError, match="no space to write it") as error:
        run.train(settings)
    assert error.value.errno in FULL
    assert Path(error.value.filename).name == "weights-unchecked.zip"
    assert checkpoints(settings)[-1] == 3
    assert (folder_of(settings) / "weights.zip").read_bytes() == before
    assert list(folder_of(settings).rglob("*.part")) == []


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), ValueError("anything")], ids=str
)
def test_a_cancellation_is_not_hidden_by_a_checkpoint_that_cannot_be_written(
    error: Exception,
    tiny: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def cancel(_: Loop) -> None:
        monkeypatch.setattr(saving, "write_checkpoint", raising(error))
        raise KeyboardInterrupt

    after_step(monkeypatch, 2, cancel)
    with pytest.raises(KeyboardInterrupt):
        run.train(tiny())
    assert "no checkpoint of that step could be written" in caplog.text


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


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("HIP out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"
        ),
    ],
    ids=lambda error: str(error)[:30],
)
def test_out_of_memory_is_known_whoever_says_it(error: RuntimeError) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
        ValueError("out of memory"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_other_errors_are_not_taken_for_out_of_memory(error: BaseException) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.slow
def test_out_of_memory_the_failed_step_is_forgotten_before_the_state_is_saved(
    tiny: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensors fill the device. And an old checkpoint of a longer run is not taken for ours."""
    settings = tiny(steps=4)
    write, held, steps = saving.write_checkpoint, [], []

    def fail(_: Loop) -> None:
        activations = torch.zeros(1000)
        held.append(weakref.ref(activations))
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")

    def forgotten(state: Any, folder: Path, **options: Any) -> Path:
        assert held[0]() is None
        steps.append(state.step)
        written = write(state, folder, **options)
        shutil.copy(written, folder / "step-000900.safetensors")
        return written

    monkeypatch.setattr(saving, "write_checkpoint", forgotten)
    after_step(monkeypatch, 2, fail)
    assert run.train(settings).is_file()
    assert steps == [2, 4]


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
    archive = read_archive(run.train(settings.replace(output_dir=tmp_path / "again")))
    assert "out of memory with the unquantized base: CUDA out of memory" in caplog.text
    assert "retrying in the next mode" in caplog.text
    assert "after 2 steps" in caplog.text
    assert archive.meta["settings"]["gradient_checkpointing"] is True
    got = learned(archive)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_out_of_memory_twice_is_an_error_that_says_what_to_do(
    tiny: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny(steps=4)
    after_step(monkeypatch, 2, full, times=2)
    said = "unquantized base; unquantized base, gradient checkpointing. Lower resolution"
    with pytest.raises(TooLarge, match=said):
        run.train(settings)
    assert checkpoints(settings) == [2, 3]


def test_out_of_memory_in_the_leanest_mode_is_not_tried_again(
    tiny: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a user has asked for one mode, no other is taken."""
    wishes = {"quantize": "none", "gradient_checkpointing": True, "low_memory": False}
    after_step(monkeypatch, 1, full)
    with pytest.raises(TooLarge, match="tried with: unquantized base, gradient checkpointing"):
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
