"""Trainings in their folders, at once or in a row: each has its result, or was refused."""

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from foreign_files import Foreign

from adapters.archive import read_archive
from trainer import run
from trainer.data.dataset import DatasetError
from trainer.learning.loop import Loop
from trainer.lock import FolderRefused
from trainer.outputs import open_run
from trainer.settings.fields import Settings, SettingsError, resolve
from trainer.settings.inputs import TrainingInputs


@pytest.fixture
def tiny(
    small: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Settings]:
    """Settings of a short training on the embedded miniature, in an empty working folder."""
    monkeypatch.delenv("MODEL_VAULT")
    monkeypatch.chdir(tmp_path)
    return partial(small, base_model="miniature", validation_every=0, batch_size=1)


def after_step(monkeypatch: pytest.MonkeyPatch, number: int, happens: Callable[[], None]) -> None:
    """Has something happen once, in the first training that has done so many steps."""
    step, left = Loop.step, iter([happens])

    def changed(self: Loop, index: int) -> None:
        step(self, index)
        if self.done == number:
            next(left, lambda: None)()

    monkeypatch.setattr(Loop, "step", changed)


def test_a_second_training_in_the_folder_is_refused_before_its_dataset_is_read(
    tiny: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = Foreign(tmp_path / "out", tmp_path / "photos")
    settings, refused = tiny(steps=4, checkpoint_every=1), []

    def again() -> None:
        with monkeypatch.context() as patch:
            patch.setattr("trainer.run.read_examples", lambda *_: pytest.fail("it was read"))
            for resume_from in (None, tmp_path / "out" / "checkpoints"):
                with pytest.raises(FolderRefused, match="out is in use .*process") as error:
                    run.train(tiny(resume_from=resume_from))
                refused.append(error)

    after_step(monkeypatch, 3, again)
    weights = run.train(settings)
    assert len(refused) == 2
    assert read_archive(weights).meta["steps"] == 4
    kept = {each.name for each in (tmp_path / "out" / "checkpoints").iterdir()}
    assert {"step-000003.safetensors", "step-000004.safetensors"} <= kept
    assert not {"step-000001.safetensors", "step-000002.safetensors"} & kept
    foreign.assert_untouched()


def test_two_trainings_at_once_without_output_dir_both_have_their_result(
    tiny: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = Foreign(tmp_path / "outputs", tmp_path / "photos")
    common: dict[str, Any] = {
        "output_dir": None,
        "checkpoint_every": 1,
    }
    results: list[tuple[Path, bytes]] = []

    def other() -> None:
        weights = run.train(tiny(steps=1, **common))
        results.append((weights, weights.read_bytes()))
        assert (tmp_path / "outputs" / "latest").samefile(weights.parent)

    after_step(monkeypatch, 1, other)
    first = run.train(tiny(steps=2, **common))
    [(second, written)] = results
    assert first.parent != second.parent
    assert second.read_bytes() == written
    for weights, steps in ((first, 2), (second, 1)):
        assert read_archive(weights).meta["steps"] == steps
        assert (weights.parent / "report.html").is_file()
        assert len(list((weights.parent / "checkpoints").glob("*.safetensors"))) == steps
    assert (tmp_path / "outputs" / "latest").samefile(first.parent)
    foreign.assert_untouched()


@pytest.mark.parametrize("fails_at", ["dataset", pytest.param("step", marks=pytest.mark.slow)])
def test_a_training_that_fails_leaves_the_folders_as_they_were(
    fails_at: str, tiny: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = Foreign(tmp_path / "out", tmp_path / "photos")
    before = sorted(tmp_path.rglob("*"))

    def fail(*_: Any) -> None:
        raise RuntimeError("the power is out")

    places = {"dataset": "read_examples", "step": "Loop.run"}
    monkeypatch.setattr(f"trainer.run.{places[fails_at]}", fail)
    for output_dir in (tmp_path / "out", None, tmp_path / "new"):
        with pytest.raises(RuntimeError, match="the power is out"):
            run.train(tiny(output_dir=output_dir))
    assert sorted(tmp_path.rglob("*")) == before
    foreign.assert_untouched()


@pytest.mark.slow
def test_previews_behind_a_link_are_added_and_nothing_there_is_removed(
    tiny: Callable[..., Settings], tmp_path: Path
) -> None:
    """`samples` as a link to another disk, on which somebody has photos."""
    photos = tmp_path / "photos"
    foreign = Foreign(tmp_path / "out", photos)
    shutil.rmtree(tmp_path / "out" / "samples")
    (tmp_path / "out" / "samples").symlink_to(photos)
    asked = {"sample_prompts": ("<zwx>",), "sample_options": {"num_inference_steps": 1}}
    with pytest.raises(FolderRefused, match="contains samples/step-000001 of another run"):
        run.train(tiny(steps=1, **asked))
    (photos / "step-000001").rename(photos / "step-by-step")
    run.train(tiny(steps=1, **asked))
    assert (photos / "step-000001" / "00.png").read_bytes().startswith(b"\x89PNG")
    (photos / "step-by-step" / "00.png").rename(photos / "step-000001" / "00.png")
    (tmp_path / "out" / "samples").unlink()
    for file in [file for file in foreign.files if "samples" in file.parts]:
        foreign.files.remove(file)
    foreign.assert_untouched()


# ---- run.json ------------------------------------------------------------------------------------


def test_run_json_says_what_was_given_what_was_used_and_on_which_data(
    tiny: Callable[..., Settings], photos: Path, tmp_path: Path
) -> None:
    inputs = {
        "dataset": photos,
        "base_model": "miniature",
        "rank": 2,
        "steps": 1,
        "seed": 7,
        "preserve": "off",
    }
    inputs |= {"resolution": "64", "validation_every": 0, "output_dir": tmp_path / "out"}
    weights = run.train_from_inputs(
        TrainingInputs(**inputs), wandb_api_key="wk-s3cret", hf_token="hf_s3cret"
    )
    facts = json.loads((weights.parent / "run.json").read_text())
    assert (facts["program"], facts["served"]) == ("zeroprior", False)
    assert facts["settings"]["given"]["rank"] == 2
    assert "batch_size" not in facts["settings"]["given"]
    assert facts["settings"]["used"]["batch_size"] == 8
    assert facts["settings"]["used"]["base"] == "miniature"
    assert facts["dataset"]["path"] == str(photos)
    assert facts["dataset"]["sha256"] == hashlib.sha256(photos.read_bytes()).hexdigest()
    assert len(facts["dataset"]["images"]) == 6
    assert facts["versions"].keys() >= {"torch", "python"}
    for file in filter(Path.is_file, weights.parent.rglob("*")):
        assert b"s3cret" not in file.read_bytes(), file
    meta = read_archive(weights).meta
    assert str(photos.parent) not in json.dumps(meta)  # weights.zip is for others
    assert "given" not in meta["settings"]


@pytest.mark.parametrize("change", ["removed", "replaced"])
def test_the_datasets_hash_is_of_the_file_that_was_read(
    change: str,
    tiny: Callable[..., Settings],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset = Path(shutil.copy(photos, tmp_path / "mine.zip"))

    def happens() -> None:
        dataset.unlink()
        if change == "replaced":
            dataset.write_bytes(b"another")

    after_step(monkeypatch, 1, happens)
    weights = run.train(tiny(dataset=dataset, steps=1))
    wanted = hashlib.sha256(photos.read_bytes()).hexdigest()
    assert read_archive(weights).meta["dataset"]["sha256"] == wanted
    assert json.loads((weights.parent / "run.json").read_text())["dataset"]["sha256"] == wanted


def test_a_dataset_that_changes_while_it_is_read_is_refused(
    tiny: Callable[..., Settings], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Path(shutil.copy(photos, tmp_path / "mine.zip"))
    read = run.read_examples

    def changed(*given: Any) -> Any:
        examples = read(*given)
        with dataset.open("ab") as file:
            file.write(b"more")
        return examples

    monkeypatch.setattr(run, "read_examples", changed)
    with pytest.raises(DatasetError, match=r"mine\.zip: was changed while it was read"):
        run.train(tiny(dataset=dataset))
    assert not (tmp_path / "out").exists()


# ---- The setting ---------------------------------------------------------------------------------


def test_a_name_becomes_part_of_the_folders_name(
    tiny: Callable[..., Settings], tmp_path: Path
) -> None:
    weights = run.train(tiny(steps=1, output_dir=None, name="red-fox"))
    assert weights.parent.parent == Path("outputs")
    assert weights.parent.name.endswith("-red-fox-01")
    assert "red-fox" not in json.dumps(read_archive(weights).meta["settings"])


@pytest.mark.parametrize("name", ["../up", "/tmp/x", "a/b", ".git", "", " a", "x" * 65, "a\x00"])
def test_a_name_that_could_lead_elsewhere_is_refused_at_once(name: str) -> None:
    with pytest.raises(SettingsError, match="name .*; use a plain name such as red-fox"):
        resolve(TrainingInputs(dataset="imgs.zip", base_model="miniature", name=name))


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderRefused, match="output_dir: .*file/run cannot be created .*choose"):
        open_run(tmp_path / "images", output_dir=tmp_path / "file" / "run")
