"""Every base trains and draws, and what is wrong is said before anything expensive starts."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from adapters.archive import read_archive
from adapters.placeholder_token import PlaceholderError
from families.registry import BASES
from inference.engine import Engine
from inference.request import Request
from trainer.data.dataset import DatasetError
from trainer.run import train
from trainer.settings.fields import Settings

PUBLISHED = ["z-image-turbo", "z-image", "z-image-de-turbo", "qwen-image", "qwen-image-2512"]


@pytest.mark.parametrize("mode", ["zero_prior", "baseline"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_base_trains_and_predicts_without_a_network(
    name: str, mode: str, small: Callable[..., Settings]
) -> None:
    plain = {"train_placeholder_token": False, "trigger_word": "r3dfox"}
    settings = small(base_model=name, **(plain if mode == "baseline" else {}))
    archive = read_archive(train(settings))

    meta = archive.meta
    assert (meta["base_model"], meta["training_mode"]) == (BASES[name].hub_id, mode)
    assert (meta["rank"], meta["steps"]) == (2, 3)
    assert meta["train_placeholder_token"] is (mode == "zero_prior")
    assert (archive.placeholder is not None) is (mode == "zero_prior")
    if archive.placeholder is not None:
        known = 151665 if "qwen" in name else 151669
        assert meta["placeholder_token"] == archive.placeholder.token == "<zwx>"
        assert meta["placeholder_token_id"] == known
        assert meta["placeholder_init_std"] == 1e-5
        assert meta["zero_prior"]["norm_start"] == pytest.approx(1e-5 * 64**0.5, rel=0.5)
        assert meta["zero_prior"]["largest_gradient_norm"] > 0
    assert all(up.abs().sum() > 0 for _, up in archive.factors.values())

    engine, asked = Engine(), Request(prompt="a photo of <zwx>", width=64, height=64, seed=1)
    asked = asked.replace(num_inference_steps=2)
    with_weights = engine.generate(asked, archive)[0]
    without = engine.generate(asked, None, name)[0]
    assert with_weights.size == (64, 64)
    assert with_weights.tobytes() != without.tobytes()


def test_a_base_given_by_its_folder_draws_its_samples_from_there(
    small: Callable[..., Settings], vault: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MODEL_VAULT")
    path = train(
        small(
            base_model=str(vault / "Tongyi-MAI/Z-Image"),
            sample_prompts=("<zwx>",),
            sample_options={"width": 64, "height": 64, "num_inference_steps": 2},
        )
    )
    assert (path.parent / "samples" / "step-000003" / "00.png").is_file()


# What is refused, and when.


def test_everything_wrong_is_said_before_a_model_is_loaded(
    small: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.zip"
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    with zipfile.ZipFile(broken, "w") as archive:
        archive.writestr("good.png", buffer.getvalue())
        archive.writestr("half.png", buffer.getvalue()[:60])
        archive.writestr("empty.jpg", b"")
    settings = small(dataset=broken)

    def no_model(*_: Any) -> None:
        raise AssertionError("a model was asked for")

    monkeypatch.setattr("trainer.reading.load_family", no_model)
    with pytest.raises(DatasetError) as caught:
        train(settings)
    assert "half.png" in str(caught.value) and "empty.jpg" in str(caught.value)


def test_a_word_the_tokenizer_knows_is_refused_before_the_pictures_are_encoded(
    small: Callable[..., Settings],
) -> None:
    settings = small(placeholder_token="cat")
    with pytest.raises(PlaceholderError, match="already knows"):
        train(settings)
    assert settings.output_dir is not None
    assert not list(settings.output_dir.glob("**/*.zip"))
