"""Images before and after an edit are found in the layouts of all programs, or named as lacking."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_files import encoded, make_folder, make_zip, picture
from PIL import Image

from trainer.__main__ import main
from trainer.data import dataset as dataset_module
from trainer.data import members_of_any, opener, read_dataset
from trainer.data.checks import check_dataset
from trainer.data.dataset import DatasetError
from trainer.data.example import Example
from trainer.settings import SettingsError, TrainingInputs, resolve

EDITING = (1, 3)  # control images that the base model needs, and takes
DO = "make it red"
A, B, C = (picture(color=(k, 0, 0)) for k in (50, 100, 150))


def read(path: Path, **options: Any) -> dict[str, Example]:
    found = read_dataset(path, options.pop("default", DO), controls=EDITING, **options)
    return {each.name: each for each in found}


def pairs_in(path: Path, **options: Any) -> dict[str, list[str]]:
    return {name: [c.name for c in each.controls] for name, each in read(path, **options).items()}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (  # ai-toolkit, musubi-tuner, Civitai: folders of the same names
            {"target/x/a.png": A, "target/y/a.jpg": B, "control/x/a.png": C, "control/y/a.png": C},
            {"target/x/a.png": ["control/x/a.png"], "target/y/a.jpg": ["control/y/a.png"]},
        ),
        (
            {"a.png": A, "control_10/a.png": B, "control_2/a.webp": C},
            {"a.png": ["control_2/a.webp", "control_10/a.png"]},
        ),
        (  # musubi-tuner: several of one image in a folder
            {"i/a_1.png": A, "i/b.png": A, "control/a_1.png": B, "control/b_0001.png": B}
            | {"control/b_0000.png": C},
            {
                "i/a_1.png": ["control/a_1.png"],
                "i/b.png": ["control/b_0000.png", "control/b_0001.png"],
            },
        ),
        (
            {"a.png": A, "a_control.png": B, "b.png": A, "b_control_2.png": B}
            | {"b_control_1.png": C},
            {"a.png": ["a_control.png"], "b.png": ["b_control_1.png", "b_control_2.png"]},
        ),
        (  # fal.ai
            {"a_start.png": A, "a_start2.png": B, "a_end.jpg": C, "a.txt": b"turn it"},
            {"a_end.jpg": ["a_start.png", "a_start2.png"]},
        ),
        (  # DiffSynth-Studio
            {"after/a.png": A, "before/a.png": B, "before/b.png": C}
            | {
                "metadata.csv": b"image,edit_image,prompt\n"
                b'after/a.png,"[""before/b.png"", ""before/a.png""]",turn it\n'
            },
            {"after/a.png": ["before/b.png", "before/a.png"]},
        ),
        (  # musubi-tuner; the result of one edit is what the next begins with
            {"a.png": A, "b.png": B, "c.png": C}
            | {
                "list.jsonl": b'{"image_path": "b.png", "control_path": "a.png"}\n'
                b'{"image_path": "c.png", "control_path_1": "a.png", "control_path_0": "b.png"}'
            },
            {"b.png": ["a.png"], "c.png": ["b.png", "a.png"]},
        ),
    ],
)
def test_the_layouts_of_other_programs(
    files: dict[str, bytes], expected: dict[str, list[str]], tmp_path: Path
) -> None:
    found = read(make_zip(tmp_path / "set.zip", files))
    assert {name: [c.name for c in each.controls] for name, each in found.items()} == expected
    for each in found.values():
        assert each.caption == ("turn it" if b"turn it" in b"".join(files.values()) else DO)
        assert [bytes(c.data) for c in each.controls] == [files[c.name] for c in each.controls]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a.png": A, "b.png": B}, "none of the 2 images has a control image.*a folder control"),
        ({"a.png": A, "b.png": B, "control/b.png": C}, "no control image: a.png; put it into"),
        ({"a.png": A, "control/a.png": B, "control/c.png": C}, "without a training.*: control/c"),
        (
            {"a.png": A} | {f"control_{k}/a.png": B for k in range(1, 5)},
            r"a.png: has 4 control images \(control_1/a.png, .*takes at most 3",
        ),
        (
            {"a.png": A, "b.csv": b"image,control_path,prompt\na.png,/x/gone.png,turn it"},
            r"not in the dataset, .*: /x/gone.png \(b.csv, for a.png\); correct these rows",
        ),
        ({"a.png": A, "b.csv": b"image,edit_image\na.png,a.png"}, r"image itself: a.png \(b.csv"),
        (
            {"a.png": A, "b.csv": b"image,edit_image\na.png,https://x.example/y.png?token=hf_abc"},
            r"itself: https://x.example/y.png \(b.csv, for a.png\); correct these rows, or [^\n]*$",
        ),
        (  # the caption of an end without a start is read, and a start without an end is named
            {"a_start.png": A, "a_end.png": B, "b_start.png": C, "c_end.png": C, "c.txt": b"x"},
            "without a training image: b_start.png\n.*no control image: c_end.png; [^\n]*$",
        ),
        # Control images are untrusted input, too.
        ({"a.png": A, "control/a.png": picture(90, 90)[:150]}, "control/a.png: is truncated"),
        ({"a.png": A, "control/a.png": picture(90, 9)}, "control/a.png: is 90x9 pixels"),
        ({"a.png": A, "control/a.png": b"GIF89a"}, "control/a.png: cannot be opened"),
    ],
)
def test_what_does_not_match_is_named(
    files: dict[str, bytes], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(DatasetError, match=said):
        read(make_zip(tmp_path / "set.zip", files))
    assert "is ignored" not in caplog.text


def test_a_broken_pair_is_skipped_as_a_whole_and_limits_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    files = {"a.png": A, "b.png": B, "control/a.png": C[:60], "control/b.png": C}
    path = make_zip(tmp_path / "set.zip", files)
    assert list(read(path, skip_bad_images=True)) == ["b.png"]
    assert "1 of 2 images are skipped:\ncontrol/a.png" in caplog.text
    with pytest.raises(DatasetError, match="no instruction for the edit: a.png, b.png; write it"):
        read(path, default="a photo of TOK")
    monkeypatch.setattr(dataset_module, "MAX_TOTAL_PIXELS", 3 * 32 * 24)
    with pytest.raises(DatasetError, match="pixels up to control/b.png"):
        read(make_zip(tmp_path / "two.zip", files | {"control/a.png": C}))


def test_a_list_and_folders_in_other_places(tmp_path: Path) -> None:
    names = ("1.png", "2.png")
    for folder in ("after", "before", "more"):
        make_folder(tmp_path / folder, dict.fromkeys(names, picture(color=(len(folder), 0, 0))))
    row = {"image_path": "after/1.png", "control_path_0": "before/1.png", "caption": "turn it"}
    row["control_path_1"] = str(tmp_path / "more/2.png")
    table = tmp_path / "list.jsonl"
    table.write_text(json.dumps(row))
    [found] = read(table, opened=members_of_any).values()
    assert found.caption == "turn it"
    assert [c.name for c in found.controls] == ["before/1.png", "more/2.png"]

    def in_folders(dataset: Path, folders: Sequence[str]) -> dict[str, list[str]]:
        return pairs_in(dataset, opened=opener([tmp_path / each for each in folders]))

    expected = {name: [f"control_1/{name}", f"control_2/{name}"] for name in names}
    assert in_folders(tmp_path / "after", ("more", "before")) == expected
    # A folder in the dataset is not read twice, and has its own name.
    (tmp_path / "after").rename(tmp_path / "set")
    (tmp_path / "before").rename(tmp_path / "set/before")
    assert in_folders(tmp_path / "set", ("set/before",)) == {k: [f"control_1/{k}"] for k in names}
    with pytest.raises(DatasetError, match="controls, gone: does not exist"):
        in_folders(tmp_path / "set", ("gone",))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"base_model": "z-image", "controls": "x"}, "z-image does not edit images"),
        ({"controls": "a,b,c,d"}, "names 4 folders; qwen-image-edit-2511 takes at most 3"),
        ({"controls": "imgs"}, "controls is the dataset itself"),
        ({"preserve_prompts": ["add a hat", "make TOK red"]}, "give instructions for other edits"),
        ({"autocaption": "style"}, "the caption of a pair is the instruction for the edit"),
    ],
)
def test_settings_that_do_not_fit_are_refused(given: dict[str, Any], said: str) -> None:
    inputs = {"dataset": "imgs", "base_model": "qwen-image-edit-2511"} | given
    with pytest.raises(SettingsError, match=said):
        resolve(TrainingInputs(**inputs))


def test_defaults_of_pairs() -> None:
    plain = resolve(TrainingInputs(dataset="imgs", base_model="qwen-image-edit-2511"))
    assert (plain.preserve, plain.caption_dropout) == (1, 0)
    given = {"base_model": "qwen-image-edit-2509", "caption_dropout": 0.1, "preserve": "off"}
    changed = resolve(TrainingInputs(dataset="imgs", **given))
    assert (changed.preserve, changed.caption_dropout) == (0, 0.1)
    no_token = {"train_placeholder_token": False, "base_model": "qwen-image-edit-2509"}
    assert resolve(TrainingInputs(dataset="imgs", **no_token)).preserve == 1


def test_a_model_that_does_not_edit_says_that_control_images_are_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {"a.png": A, "b.png": B, "control/a.png": C}
    table = b"image,edit_image,prompt\na.png,b.png,turn it"
    path = make_zip(tmp_path / "set.zip", files | {"t.csv": table})
    [found] = read_dataset(path, DO)
    assert found.name == "a.png" and found.caption == "turn it" and not found.controls
    assert "contains control images, which only editing models use" in caplog.text
    assert "ignored, because only editing models use control images: b.png" in caplog.text


def test_check_names_pairs_that_teach_something_else_and_shows_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(1)
    noise = [
        encoded(Image.fromarray(rng.integers(0, 255, (96, width, 3), dtype=np.uint8)))
        for width in (96, 128, 96, 280)
    ]
    names = ("target/a.png", "target/b.png", "control/a.png", "control/b.png")
    files: dict[str, bytes] = dict(zip(names, noise, strict=True))
    files |= {"target/c.png": noise[0], "control/c.png": noise[0]}
    files |= {f"target/{each}.txt": b"turn the sky of it red" for each in "abc"}
    folder, sheet = make_folder(tmp_path / "set", files), tmp_path / "page.html"
    options = ["--base-model", "qwen-image-edit-2511", "--no-train-placeholder-token"]
    with pytest.raises(SystemExit) as ended:
        main(["check", str(folder), *options, "--sheet", str(sheet)])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert "3 images, 3 control images, 3 with a caption file" in said
    assert "the same file, so no edit is learned: target/c.png" in said
    assert "warning: the aspect ratio differs from the control image's" in said
    assert "same caption" not in said  # an instruction may be that of all pairs
    page = sheet.read_text()
    assert all(f"{name}, before</figcaption>" in page for name in files if "control" in name)


def test_check_of_pairs_without_instructions_says_nothing_of_the_default_caption(
    tmp_path: Path,
) -> None:
    folder = make_folder(tmp_path / "set", {"a.png": A, "control/a.png": B})
    given = {"base_model": "qwen-image-edit-2511", "train_placeholder_token": False}

    def problems(**more: Any) -> list[str]:
        found = check_dataset(resolve(TrainingInputs(dataset=folder, **given, **more)))
        return [each.text for each in found.problems]

    [problem] = problems()
    assert problem.startswith("no instruction for the edit: a.png; write it into NAME.txt")
    [problem] = problems(default_caption="make TOK red")
    assert problem.startswith("1 caption contains TOK: default_caption. TOK stands")
