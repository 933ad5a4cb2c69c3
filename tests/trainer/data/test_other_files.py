"""What else is in a dataset than images and captions is left out, named, and never trained on."""

import logging
from pathlib import Path

import pytest
from dataset_files import make_folder, make_zip, picture, problems_of

from trainer.data.dataset import read_dataset

PNG, JPEG = picture(8, 8), picture(8, 8, format="JPEG")
THREE = {f"0{number}.png": PNG for number in (1, 2, 3)}


def names(tmp_path: Path, files: dict[str, bytes]) -> list[str]:
    examples = read_dataset(make_zip(tmp_path / "set.zip", files), "a photo of TOK", "<zwx>")
    return [example.name for example in examples]


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


# ---- Masks, control images, regularization images, samples, thumbnails ---------------------------

FOLDERS = {
    "masks": "masks",
    "Mask": "masks",
    "set/masks": "masks",
    "control": "control images",
    "_controls": "control images",
    "control_img": "control images",
    "control_1": "control images",
    "conditioning": "control images",
    "reg/1_robot": "regularization images",
    "regularisation": "regularization images",
    "samples": "sample images",
    "sample/step-0100": "sample images",
    "@eaDir/01.png": "thumbnails",
    "thumbs": "thumbnails",
    "reg_person": "regularization images",
    "woman-reg": "regularization images",
    "class": "regularization images",
    "woman_class_images": "regularization images",
    "prior data": "regularization images",
}
FOLDERS_THAT_REPEAT_NAMES = {
    "fox_masks": "masks",
    "Masks png": "masks",
    "masks_01": "masks",
    "segmentation masks": "masks",
    "alpha": "masks",
    "controlnet_images": "control images",
    "depth_map": "control images",
    "canny-images": "control images",
    "pose": "control images",
    "hints": "control images",
    "cond": "control images",
    "thumbnails_256": "thumbnails",
}


@pytest.mark.parametrize(("folder", "kind"), FOLDERS.items())
@pytest.mark.parametrize("other_names", [False, True])
def test_folders_of_other_images_are_left_out_and_said(
    tmp_path: Path, said: pytest.LogCaptureFixture, folder: str, kind: str, other_names: bool
) -> None:
    beside = {f"{folder}/{'x' * other_names}0{number}.png": PNG for number in (1, 2, 3)}
    assert names(tmp_path, THREE | beside) == list(THREE)
    (line,) = [each.message for each in said.records if "ignored" in each.message]
    assert f"by its name it contains {kind}" in line and "rename the folder" in line
    assert "(3 images)" in line


@pytest.mark.parametrize(("folder", "kind"), FOLDERS_THAT_REPEAT_NAMES.items())
@pytest.mark.parametrize("mark", ["", "_mask"])
def test_a_folder_that_repeats_names_is_known_by_a_part_of_its_own(
    tmp_path: Path, said: pytest.LogCaptureFixture, folder: str, kind: str, mark: str
) -> None:
    beside = {f"{folder}/0{number}{mark}.png": PNG for number in (1, 2, 3)}
    assert names(tmp_path, THREE | beside) == list(THREE)
    assert f"{folder}/ is ignored (3 images): by its name it contains {kind}" in said.text
    others = {f"{folder}/x{number}.png": PNG for number in (1, 2, 3)}
    assert len(names(tmp_path, THREE | others)) == 6


FILES = {
    "01 (mask).png": "masks",
    "01[mask].png": "masks",
    "01_face_mask.png": "masks",
    "01-mask-inverted.png": "masks",
    "01_alpha.png": "masks",
    "01_trimap.png": "masks",
    "01_depth_map.png": "control images",
    "01_pose.png": "control images",
    "01_hed.png": "control images",
    "01_condition.png": "control images",
    "01.preview.png": "thumbnails",
    "01_mask.png": "masks",
    "01-mask.png": "masks",
    "01.mask.png": "masks",
    "01.png.mask.png": "masks",
    "01-masklabel.png": "masks",
    "01-masklabel": "masks",
    "01.mask": "masks",
    "mask_01.png": "masks",
    "01_control.jpg": "control images",
    "01_conditioning.png": "control images",
    "01_depth.png": "control images",
    "01_thumb.jpg": "thumbnails",
}


@pytest.mark.parametrize(("file", "kind"), FILES.items())
def test_files_that_name_another_image_are_left_out_and_said(
    tmp_path: Path, said: pytest.LogCaptureFixture, file: str, kind: str
) -> None:
    assert names(tmp_path, THREE | {file: PNG, "01.txt": b"TOK"}) == list(THREE)
    (line,) = [each.message for each in said.records if "ignored" in each.message]
    assert line.startswith(f"set.zip: {file}: ignored (1 image): by their names these are {kind}")


@pytest.mark.parametrize(
    "files",
    [
        ["samples/01.png", "samples/02.png"],  # the only folder
        ["masks/01.png", "masks/deep/02.png"],  # a subject that is a mask
        ["mask/10_mask/01.png"],
        ["venetian_mask.png", "tribal_mask.png"],  # no image beside that they name
        ["old masks/01.png", "wooden_mask/01.png"],
        ["control tower/01.png", "01.png"],
        ["depth/a.png", "b.png"],  # a scene with depth: no name is repeated
        ["01.png", "01_masked.png", "01_unmasked.png", "1_mask.png"],
        ["regular/01.png", "01.png"],
        ["sampler/01.png", "01.png"],
        ["01.png", "01_happy.png", "01_normal.png", "01_no_mask_on.png"],
        ["classic/01.png", "priority/01.png", "regal fox/01.png", "01.png"],
        ["10_fox mask seller/01.png", "01.png"],
    ],
)
def test_images_that_may_be_the_subject_are_trained_on(tmp_path: Path, files: list[str]) -> None:
    assert names(tmp_path, dict.fromkeys(files, PNG)) == sorted(files)


def test_a_folder_with_captions_of_its_own_is_trained_on_and_said(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    """Regularization images apart, which have captions of their class."""
    files = THREE | {"masks/venice.png": PNG, "masks/venice.txt": b"TOK in Venice"}
    files |= {"reg/dog.png": PNG, "reg/dog.txt": b"a dog"}
    files |= {"03_mask.png": PNG, "03_mask.txt": b"TOK in Rome"}
    assert names(tmp_path, files) == ["01.png", "02.png", "03.png", "03_mask.png"] + [
        "masks/venice.png"
    ]
    assert "masks/ looks like masks, but its 1 image have captions and" in said.text
    assert "reg/ is ignored (1 image)" in said.text
    assert "dog.txt" not in said.text  # nor is its caption called one without an image
    # With names that are repeated they are masks, whatever lies beside.
    files = THREE | {f"masks/{each}": PNG for each in THREE} | {"masks/01.txt": b"TOK"}
    assert names(tmp_path, files) == list(THREE)


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        (
            {"masks/01.png": PNG, "01.jxl": b"x"},
            ["masks/ is ignored (1 image)", "supported: 01.jxl"],
        ),
        ({"masks/01.png": PNG, "samples/01.png": PNG}, ["masks/ is", "samples/ is ignored"]),
        ({"01.mask.png": PNG, "01.psd": b"x"}, ["01.mask.png: ignored", "supported: 01.psd"]),
    ],
)
def test_a_dataset_that_has_nothing_else_says_what_happened(
    tmp_path: Path, files: dict[str, bytes], parts: list[str]
) -> None:
    problems = problems_of(make_zip(tmp_path / "set.zip", files))
    assert problems[0].startswith("set.zip: contains no training image; all images look")
    assert all(any(part in line for line in problems) for part in parts)


def test_what_is_left_out_is_not_checked_either(tmp_path: Path) -> None:
    assert names(tmp_path, THREE | {"masks/01.png": PNG[:30], "@eaDir/01.png": b""}) == list(THREE)


# ---- Captions that are not read ------------------------------------------------------------------


@pytest.mark.parametrize(
    "file",
    [
        *("train.parquet", "captions", "01.description", "01.yaml", "prompts.md"),
    ],
)
def test_files_that_look_like_captions_are_named(
    tmp_path: Path, said: pytest.LogCaptureFixture, file: str
) -> None:
    assert names(tmp_path, THREE | {file: b"TOK on a table"}) == list(THREE)
    assert f"these look like captions and are not read: {file}; write each" in said.text
    assert "3 images: 0 with a caption file, 3 use 'a photo of TOK'" in said.text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gbk"])
def test_captions_under_an_unknown_suffix_are_known_by_their_text(
    tmp_path: Path, said: pytest.LogCaptureFixture, encoding: str
) -> None:
    text = "TOK, a red car beside a lake, 红色的汽车, 在湖边, and many other things".encode(
        encoding
    )
    names(tmp_path, THREE | {"01.booru": text, "02.cache": bytes(range(64))})
    assert "these look like captions and are not read: 01.booru; write each" in said.text


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("set/default.txt", "captions without an image of the same name, not read: set/default"),
        ("04.png.txt", "captions without an image of the same name, not read: 04.png.txt"),
        ("captions.txt", "captions without an image of the same name, not read: captions.txt"),
    ],
)
def test_captions_under_other_names_are_named(
    tmp_path: Path, said: pytest.LogCaptureFixture, file: str, line: str
) -> None:
    assert names(tmp_path, THREE | {file: b"TOK on a table"}) == list(THREE)
    assert line in said.text


def test_a_caption_whose_case_differs_is_named_with_the_right_name(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    names(tmp_path, {"IMG_1.jpg": JPEG, "img_1.txt": b"TOK"})
    assert "rename img_1.txt to IMG_1.txt" in said.text


def test_other_files_of_trainers_and_cameras_need_no_word(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    caches = {"01_0008x0008_sd.npz": b"PK\3\4", "02.safetensors": b"x", ".aitk_size.json": b"{}"}
    photo = {
        "03.MOV": b"\0\0\0\x14ftypqt",
        "03.AAE": b"<?xml",
        "README.md": b"mine",
        "LICENSE": b"",
    }
    assert names(tmp_path, THREE | caches | photo) == list(THREE)
    assert {record.levelno for record in said.records} == {logging.INFO}


# ---- Images that are not read --------------------------------------------------------------------


def test_images_of_other_formats_are_named_with_the_reason(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    files = THREE | {
        "04.jxl": b"\xff\x0a",
        "05.psd": b"8BPS",
        "06": b"\xff\x0a",
        "07.ico": b"x",
        "IMG_4.DNG": b"II*\0",
        "clip.mp4": b"x",
        "more.zip": b"PK",
    }
    assert names(tmp_path, files) == [*THREE]
    for line in (
        "ignored, because JPEG XL is not supported: 04.jxl; export them as JPEG or PNG",
        "ignored, because files of image editors are not supported: 05.psd; export them as PNG",
        "ignored, because their format is not supported: 06 (a JPEG XL image); export them as",
        "ignored, because their format is not supported: 07.ico; export them as JPEG or PNG",
        "ignored, because raw files of cameras are not supported: IMG_4.DNG; export them as JPEG",
        "ignored, because videos are not supported: clip.mp4",
        "ignored, because archives in a dataset are not opened: more.zip",
    ):
        assert line in said.text


# ---- The count -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_own_and_default_captions_are_counted(
    tmp_path: Path, said: pytest.LogCaptureFixture, kind: str
) -> None:
    files = THREE | {"01.txt": b"TOK here", "02.txt": b" \r\n"}
    make = make_zip if kind == "zip" else make_folder
    path = make(tmp_path / "set", files)
    examples = read_dataset(path, "a photo of TOK", "<zwx>")
    assert [example.caption_file for example in examples] == ["01.txt", "", ""]
    assert (
        "set: 3 images: 1 with a caption file, 2 use 'a photo of TOK': 02.png, 03.png" in said.text
    )
    assert "empty caption files, 'a photo of TOK' is used instead: 02.txt" in said.text


def test_syntax_of_other_programs_in_captions_is_said(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    files = THREE | {"01.txt": b"TOK, (red:1.3) <lora:x:1>", "02.txt": b"TOK at (12:30 pm)"}
    names(tmp_path, files)
    assert "read as plain text: 01.txt (<lora:x:1>)" in said.text
    assert "02.txt" not in said.text
