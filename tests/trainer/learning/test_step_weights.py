"""The weights of earlier steps of a run: each is there to generate with."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from loops import make_loop

from adapters.archive import Archive, BrokenArchive, read_archive, read_loose
from trainer.learning.loop import Loop
from trainer.learning.saving import Saver
from trainer.learning.step_weights import spread
from trainer.run_files import remove_run
from trainer.settings.fields import Settings

Small = Callable[..., Settings]


def train(loop: Loop, folder: Path) -> None:
    loop.run(None, Saver(folder, folder / "weights.zip", step_weights=True))


def assert_ships(archive: Archive, loop: Loop) -> None:
    """Whether the archive has the weights that the loop would save now, in their own types."""
    factors, (placeholder,) = loop.final_weights()
    assert archive.factors.keys() == factors.keys()
    for name, (down, up) in factors.items():
        assert archive.factors[name][0].equal(down.bfloat16().float())
        assert archive.factors[name][1].equal(up.bfloat16().float())
    assert archive.placeholder is not None
    assert archive.placeholder.token == placeholder.token
    assert archive.placeholder.vectors.equal(placeholder.vectors)


def test_a_checkpoint_is_read_as_the_weights_of_its_step(small: Small, tmp_path: Path) -> None:
    loop = make_loop(small(checkpoint_every=2, steps=4, ema_decay=0.5))
    train(loop, tmp_path)
    for name in ("step-000004.safetensors", "step-000004.zip"):
        archive = read_archive(tmp_path / name)
        assert_ships(archive, loop)
        assert archive.base_model == "Tongyi-MAI/Z-Image"
        assert archive.meta["steps"] == 4
    assert read_archive(tmp_path / "step-000002.safetensors").meta["steps"] == 2
    loose = read_loose(tmp_path / "step-000004.safetensors", "<zwx>")
    assert loose.placeholder is not None
    with pytest.raises(BrokenArchive, match="contains the placeholder '<zwx>', not '<abc>'"):
        read_loose(tmp_path / "step-000004.safetensors", "<abc>")


def test_a_checkpoint_without_weights_next_to_it_is_refused_in_one_line(
    small: Small, tmp_path: Path
) -> None:
    train(make_loop(small(steps=1)), tmp_path)
    alone = shutil.move(tmp_path / "step-000001.safetensors", tmp_path / "mine.safetensors")
    with pytest.raises(BrokenArchive, match="^mine.safetensors is a training checkpoint, which"):
        read_archive(alone)
    renamed = shutil.move(alone, tmp_path / "mine.zip")
    with pytest.raises(BrokenArchive, match="^mine.zip is a training checkpoint"):
        read_archive(renamed)


def test_weights_of_the_whole_run_are_kept_and_those_of_a_given_up_part_are_not(
    small: Small, tmp_path: Path
) -> None:
    mine = tmp_path / "step-final.zip"
    mine.write_bytes(b"mine")
    later = tmp_path / "step-000900.zip"
    later.write_bytes(b"of a part that the resumed run has given up")
    train(make_loop(small(steps=30, checkpoint_every=1)), tmp_path)
    steps = [int(each.stem[5:]) for each in sorted(tmp_path.glob("step-0*.zip"))]
    assert len(steps) == 12  # ten, and those next to the two checkpoints
    assert steps[0] == 1 and steps[-2:] == [29, 30]
    assert max(b - a for a, b in zip(steps, steps[1:], strict=False)) <= 6
    assert mine.read_bytes() == b"mine" and not later.exists()


def test_weights_that_cannot_be_written_cost_nothing_but_a_warning(
    small: Small, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "step-000001.zip").mkdir()
    train(make_loop(small(steps=1)), tmp_path)
    assert "no weights of step 1" in caplog.text
    assert (tmp_path / "step-000001.safetensors").is_file()


def test_what_is_left_out_leaves_the_rest_evenly_spread() -> None:
    kept: list[int] = []
    for step in range(1, 101):
        kept = spread([*kept, step], 10)
    gaps = [b - a for a, b in zip(kept, kept[1:], strict=False)]
    assert len(kept) == 10 and kept[0] == 1 and kept[-1] == 100
    assert max(gaps) <= 20
    assert spread([5, 3], 10) == [3, 5]


def test_they_are_removed_with_their_run_and_nothing_else_is(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for name in ("step-000001.zip", "step-1.zip", "my.zip"):
        (folder / name).write_bytes(b"")
    remove_run(tmp_path / "run")
    assert sorted(each.name for each in folder.iterdir()) == ["my.zip", "step-1.zip"]
