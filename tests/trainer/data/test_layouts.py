"""Captions in the layouts of other programs, their order, and what is said about each."""

import json
import logging
from pathlib import Path

import pytest
from dataset_files import make_zip, picture, problems_of

from trainer.data.auxiliary_images import auxiliary, masks_of
from trainer.data.dataset import Example, examine, read_dataset

JPEG, PNG = picture(8, 8, format="JPEG"), picture(8, 8)
ONE, TWO = "TOK on a table, scene 1", "TOK on a table, scene 2"
TWO_IMAGES = {"01.jpg": JPEG, "02.jpg": JPEG}


def read(tmp_path: Path, files: dict[str, bytes | str]) -> dict[str, Example]:
    content = {k: v.encode() if isinstance(v, str) else v for k, v in files.items()}
    archive = make_zip(tmp_path / "set.zip", content)
    return {each.name: each for each in read_dataset(archive, "a photo of TOK", "TOK")}


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


def rows(*lines: dict[str, object]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


AL_LIST = {"meta": {"trigger": "TOK"}, "tags": ["TOK", "outdoors", "evening"]}
AL_GROUPS = {"count": "1", "appearance": [], "tags": ["standing"], "environment": ["desk", "lamp"]}
COCO = {"images": [{"id": 1}], "annotations": [{"caption": "x"}]}
LAYOUTS: dict[str, dict[str, str]] = {
    "NAME.txt": {"01.txt": ONE, "02.TXT": TWO},
    "NAME.caption": {"01.caption": ONE, "02.Caption": TWO},
    "other suffixes": {"01.wd": ONE, "02.tags": TWO},
    "NAME.jpg.txt": {"01.jpg.txt": ONE, "02.jpg.caption": TWO},
    "NAME.json": {"01.json": json.dumps({"caption": ONE, "width": 9}), "02.json": f'["{TWO}"]'},
    "metadata.jsonl": {
        "metadata.jsonl": rows(
            {"file_name": "01.jpg", "text": ONE}, {"file_name": "02.jpg", "text": TWO}
        )
    },
    "paths of another machine": {
        "train.jsonl": rows(
            {"image_path": "/home/me/set/01.jpg", "caption": ONE, "tags": "no"},
            {"image_path": "C:\\set\\02.jpg", "caption": TWO},
        )
    },
    "metadata.csv": {
        "metadata.csv": f'file_name,prompt,seed\r\n01.jpg,"{ONE}",7\r\n02.jpg,"{TWO}",8\r\n'
    },
    "a column of any name": {
        "metadata.csv": f'\ufefffile_name,words\n01.jpg,"{ONE}"\n02,"{TWO}"\n'
    },
    "a table with tabs": {"a.tsv": f"File_Name\tText\n01.jpg\t{ONE}\n./02.jpg\t{TWO}\n"},
    "a spreadsheet's table": {
        "metadata.csv": f'sep=;\r\n"file_name";"text, in words"\r\n01.jpg;"{ONE}"\r\n02.jpg;{TWO}'
    },
    "a table with tabs, as .csv": {"a.csv": f"file_name\ttext\n01.jpg\t{ONE}\n02.jpg\t{TWO}\n"},
    "captions.json": {"captions.json": json.dumps({"01.jpg": [ONE], "02.jpg": TWO})},
    "dataset.json": {
        "dataset.json": json.dumps(
            {"/data/01.jpg": {"caption": ONE, "caption_short": "x"}, "02.jpg": {"caption": TWO}}
        )
    },
    "a list of rows": {
        "captions.json": json.dumps(
            [{"file_name": "01.jpg", "caption": ONE}, {"file_name": "02.jpg", "text": TWO}]
        )
    },
    "[trigger]": {
        "01.txt": ONE.replace("TOK", "[trigger]"),
        "02.txt": TWO.replace("TOK", "[trigger]"),
    },
    "default.txt": {"01.txt": ONE, "default.txt": TWO},
    "several lines": {"01.txt": "TOK on a table,\r\n\r\n scene 1 \n", "02.txt": TWO},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_captions_are_read_from_every_layout(
    tmp_path: Path, log: pytest.LogCaptureFixture, layout: str
) -> None:
    found = read(tmp_path, TWO_IMAGES | LAYOUTS[layout])
    assert [each.caption for each in found.values()] == [ONE, TWO]
    assert "2 images: 2 with a caption file" in log.text
    assert [each for each in log.records if each.levelno > logging.INFO] == []


def test_tags_in_groups_are_joined_in_their_order(tmp_path: Path) -> None:
    grouped = {"meta": {"trigger": "TOK"}, "tags": AL_GROUPS | {"nl": "A quiet room."}}
    flat = {"trigger": "TOK", "environment": "desk", "quality": ["good"], "nl": "At night."}
    files = TWO_IMAGES | {"03.jpg": JPEG, "01.json": json.dumps(AL_LIST)}
    files |= {"02.json": json.dumps(grouped), "03.json": json.dumps(flat)}
    assert [each.caption for each in read(tmp_path, files).values()] == [
        "TOK, outdoors, evening",
        "TOK, 1, standing, desk, lamp. A quiet room.",
        "TOK, good, desk. At night.",
    ]


ORDER = {
    "01.txt": "TOK by txt",
    "01.jpg.txt": "TOK by jpg.txt",
    "01.caption": "TOK by caption",
    "01.json": '{"caption": "TOK by json"}',
    "metadata.jsonl": rows({"file_name": "01.jpg", "text": "TOK by jsonl"}),
    "metadata.csv": "file_name,text\n01.jpg,TOK by csv\n",
    "captions.json": '{"01.jpg": "TOK by captions"}',
    "default.txt": "TOK by default",
}


def test_of_several_sources_the_first_is_used_and_all_are_named(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    prefix = "5_TOK by folder/"
    left = {f"{prefix}{name}": text for name, text in ORDER.items()}
    while left:
        log.clear()
        (example,) = read(tmp_path, {f"{prefix}01.jpg": JPEG} | left).values()
        first = next(iter(left))
        assert example.caption == f"TOK by {first.removeprefix(prefix).split('.', 1)[1]}" or (
            example.caption.split()[-1] in ("captions", "default", "jsonl", "csv")
        )
        assert example.caption_file == first
        own = [name for name in left if not name.endswith("default.txt")]
        differ = f"captions of the same image differ, and the first is used: {' and '.join(own)}"
        assert (differ in log.text) == (len(own) > 1)
        del left[first]
    (example,) = read(tmp_path, {f"{prefix}01.jpg": JPEG}).values()
    assert (example.caption, example.caption_file) == ("TOK by folder", prefix)


def test_sources_that_agree_and_empty_ones_are_no_conflict(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    files = {"01.jpg": JPEG, "01.txt": " \n", "01.caption": f"{ONE}\n", "01.json": f'"{ONE}"'}
    assert read(tmp_path, files)["01.jpg"].caption == ONE
    assert "differ" not in log.text and "empty caption files" in log.text


def test_folders_of_kohyas_scripts_have_repeats_and_a_caption(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    files = {"img/10_TOK robot/01.jpg": JPEG, "img/10_TOK robot/01.txt": ONE}
    files |= {"img/10_TOK robot/02.jpg": JPEG, "img/3_TOK robot at night/03.jpg": JPEG}
    files |= {"img/1024px_2_robot/04.jpg": JPEG, "01_front/05.jpg": JPEG}
    files |= {"reg/1_robot/06.jpg": JPEG}
    found = [(each.caption, each.repeats) for each in read(tmp_path, files).values()]
    assert found == [
        ("a photo of TOK", 1),
        ("a photo of TOK", 2),  # without the subject, a name is no caption
        (ONE, 10),
        ("TOK robot", 10),
        ("TOK robot at night", 3),
    ]
    assert "names of folders are not used as captions" in log.text
    assert "do not contain TOK: img/1024px_2_robot" in log.text
    assert "2 with the name of their folder, 2 use 'a photo of TOK'" in log.text
    assert "repeats by the names of folders: 01_front 1, img/1024px_2_robot 2" in log.text
    assert "reg/ is ignored (1 image): by its name it contains regularization images" in log.text


def test_gaps_between_a_table_and_the_images_are_named(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    table = rows({"file_name": "01.jpg", "text": ONE}, {"file_name": "09.jpg", "text": "TOK"})
    found = read(tmp_path, TWO_IMAGES | {"metadata.jsonl": table})
    assert found["02.jpg"].caption == "a photo of TOK"
    assert "metadata.jsonl has rows that match no image, or several: 09.jpg" in log.text
    assert "metadata.jsonl has no row for 02.jpg" in log.text


def test_of_several_captions_of_one_image_the_first_is_used_and_said(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    captions = json.dumps({"01.jpg": [ONE, "TOK from above"], "02.jpg": TWO})
    assert read(tmp_path, TWO_IMAGES | {"captions.json": captions})["01.jpg"].caption == ONE
    assert "1 image has several captions, which take turns: 01.jpg" in log.text


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("01.json", "{", "because it is not valid JSON"),
        ("01.json", '{"width": 8, "meta": {"trigger": "TOK"}}', "it has no caption, text, prompt"),
        ("01.json", json.dumps({"caption": "TOK " * 20_000}), "it is longer than 65,536 bytes"),
        ("captions.json", "[" * 100_000, "because it is not valid JSON"),
        ("captions.json", json.dumps(COCO), "it has no row with the name of an image"),
        ("captions.json", '{"09.jpg": "TOK"}', "it names no image of this dataset"),
        ("captions.json", "{}", "it has no row with the name of an image and a caption"),
        ("metadata.jsonl", "TOK\n", "because it is not valid JSON"),
        ("metadata.csv", "a,b\n01.jpg,TOK\n", "it has no column file_name"),
        ("metadata.csv", "file_name,seed,size\n01.jpg,1,2\n", "it has no column text, caption"),
        ("metadata.csv", 'file_name,text\n"' + "x" * 200_000, "it is not a valid table"),
        ("a.parquet", "PAR1", "write each caption into NAME.txt"),
        ("img_01.booru", "x", None),  # nothing says that these are captions
    ],
)
def test_captions_that_are_not_read_are_named_with_the_reason(
    tmp_path: Path, log: pytest.LogCaptureFixture, name: str, content: str, reason: str | None
) -> None:
    found = read(tmp_path, TWO_IMAGES | {name: content})
    assert {each.caption for each in found.values()} == {"a photo of TOK"}
    lines = [
        each.message for each in log.records if "look like captions and are not" in each.message
    ]
    if reason is None:
        assert lines == []
    else:
        (line,) = lines
        assert reason in line and name in line


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("01.caption", "TOK 红色的汽车在湖边".encode("gbk"), "is not UTF-8 (it looks like GBK)"),
        ("01.json", '{"caption": "TOK 赤い車"}'.encode("shift-jis"), "is not UTF-8"),
        ("metadata.csv", "file_name,text\n01.jpg,TOK красный\n".encode("cp1251"), "is not UTF-8"),
        ("metadata.jsonl", b'{"file_name": "01.jpg", "text": "TOK"}\n{"file_na', "line 2: it is"),
        ("01.tags", b"TOK " * 20_000, "is longer than 65,536 bytes"),
        ("01.txt", picture(format="JPEG"), "is not text, it begins like a JPEG image; rename it"),
        ("more.jsonl", picture(format="JPEG"), "is not text, it begins like a JPEG image"),
        ("more.csv", picture(format="BMP"), "is not text, it begins like a BMP image"),
        ("01.txt", "BMW 汽车在湖边".encode("gbk"), "is not UTF-8 (it looks like"),
    ],
)
def test_captions_that_would_be_read_wrong_are_an_error(
    tmp_path: Path, name: str, content: bytes, complaint: str
) -> None:
    (problem,) = problems_of(make_zip(tmp_path / "a.zip", TWO_IMAGES | {name: content}))
    assert problem.startswith(f"a.zip: {name}: ") and complaint in problem
    warnings = examine(TWO_IMAGES | {name: content}, "a photo").warnings
    assert not [each for each in warnings if each.check == "empty-captions"]


def test_a_table_in_windows_1252_is_read_and_said(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    table = "file_name,text\n01.jpg,TOK – the “café”\n02.jpg,TOK\n".encode("cp1252")
    assert read(tmp_path, TWO_IMAGES | {"a.csv": table})["01.jpg"].caption == "TOK – the “café”"
    assert "not UTF-8, read as Windows-1252" in log.text and "a.csv ('TOK – the" in log.text


# ---- Masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("masks", "folder"),
    [
        (["01-masklabel.png", "02-masklabel.png"], ""),
        (["01.mask.png", "02_mask.png"], ""),
        (["01.mask", "02.mask"], ""),
        (["masks/01.png", "masks/02_mask.png"], ""),
        (["masks/01.png", "masks/02.jpg.png"], "images/"),
        (["set/masks/a/01.png", "set/masks/a/02.png"], "set/a/"),
        (["fox_masks/01.png", "fox_masks/02.png"], "fox/"),
        (["IMGS/01_Mask.png", "imgs/02_mask.png"], "imgs/"),
        (["Masks/01.JPG.png", "masks/IMGS/02.png"], "imgs/"),
    ],
)
def test_masks_belong_to_their_images(masks: list[str], folder: str) -> None:
    images = [f"{folder}0{number}.jpg" for number in (1, 2, 3)]
    captions = [f"{folder}0{number}.txt" for number in (1, 2, 3)]
    groups = auxiliary([*images, *captions, *masks], [*images, *masks], images)
    assert masks_of(groups, images) == dict(zip(images, masks, strict=False))


def test_leftovers_of_other_programs_are_not_trained_on(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    files = {"_controls/01.jpg": JPEG, "@eaDir/01.jpg/SYNOPHOTO_THUMB_M.jpg": JPEG, ".a.json": "{}"}
    files |= {"01_0008x0008_sd.npz": "x", "01.MOV": "x", "01.AAE": "x"}
    assert [*read(tmp_path, TWO_IMAGES | files)] == ["01.jpg", "02.jpg"]
    assert "_controls/ is ignored" in log.text and "@eaDir/ is ignored" in log.text
    assert "2 files of Live Photos are ignored" in log.text and ".npz" not in log.text
