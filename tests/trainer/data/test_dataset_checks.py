"""The checks of a dataset before a run: each finds its fault, and nothing in a dataset without."""

import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from dataset_files import make_zip
from PIL import Image, ImageFilter, ImageOps
from root import ROOT
from tokenizers import Tokenizer

from trainer.data import DatasetCheck, Finding, check_dataset
from trainer.data.caption_checks import caption_checks, fault_of, least_tokens
from trainer.data.check_sheet import sheet
from trainer.data.checks import log_checks
from trainer.settings import Settings, TrainingInputs, resolve

SIZE = (640, 480)


@cache
def photo(number: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """A photo-like image: colors with the spectrum of photographs, and shapes with sharp edges."""
    random = np.random.default_rng(number)
    width, height = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    noise = np.fft.rfft2(random.normal(size=(3, height, width))) / frequency
    pixels = np.fft.irfft2(noise, (height, width)).transpose(1, 2, 0)
    pixels = random.uniform(60, 190, size=3) + 35 * (pixels - pixels.mean((0, 1))) / pixels.std()
    rows, columns = np.mgrid[:height, :width]
    for _ in range(12):
        center = random.uniform(0, (height, width))
        inside = np.hypot(rows - center[0], columns - center[1]) < random.uniform(20, 90)
        pixels[inside] += random.uniform(-70, 70, size=3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, quality: int = 90) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def scaled(image: Image.Image, factor: float) -> Image.Image:
    return image.resize(
        (round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC
    )


def settings(dataset: Path, **more: object) -> Settings:
    given = {"base_model": "z-image-turbo", "resolution": "512", "dataset": dataset} | more
    return resolve(TrainingInputs.model_validate(given))


def checked(
    tmp_path: Path,
    images: dict[str, Image.Image | bytes],
    captions: dict[str, str] | None = None,
    **more: object,
) -> DatasetCheck:
    """The checks of a zip of these images and captions, by the names of the images."""
    files = {n: each if isinstance(each, bytes) else encoded(each) for n, each in images.items()}
    files |= {f"{Path(n).stem}.txt": text.encode() for n, text in (captions or {}).items()}
    return check_dataset(settings(make_zip(tmp_path / "set.zip", files), **more))


def about(found: DatasetCheck) -> dict[str, list[list[str]]]:
    """The images of all findings, by their check."""
    by_check: dict[str, list[list[str]]] = {}
    for each in (*found.problems, *found.warnings, *found.suggestions):
        by_check.setdefault(each.check, []).append(found.about(each))
    return by_check


GOOD = {f"{n}.jpg": photo(n) for n in range(8)}
SCENES = "kitchen street beach forest office garden station attic".split()
CAPTIONS = {f"{n}.jpg": f"a photo of TOK, {scene} at noon" for n, scene in enumerate(SCENES)}


def test_a_good_dataset_has_no_findings(tmp_path: Path) -> None:
    found = checked(tmp_path, dict(GOOD), CAPTIONS)
    assert not about(found) and len(found.findings.examples) == 8
    assert "nothing to correct" in sheet(found)


def test_copies_of_an_image_are_one_group_also_mirrored_and_without_the_others(
    tmp_path: Path,
) -> None:
    image = photo(3)
    width, height = image.size
    copies = {
        "copy.jpg": image,
        "half.jpg": scaled(image, 0.5),
        "jpeg30.jpg": encoded(image, 30),
        "crop.jpg": image.crop((0, 0, round(width * 0.98), round(height * 0.98))),
        "mirrored.jpg": ImageOps.mirror(image),
    }
    found = checked(tmp_path, GOOD | copies, resolution="256")
    assert about(found) == {"near-duplicates": [sorted([*copies, "3.jpg"])]}


def test_an_image_from_a_little_beside_is_only_a_suggestion(tmp_path: Path) -> None:
    image = photo(5)
    beside = image.crop((round(0.085 * image.width), 0, *image.size))
    found = checked(tmp_path, GOOD | {"beside.jpg": beside}, CAPTIONS)
    assert about(found) == {"alike": [["5.jpg", "beside.jpg"]]}
    assert not found.warnings


def test_blurred_and_enlarged_images_are_named(tmp_path: Path) -> None:
    blur = photo(20).filter(ImageFilter.GaussianBlur(3))
    # A sharp subject before a soft background is not blurred.
    soft = photo(21).filter(ImageFilter.GaussianBlur(6))
    soft.paste(photo(22).crop((160, 80, 520, 400)), (160, 80))
    faults = {"blur.jpg": blur, "soft.jpg": soft, "enlarged.jpg": scaled(photo(23), 2)}
    found = checked(tmp_path, GOOD | faults, CAPTIONS, resolution="1024")
    named = about(found)
    assert named["blurred"] == [["blur.jpg"]]
    assert named["enlarged"] == [["enlarged.jpg"]]
    # At 448 pixels the enlarged image of 1280x960 has all the detail that is used.
    again = checked(tmp_path, GOOD | faults, CAPTIONS, resolution="448")
    assert about(again) == {"blurred": [["blur.jpg"]]}


def test_small_and_cropped_images_are_named_with_how_much(tmp_path: Path) -> None:
    shapes = {
        "web.jpg": scaled(photo(30), 0.5),
        "icon.jpg": photo(31).crop((0, 0, 100, 80)),
        "strip.jpg": photo(32, (1700, 520)),
        "screen.jpg": photo(33, (1170, 520)),  # of a phone
    }
    found = checked(tmp_path, GOOD | shapes, CAPTIONS)
    assert about(found) == {"small": [["icon.jpg"], ["web.jpg"]], "cropped": [["strip.jpg"]]}
    far, small, cropped = (each.text for each in found.warnings)
    assert far.startswith("1 of 12 images are far smaller than resolution 512")
    assert "icon.jpg (100x80, " in far
    assert small.startswith("1 of 12 images are smaller than resolution 512")
    assert "web.jpg (320x240, " in small
    assert re.search(r"strip.jpg \(1700x520, 4\d%\)", cropped)


def test_one_background_is_a_suggestion_from_six_images_on(tmp_path: Path) -> None:
    def framed(number: int) -> Image.Image:
        image = Image.new("RGB", SIZE, (30, 140, 60))
        image.paste(photo(number).crop((160, 100, 480, 380)), (160, 100))
        return image

    studio = {f"{n}.jpg": framed(n) for n in range(6)}
    found = checked(tmp_path, GOOD | studio, CAPTIONS)  # 0 to 5 are replaced: 6 of 8
    assert about(found) == {"same-background": [sorted(studio)]}
    few = checked(tmp_path, GOOD | {n: studio[n] for n in list(studio)[:5]}, CAPTIONS)
    assert not about(few)


@pytest.mark.parametrize(
    "count, more, check",
    [
        (7, {}, "few-images"),
        (8, {"subjects": "<a>,<b>"}, "few-images"),
        (8, {"preset": "style"}, "few-images"),
        (101, {}, "many-images"),
        (101, {"preset": "style"}, None),
    ],
)
def test_the_usual_number_of_images_depends_on_their_purpose(
    tmp_path: Path, count: int, more: dict[str, str], check: str | None
) -> None:
    random = np.random.default_rng(0)
    images = {
        f"{n:03}.jpg": Image.fromarray(random.integers(0, 255, (64, 64, 3), np.uint8))
        for n in range(count)
    }
    tokens = ("<a>", "<b>") if "subjects" in more else ("TOK",)
    captions = {n: f"number {k} with {tokens[k % len(tokens)]}" for k, n in enumerate(images)}
    found = about(checked(tmp_path, images, captions, **more))
    numbers = {name for name in found if name.endswith("-images")}
    assert numbers == ({check} if check else set())


# ---- Captions ------------------------------------------------------------------------------------


def of_captions(texts: Sequence[str], words: Sequence[str] = ("<zwx>",)) -> dict[str, Finding]:
    found = caption_checks({f"{n}.jpg": text for n, text in enumerate(texts)}, words, limit=512)
    return {each.check: each for each in found}


OTHERS = [f"a photo of <zwx>, {scene}" for scene in SCENES]


@pytest.mark.parametrize(
    "check, fires, does_not",
    [
        (
            "equal-captions",
            ["<zwx> on a table"] * 3 + OTHERS[:2],
            ["<zwx> on a table"] * 2 + OTHERS[:2],
        ),
        (
            "names-the-subject",
            [f"{each}, a small orange robot" for each in OTHERS[:4]] + OTHERS[4:5],
            [f"{each}, a small orange robot" for each in OTHERS[:3]] + OTHERS[3:5],
        ),
        (
            "names-the-subject",
            ["<zwx> with square black eyes in rain", "<zwx> with square black eyes"] * 2,
            # A place is not the subject, and `a photo of` names nothing.
            [f"a photo of <zwx> on a table by a {each}" for each in SCENES],
        ),
        (
            "class-word",
            ["<zwx> robot at night", "the <zwx> robot", "a robot", "<zwx> robot, rain"],
            [
                "<zwx> walking at night",
                "the <zwx> of Rome",
                "a photo of <zwx>",
                "<zwx> robot, rain",
            ],
        ),
        ("script", [*OTHERS, "雨の中の <zwx>"], [*OTHERS[:4], *["雨の中の <zwx>"] * 4]),
        ("too-long", ["<zwx>" + " in red" * 256], ["<zwx>" + " in red" * 255]),
    ],
)
def test_a_fault_of_captions_is_found(check: str, fires: list[str], does_not: list[str]) -> None:
    found = of_captions(fires)
    assert check in found and found[check].names
    assert check not in of_captions(does_not)


def test_the_caption_findings_quote_the_words() -> None:
    found = of_captions([f"{each}, a small orange robot" for each in OTHERS])
    assert "“a small orange robot” is in all 8 captions" in found["names-the-subject"].text
    two = ["<zwx> robot and <kul>", "<kul> by the <zwx> robot", "<kul> left of the robot <zwx>"]
    assert (
        "“robot” is next to <zwx> in 3 of 3"
        in of_captions(two, ("<kul>", "<zwx>"))["class-word"].text
    )


@pytest.mark.parametrize(
    "text, fault",
    [
        ("I'm sorry, but I can't identify people in images.", "is a refusal"),
        ("As an AI, I have no eyes", "is a refusal"),
        ("抱歉，我无法识别图片中的人", "is a refusal"),
        ("<think>The user wants a caption", "is an unfinished thought"),
        ("Here is a detailed caption of the image: TOK", "talks about itself"),
        ("a red and a red and a red and a red and a red car", "repeats itself"),
        ("TOK in a cafÃ©", "contains broken characters"),
        ("TOK holding a sign, sorry we are closed", None),
        ("TOK, 1, standing, desk, lamp. A quiet room...........", None),
        ("a very, very, very large TOK and a here is a cat", None),
        ("TOK cannot be seen behind the sure-footed goat", None),
    ],
)
def test_failed_answers_of_caption_models_are_found(text: str, fault: str | None) -> None:
    assert fault_of(text) == fault


def test_the_least_number_of_tokens_is_that_of_the_parts_a_tokenizer_never_joins() -> None:
    # The miniature's tokenizer splits as Qwen's do.
    file = ROOT / "miniature/weights/miniature-turbo/tokenizer/tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    for text in (
        "a well-lit (red) robot's 'eyes', 12:45 — it isn't on the snake_case table...",
        '雨の中の TOK, "quoted", _private_ and #tags; 3.14159 ½ café naïve\n\nnew line',
        "x" * 40 + " !!!???... -word --word ---word _word __word  two  spaces",
    ):
        parts = tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert 0.7 * len(parts) < least_tokens(text) <= len(parts)


# ---- The command, the page, the run --------------------------------------------------------------


def test_the_command_prints_json_and_writes_the_sheet(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "zeroprior", "check", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=100,
            env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)},
        )  # fmt: skip

    demo = str(ROOT / "demo/subject.zip")
    shown = run(demo)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("16 images, 16 with a caption file; checked for z-image-turbo")
    assert "warning: 16 of 16 images are far smaller than resolution 1024" in shown.stdout
    page = (tmp_path / "outputs/checks/subject.html").read_text()
    assert page.count("<article") == 16 and "<script" not in page and "default-src 'none'" in page

    found = json.loads(run(demo, "--json", "--base", "miniature").stdout)
    assert found["usable"] and found["captions"] == {"own": 16, "default": 0}
    assert [each["check"] for each in found["findings"]] == ["near-duplicates", "alike", "alike"]
    assert found["findings"][0]["images"] == ["02.png", "11.png"]
    assert found["images"][0]["bucket"] == [64, 64] and found["images"][0]["kept"] == 1

    make_zip(tmp_path / "bad.zip", {"a.jpg": b"no image", "b.jpg": encoded(photo(1))})
    broken = run("bad.zip", "--sheet", "sheet.html")
    assert broken.returncode == 1 and "problem: bad.zip: a.jpg: cannot be opened" in broken.stdout
    assert "cannot be used yet" in (tmp_path / "sheet.html").read_text()


def test_the_sheet_shows_the_worst_first_and_escapes_what_others_wrote(tmp_path: Path) -> None:
    images = GOOD | {"<b>.jpg": photo(3), "strip.jpg": photo(32, (1700, 520))}
    captions = CAPTIONS | {"<b>.jpg": "TOK <script>alert(1)</script>"}
    page = sheet(checked(tmp_path, images, captions))
    assert "<script" not in page and "<b>" not in page and "&lt;b&gt;.jpg" in page
    assert "<mark>&lt;zwx&gt;</mark> &lt;script&gt;alert(1)&lt;/script&gt;" in page
    names = re.findall(r"<h3>(.*?)</h3>", page)
    assert {*names[:3]} == {"&lt;b&gt;.jpg", "3.jpg", "strip.jpg"} and len(names) == 10
    assert page.count('class="crop"') > 0 and page.count('<div class="group">') == 1
    assert len(page) < 1_000_000


def test_a_run_logs_the_findings_and_at_most_five_of_a_kind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = {f"{n}{each}.jpg": photo(n) for n in range(7) for each in "ab"}
    found = checked(tmp_path, pairs)
    assert len(about(found)["near-duplicates"]) == 7
    with caplog.at_level(logging.INFO):
        log_checks(found.findings.examples, found.settings)
    assert caplog.messages[0].startswith("set.zip: 2 images are nearly the same")
    assert caplog.messages[-1] == "set.zip: 2 more findings like these; zeroprior check lists all"
    assert len(caplog.messages) == 6
