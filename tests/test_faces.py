"""train.py and predict.py as plain Python, every other input left out."""

from pathlib import Path

import pytest
import torch

from adapters.archive import Archive, read_archive
from predict import Predictor
from train import train
from trainer.data.dataset import DatasetError
from trainer.settings.fields import SettingsError


@pytest.fixture(autouse=True)
def working_folder(miniature_vault: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with the miniature as the default base."""
    monkeypatch.setenv("MODEL_VAULT", str(miniature_vault))
    monkeypatch.setenv("BASE_MODEL", "miniature-turbo")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tensors(archive: Archive) -> list[torch.Tensor]:
    """Everything that was trained, in a fixed order."""
    assert archive.placeholder is not None
    factors = sorted(archive.factors.items())
    return [archive.placeholder.vectors, *(matrix for _, pair in factors for matrix in pair)]


def test_the_same_seed_gives_the_same_weights_and_pictures(photos: Path) -> None:
    results = []
    for name in ("first.zip", "second.zip"):
        trained = train(dataset=photos, rank=2, steps=2, batch_size=2, seed=5, sample_prompts="")
        results.append(Path(trained.weights).rename(name))
    first, second = map(read_archive, results)
    assert first.factors.keys() == second.factors.keys()
    for one, other in zip(tensors(first), tensors(second), strict=True):
        assert torch.equal(one, other)

    p = Predictor()
    p.setup()
    pictures = [
        p.predict(
            prompt="a photo of <zwx>",
            replicate_weights=weights,
            seed=5,
            num_inference_steps=2,
            output_format="png",
        )
        for weights in results
    ]
    assert pictures[0][0].read_bytes() == pictures[1][0].read_bytes()


def test_without_a_seed_one_is_drawn_and_written_down(photos: Path) -> None:
    seeds = []
    for _ in range(2):
        trained = train(dataset=photos, rank=1, steps=1, sample_prompts="", preserve="off")
        seeds.append(read_archive(trained.weights).meta["settings"]["seed"])
    assert seeds[0] != seeds[1]


def test_training_without_a_dataset_says_what_is_missing() -> None:
    with pytest.raises(SettingsError, match="dataset is missing; give a zip or tar of images"):
        train()


def test_a_dataset_that_is_not_there_is_named() -> None:
    with pytest.raises(DatasetError, match="imgs.zip: does not exist"):
        train(dataset=Path("imgs.zip"))


def test_drawing_without_a_prompt_says_what_is_missing() -> None:
    p = Predictor()
    p.setup()
    with pytest.raises(ValueError, match="prompt is missing; describe the image"):
        p.predict()
