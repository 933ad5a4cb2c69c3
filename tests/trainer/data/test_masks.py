"""Masks are used if every image has one, and a mask that cannot be used is an error."""

import logging
from pathlib import Path

import pytest
from dataset_files import encoded, make_zip, picture, png_claiming
from PIL import Image

from trainer.checking import dataset_of, summary
from trainer.data.checks import check_dataset
from trainer.data.dataset import DatasetError, Example, read_dataset
from trainer.settings.fields import resolve
from trainer.settings.inputs import TrainingInputs

SIZE = 48, 32


def half(width: int = SIZE[0], height: int = SIZE[1]) -> bytes:
    """White on the left, black on the right."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, 0, width // 2, height))
    return encoded(mask)


IMAGES = {name: picture(*SIZE) for name in ("a.png", "b.png")}
ALL = IMAGES | {"a.mask.png": half(), "masks/b.png": half(24, 16)}


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


def read(folder: Path, files: dict[str, bytes], masks: str = "auto") -> dict[str, Example]:
    archive = make_zip(folder / "set.zip", files)
    return {each.name: each for each in read_dataset(archive, "a photo", masks=masks)}


def test_masks_of_all_images_are_used_and_said(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    more = ["a-mask-inverted.png", "a_face_mask.png", "masks/b_bg_mask.png", "masks/none.png"]
    found = read(tmp_path, ALL | dict.fromkeys(more, half()))
    assert {name: each.mask_file for name, each in found.items()} == {
        "a.png": "a.mask.png",
        "b.png": "masks/b.png",
    }
    assert found["b.png"].mask_image().getpixel((3, 3)) == 255
    assert "masks are used: every image has one. What is black has 10% of its" in said.text
    unused = "masks/b_bg_mask.png, masks/none.png, a-mask-inverted.png, a_face_mask.png"
    assert f"say that white is not the subject: {unused}" in said.text
    assert "ignored" not in said.text
    given = TrainingInputs(dataset=tmp_path / "set.zip", base_model="miniature")
    settings = resolve(given)
    assert summary(settings, dataset_of(settings)).startswith("set.zip: 2 images, 2 masks are used")


def test_the_mask_of_a_removed_image_is_not_trained_on(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    files = dict.fromkeys(("a.png", "b gas_mask.png"), picture(*SIZE))
    masks = ("a_mask.png", "b gas_mask_mask.png", "removed_mask.png")
    found = read(tmp_path, files | dict.fromkeys(masks, half()))
    assert {name: each.mask_file for name, each in found.items()} == {
        "a.png": "a_mask.png",
        "b gas_mask.png": "b gas_mask_mask.png",
    }
    assert "removed_mask.png" in said.text


@pytest.mark.parametrize(
    ("files", "masks", "line"),
    [
        (
            IMAGES | {"a.mask.png": half()},
            "auto",
            "masks are not used: 1 of 2 images have a mask, and these have none: b.png",
        ),
        (ALL, "off", "masks are not used: 2 of 2 images have a mask, but masks is off"),
    ],
)
def test_masks_that_are_not_used_are_said(
    tmp_path: Path,
    said: pytest.LogCaptureFixture,
    files: dict[str, bytes],
    masks: str,
    line: str,
) -> None:
    assert not any(each.mask_file for each in read(tmp_path, files, masks).values())
    assert line in said.text


def test_the_style_preset_uses_none_unless_they_are_asked_for() -> None:
    def masks(**given: str) -> str:
        return resolve(TrainingInputs(dataset="a.zip", base_model="miniature", **given)).masks

    assert masks() == masks(preset="character") == masks(preset="style", masks="auto") == "auto"
    assert masks(preset="style") == "off"


@pytest.mark.parametrize(
    ("mask", "problem"),
    [
        (half(32, 48), "is 32x48 pixels, but a.png is 48x32; a mask needs the aspect ratio of its"),
        (picture(*SIZE, color=(20, 20, 20)), "is black, so nothing of a.png would be learned"),
        (half()[:70], "is truncated or damaged"),
        (png_claiming(50_000, 50_000), "has more than 89,478,485 pixels"),
        (encoded(Image.new("F", SIZE), "TIFF"), "has pixels of 32 bits"),
        # White where it is transparent: it is put over black.
        (encoded(Image.new("RGBA", SIZE, (255, 255, 255, 0))), "is black"),
    ],
)
def test_a_mask_that_cannot_be_used_is_an_error(tmp_path: Path, mask: bytes, problem: str) -> None:
    files = IMAGES | {"a.mask.png": mask, "masks/b.png": half()}
    with pytest.raises(DatasetError) as caught:
        read(tmp_path, files)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"set.zip: a.mask.png: {problem}")
    assert len(read(tmp_path, files, "off")) == 2
    checked = check_dataset(
        resolve(TrainingInputs(dataset=tmp_path / "set.zip", base_model="miniature"))
    )
    assert [checked.about(each) for each in checked.problems] == [["a.png"]]


def test_transparency_is_a_mask_if_it_is_asked_for(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    clear = Image.new("RGBA", SIZE, (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 24, 32))
    files = {"a.png": encoded(clear), "b.png": picture(*SIZE), "b.mask.png": half()}
    found = read(tmp_path, files, "alpha")
    assert [found[name].mask_file for name in ("a.png", "b.png")] == ["a.png", ""]
    image, mask = found["a.png"].image(), found["a.png"].mask_image()
    assert [image.getpixel((x, 3)) for x in (3, 40)] == [(0, 0, 255), (255, 255, 255)]
    assert [mask.getpixel((x, 3)) for x in (3, 40)] == [255, 0]
    assert "transparency is the mask of 1 of 2 images" in said.text
    assert "without transparency, so trained on as a whole: b.png" in said.text
    assert not any(each.mask_file for each in read(tmp_path, files, "off").values())

    with pytest.raises(DatasetError, match="masks is alpha, but no image has transparency"):
        read(tmp_path, IMAGES, "alpha")
    empty = encoded(Image.new("RGBA", SIZE))
    with pytest.raises(DatasetError, match="a.png: is transparent everywhere"):
        read(tmp_path, files | {"a.png": empty}, "alpha")
