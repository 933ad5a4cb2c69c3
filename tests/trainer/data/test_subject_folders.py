"""Several subjects in one dataset: TOK is the token of the image's folder."""

import logging
from pathlib import Path

import pytest
from dataset_files import make_folder, make_zip, picture

from trainer.data.dataset import DatasetError, read_dataset
from trainer.settings.subjects import read_subjects

TWO = read_subjects(["<zwx>", "<kul>"])
DEFAULT = "a photo of TOK"


def captions(path: Path, subjects=TWO, default=DEFAULT, **options) -> dict[str, str]:
    found = read_dataset(path, default, subjects=subjects, **options)
    return {each.name: each.caption for each in found}


def refusal(path: Path, subjects=TWO, **options) -> str:
    with pytest.raises(DatasetError) as caught:
        captions(path, subjects, **options)
    return str(caught.value)


def test_captions_that_name_the_tokens_need_no_folders(tmp_path: Path) -> None:
    files = {"a.png": picture(), "a.txt": b"<zwx> at sea", "b.png": picture(), "b.txt": b"a <kul>"}
    files |= {"c.png": picture(), "c.txt": b"<zwx> beside <kul>"}
    assert captions(make_zip(tmp_path / "data.zip", files)) == {
        "a.png": "<zwx> at sea",
        "b.png": "a <kul>",
        "c.png": "<zwx> beside <kul>",
    }


@pytest.mark.parametrize("above", ["", "my pictures/"])
def test_tok_is_the_token_of_the_folder(above: str, tmp_path: Path) -> None:
    """Of that name, or of the name that is given, at any depth."""
    files = {f"{above}zwx/a.png": picture(), f"{above}zwx/more/b.png": picture()}
    files |= {f"{above}zwx/a.txt": b"TOK and <kul>"}
    files |= {f"{above}robots/c.png": picture(), f"{above}robots/c.txt": b"[TOK], blue"}
    files |= {f"{above}d.png": picture(), f"{above}d.txt": b"<kul> and <zwx>"}
    path = make_zip(tmp_path / "data.zip", files)
    wanted = {
        "zwx/a.png": "<zwx> and <kul>",
        "zwx/more/b.png": "a photo of <zwx>",
        "robots/c.png": "<kul>, blue",
        "d.png": "<kul> and <zwx>",
    }
    subjects = read_subjects(["<zwx>", "<kul>=robots"])
    assert captions(path, subjects) == {f"{above}{name}": text for name, text in wanted.items()}


def test_a_folder_may_have_the_tokens_brackets(tmp_path: Path) -> None:
    files = {"<zwx>/a.png": picture(), "<kul>/a.png": picture()}
    assert captions(make_folder(tmp_path / "data", files)) == {
        "<zwx>/a.png": "a photo of <zwx>",
        "<kul>/a.png": "a photo of <kul>",
    }


def test_a_subjects_folder_may_have_a_name_that_is_otherwise_skipped(tmp_path: Path) -> None:
    files = {"mask/a.png": picture(), "pose/a.png": picture(), "pose/masks/a.png": picture()}
    path = make_zip(tmp_path / "data.zip", files)
    subjects = read_subjects(["<mask>", "<kul>=pose"])
    assert captions(path, subjects) == {
        "mask/a.png": "a photo of <mask>",
        "pose/a.png": "a photo of <kul>",
    }


def test_tok_outside_the_folders_is_refused_with_what_to_write(tmp_path: Path) -> None:
    files = {"zwx/a.png": picture(), "kul/a.png": picture(), "c.png": picture()}
    files |= {"both/d.png": picture(), "both/d.txt": b"TOK and <kul>"}
    said = refusal(make_zip(tmp_path / "data.zip", files))
    assert "TOK may be any of 2 subjects in 2 captions: both/d.txt, c.png (default_caption)" in said
    assert "write <zwx> and <kul> instead, or put the images of one subject into a folder" in said
    assert "(zwx/, kul/)" in said and "no caption contains" not in said


def test_tok_is_the_only_subject_everywhere(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "data.zip", {"robots/a.png": picture(), "b.png": picture()})
    for given in ("<zwx>", "<zwx>=robots"):
        assert set(captions(path, read_subjects([given])).values()) == {"a photo of <zwx>"}


def test_a_subject_without_images_is_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "data.zip", {"zwx/a.png": picture(), "fish/b.png": picture(),
                                            "fish/b.txt": b"a fish"})  # fmt: skip
    assert "no caption contains <kul>; write it into the captions of its images" in refusal(path)
    named = read_subjects(["<zwx>", "<kul>=fishes"])
    said = refusal(path, named)
    assert "the folder fishes of <kul> contains no image; folders with images: fish, zwx" in said
    assert refusal(make_zip(tmp_path / "flat.zip", {"a.png": picture()}), named).count("\n") > 0


def test_a_subject_whose_only_image_is_skipped_is_refused(tmp_path: Path) -> None:
    files = {"zwx/a.png": picture(), "kul/b.png": picture()[:60]}
    path = make_zip(tmp_path / "data.zip", files)
    assert "no caption contains <kul>" in refusal(path, skip_bad_images=True)


def test_an_image_in_two_subjects_folders_is_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "d.zip", {"zwx/kul/a.png": picture(), "kul/b.png": picture()})
    assert "zwx/kul/a.png: is in the folders of <zwx> and <kul>" in refusal(path)


def test_a_caption_without_any_token_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {"zwx/a.png": picture(), "kul/b.png": picture(), "kul/b.txt": b"a fish"}
    files |= {"kul/c.png": picture()}
    with caplog.at_level(logging.WARNING):
        captions(make_zip(tmp_path / "data.zip", files))
    assert "1 of 3 captions do not mention the subject: kul/b.png" in caplog.text
