"""A table of image files in any places is a dataset, but never one in a request."""

import json
from pathlib import Path
from typing import Any

import pytest
from dataset_files import make_folder, picture

from trainer.captions.places import place_for
from trainer.data import DatasetError, Example, members_of_any, read_dataset
from trainer.run import train_from_inputs
from trainer.settings import SettingsError, TrainingInputs


def read(table: Path, **options: Any) -> dict[str, Example]:
    found = read_dataset(table, "a photo of TOK", "<zwx>", opened=members_of_any, **options)
    return {each.name: each for each in found}


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two folders with images of the same names; the working folder is another."""
    files = {f"{folder}/1.jpg": picture(format="JPEG") for folder in ("a", "b")}
    make_folder(tmp_path / "photos", files | {"b/2.png": picture(), "b/2.txt": b"TOK beside"})
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "photos"


def test_absolute_and_relative_paths_with_their_captions(photos: Path, tmp_path: Path) -> None:
    rows = [
        {"image_path": str(photos / "a/1.jpg"), "caption": "TOK in a"},
        {"image_path": "photos/b/1.jpg", "caption": "TOK in b"},
        {"image_path": "../photos/b/2.png"},  # from the working folder; its caption is beside it
    ]
    table = tmp_path / "list.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    found = read(table)
    captions = {name: (each.caption, each.caption_file) for name, each in found.items()}
    assert captions == {
        "a/1.jpg": ("<zwx> in a", "list.jsonl"),
        "b/1.jpg": ("<zwx> in b", "list.jsonl"),
        "b/2.png": ("<zwx> beside", "b/2.txt"),
    }

    table = tmp_path / "list.csv"
    table.write_text(f"file_name\n{photos}/b/1.jpg\nphotos/b/1.jpg\n")
    assert [each.caption for each in read(table).values()] == ["a photo of <zwx>"]
    table.write_text("file_name,text\nD:\\old\\3.jpg,TOK moved\n")  # of another machine
    make_folder(tmp_path, {"moved/3.jpg": picture()})
    assert [each.caption for each in read(table).values()] == ["<zwx> moved"]
    # A caption may contain a line separator, which JSON allows in a text.
    table.write_text("file_name,text\nmoved/3.jpg,TOK moved\u2028away\n", encoding="utf-8")
    assert [each.caption for each in read(table).values()] == ["<zwx> moved away"]
    # Its captions go into a new zip: other programs may use the same files.
    assert place_for(table, None).path == tmp_path / "list-captioned.zip"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"image_path": "no.jpg", "caption": "TOK"}', r"no.jpg: is not a file \(no.jpg\)"),
        (f'{{"image_path": "{"x" * 300}.jpg"}}', rf"is not a file \({'x' * 200}\); correct"),
        ('{"image_path": "https://u:p@x.org/1.jpg?k=s"}', r"https://x.org/1.jpg is a URL, which"),
        ('{"caption": "TOK"}', "has no row with the path of an image; write a line for each"),
        ("a.jpg\nb.jpg", "is not a list of images: it is not valid JSON"),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, text: str, complaint: str) -> None:
    table = tmp_path / "list.jsonl"
    table.write_text(text)
    with pytest.raises(DatasetError, match=complaint):
        read(table)


def test_a_request_cannot_name_files_of_the_server(photos: Path, tmp_path: Path) -> None:
    table = tmp_path / "list.jsonl"
    table.write_text(json.dumps({"image_path": str(photos / "a/1.jpg"), "caption": "TOK"}))
    inputs = TrainingInputs(dataset=table, base_model="miniature-turbo", steps=1)
    with pytest.raises(SettingsError, match="dataset is a table of names"):
        train_from_inputs(inputs, served=True)
    with pytest.raises(DatasetError, match="is not a zip or tar file"):
        read_dataset(table, "", None)


def test_masks_beside_the_images_or_in_a_column(photos: Path, tmp_path: Path) -> None:
    white = picture(color=(255, 255, 255))
    beside = ("a/masks/1.png", "a/other_mask.png", "b/1-masklabel.png")
    make_folder(photos, dict.fromkeys((*beside, "b/2.mask.png"), white))
    make_folder(tmp_path, {"elsewhere/cut.png": white})
    row = {"image_path": "photos/b/2.png", "mask_path": "elsewhere/cut.png", "caption": "TOK"}
    table = tmp_path / "list.jsonl"
    rows = [{"image_path": f"photos/{name}/1.jpg"} for name in "ab"]
    table.write_text("\n".join(map(json.dumps, [*rows, row])))
    assert {name: each.mask_file for name, each in read(table, masks="auto").items()} == {
        "a/1.jpg": "a/masks/1.png",
        "b/1.jpg": "b/1-masklabel.png",
        "b/2.png": "b/2.png.mask.png",  # the column precedes b/2.mask.png
    }

    table = tmp_path / "list.csv"
    table.write_text("file_name,mask\nphotos/a/1.jpg,elsewhere/cut.png\n")
    (found,) = read(table, masks="auto").values()
    assert (found.caption, found.mask_file) == ("a photo of <zwx>", "1.jpg.mask.png")
    assert bytes(found.mask) == white
    table.write_text("file_name,mask\nphotos/a/1.jpg,gone.png\n")
    with pytest.raises(DatasetError, match=r"1.jpg.mask.png: is not a file \(gone.png\)"):
        read(table, masks="auto")
    table.write_text("file_name,mask\nphotos/a/1.jpg,photos/b/2.txt\n")
    with pytest.raises(DatasetError, match=r"1.jpg.mask: cannot be opened as an image"):
        read(table, masks="auto")
