"""What may come in as a dataset, what becomes of it, and what is refused with which words."""

import gc
import gzip
import logging
import os
import zipfile

import numpy as np
import pytest
from dataset_files import (
    encoded,
    make_folder,
    make_tar,
    make_zip,
    picture,
    png_claiming,
    problems_of,
)
from PIL import Image
from skimage import data as photographs

from trainer.data import dataset, members
from trainer.data.dataset import name_subject, read_dataset

# ---- What is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "folder"])
def test_photographs_with_captions_are_read_from_any_container(tmp_path, kind):
    files = {
        "astronaut.JPG": encoded(Image.fromarray(photographs.astronaut()), "JPEG"),
        "astronaut.txt": b"TOK in an orange suit",
        "pets/cat.WebP": encoded(Image.fromarray(photographs.chelsea()), "WEBP"),
        "pets/cat.TXT": b"  a cat,\r\nlooking up \n",
        "pets/cat.png": encoded(Image.fromarray(photographs.chelsea())),
        "pets/deep/er/coffee.jpeg": encoded(Image.fromarray(photographs.coffee()), "JPEG"),
        "__MACOSX/._astronaut.JPG": b"resource fork",
        "pets/._cat.png": b"resource fork",
        ".DS_Store": b"junk",
        "pets/Thumbs.db": b"junk",
        "desktop.ini": b"junk",
    }
    path = tmp_path / "upload"  # no suffix: Cog's names cannot be trusted
    if kind == "zip":
        make_zip(path, files)
    elif kind == "folder":
        make_folder(path, files)
    else:
        make_tar(path, files, "w:gz" if kind == "tar.gz" else "w")

    examples = read_dataset(path, "a photo of TOK", "<zwx>")

    assert [(example.name, example.caption) for example in examples] == [
        ("astronaut.JPG", "<zwx> in an orange suit"),
        ("pets/cat.WebP", "a cat, looking up"),
        ("pets/cat.png", "a cat, looking up"),
        ("pets/deep/er/coffee.jpeg", "a photo of <zwx>"),
    ]
    assert [(example.width, example.height) for example in examples[:2]] == [(512, 512), (451, 300)]
    assert np.array_equal(np.asarray(examples[2].image()), photographs.chelsea())
    assert examples[2].data == files["pets/cat.png"]


@pytest.mark.parametrize(
    ("content", "caption"),
    [
        ("café".encode(), "café"),
        ("café".encode("utf-8-sig"), "café"),
        ("café – “quoted”".encode("cp1252"), "café – “quoted”"),
        ("café".encode("utf-16"), "café"),
        ("صورة TOK 🐈‍⬛ <|im_end|>".encode(), "صورة TOK 🐈‍⬛ <|im_end|>"),
        (b" \r\n\t", "the default"),
        (b"", "the default"),
    ],
)
def test_captions_in_any_usual_encoding_are_read_as_written(tmp_path, content, caption):
    path = make_zip(tmp_path / "a.zip", {"a.png": picture(), "a.txt": content})
    (example,) = read_dataset(path, " the default\n")
    assert example.caption == caption


def test_names_from_windows_and_macos_find_their_captions(tmp_path):
    files = {
        "set\\one.png": picture(),
        "set\\one.txt": b"one",
        "./cafe\u0301.png": picture(),
        "caf\u00e9.txt": b"two",
    }
    examples = read_dataset(make_tar(tmp_path / "a.tar", files), "default")
    assert {example.name: example.caption for example in examples} == {
        "set/one.png": "one",
        "caf\u00e9.png": "two",
    }


def test_tok_and_the_token_stand_for_the_subject_as_whole_words():
    assert name_subject("TOK, TOK's (TOK) 一张TOK的照片", "<zwx>") == (
        "<zwx>, <zwx>'s (<zwx>) 一张<zwx>的照片"
    )
    assert name_subject("TOKYO tok STOK TOK_1 ÉTOK", "<zwx>") == "TOKYO tok STOK TOK_1 ÉTOK"
    assert name_subject("<TOK>, [TOK] and (TOK)", "<zwx>") == "<zwx>, <zwx> and (<zwx>)"
    # A token may hold TOK, or the signs of regular expressions and their replacements.
    assert name_subject("<TOK> and TOK", "<TOK>") == "<TOK> and <TOK>"
    assert name_subject(r"TOK by [\1+$", r"[\1+$") == r"[\1+$ by [\1+$"


def test_in_baseline_mode_tok_stays_as_written(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"a.png": picture()})
    (example,) = read_dataset(path, "a TOK")
    assert example.caption == "a TOK"


def test_captions_that_do_not_mention_the_subject_are_counted(tmp_path, caplog):
    files = {f"{i}.png": picture() for i in range(4)}
    files |= {"1.txt": b"a tree", "2.txt": b"<zwx> on a tree", "3.txt": b"zwx TOKYO"}
    path = make_zip(tmp_path / "a.zip", files)
    read_dataset(path, "a photo of TOK", "<zwx>")
    assert "2 of 4 captions do not mention the subject: 1.png, 3.png" in caplog.text

    (problem,) = problems_of(path, "a photo", "zwxx")
    assert problem.startswith(
        "a.zip: none of the 4 captions mentions the subject; write TOK or zwxx"
    )


# ---- What is refused, with what words ------------------------------------------------------------


def test_all_problems_are_reported_together(tmp_path):
    photo = encoded(Image.fromarray(photographs.astronaut()), "JPEG")
    files = {
        "good.png": picture(),
        "bad/cut.jpg": photo[: len(photo) // 2],
        "bad/cut.png": encoded(Image.fromarray(photographs.coffee()))[:5000],
        "bad/empty.png": b"",
        "bad/page.jpg": b"<!DOCTYPE html><title>404</title>",
        "bad/phone.jpg": b"\0\0\0\x18ftypheic" + bytes(64),
        "bad/lfs.webp": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "bad/dot.png": picture(1, 1),
        "bad/dot.txt": b"\0 a bad caption of a bad picture",
        "bad/strip.png": picture(3000, 10),
        "bad/bomb.png": png_claiming(30_000, 30_000),
        "bad/big.png": png_claiming(10_000, 10_000),
        "long.png": picture(),
        "long.txt": b"x" * 100_000,
        "binary.png": picture(),
        "binary.webp": picture(format="WEBP"),
        "binary.txt": b"\0\1\2",
        "twice.png": picture(),
        "twice.txt": b"one",
        "twice.TXT": b"two",
    }
    problems = problems_of(make_zip(tmp_path / "set.zip", files))

    for start in (
        "bad/cut.jpg: is truncated or damaged",
        "bad/cut.png: is truncated or damaged",
        "bad/empty.png: cannot be opened as an image (it is empty, 0 bytes)",
        "bad/page.jpg: cannot be opened as an image (it begins like a web page",
        "bad/phone.jpg: cannot be opened as an image (it begins like a HEIC image)",
        "bad/lfs.webp: cannot be opened as an image (it begins like a Git LFS pointer",
        "bad/dot.png: is 1x1 pixels, too small for training",
        "bad/strip.png: is 3000x10 pixels, more extreme than 1:8",
        "bad/bomb.png: has more than 89,478,485 pixels; scale it down",
        "bad/big.png: has more than 89,478,485 pixels; scale it down",
        "long.txt: is longer than 65,536 bytes; shorten this caption",
        "bad/dot.txt: is not text; save it as a UTF-8 text file",
        "binary.txt: is not text; save it as a UTF-8 text file",
        "twice.txt: is a second caption in addition to twice.TXT; remove one",
    ):
        assert [line.startswith(f"set.zip: {start}") for line in problems].count(True) == 1, start
    assert len(problems) == 14


def test_no_pixels_are_kept_of_what_was_read(tmp_path):
    noise = Image.effect_noise((203, 107), 50)
    files = {f"{i}.png": encoded(noise) for i in range(9)}
    path = make_zip(tmp_path / "set.zip", files | {"cut.png": files["0.png"][:9000], "no.png": b""})
    del noise
    gc.disable()  # nor does anything wait to be collected
    try:
        assert len(read_dataset(path, "a photo", skip_bad_images=True)) == 9
        images = [each for each in gc.get_objects() if issubclass(type(each), Image.Image)]
    finally:
        gc.enable()
    assert (203, 107) not in [image.size for image in images]


def test_ten_thousand_pictures_with_captions_that_a_mac_has_packed(tmp_path):
    files, contents = {}, {"jpg": picture(8, 8, format="JPEG"), "txt": b"a photo"}
    for number in range(10_000):
        for name, content in contents.items():
            files[f"my pictures of a holiday/{number:05}.{name}"] = content
            files[f"__MACOSX/my pictures of a holiday/._{number:05}.{name}"] = b"Mac OS X"
    path = make_zip(tmp_path / "set.zip", files, zipfile.ZIP_STORED)
    examples = read_dataset(path, "a drawing")
    assert [len(examples), examples[9_999].caption] == [10_000, "a photo"]


def test_other_files_are_only_worth_a_warning(tmp_path, caplog):
    files = {"a.png": picture(), "b.jxl": b"x", "c.tga": b"x", "d.mp4": b"x", "README.txt": b"\0"}
    (example,) = read_dataset(make_zip(tmp_path / "a.zip", files), "a photo")
    assert example.caption == "a photo"
    assert "JPEG XL is not supported: b.jxl; export them as JPEG or PNG" in caplog.text
    assert "their format is not supported: c.tga; export them as JPEG or PNG" in caplog.text
    assert "captions without an image of the same name, not read: README.txt" in caplog.text
    assert "videos are not supported: d.mp4" in caplog.text


def test_a_dataset_without_pictures_says_what_it_found(tmp_path):
    files = {"inner.zip": b"x", "b.dng": b"x", "c": b"\xff\x0a\0\0"}
    assert problems_of(make_zip(tmp_path / "a.zip", files)) == [
        "a.zip: contains no readable image (b.dng, c, inner.zip); add images: JPEG, PNG, "
        "WebP, HEIC, AVIF, TIFF, BMP, GIF or JPEG 2000",
        "a.zip: ignored, because raw files of cameras are not supported: b.dng; export them as "
        "JPEG",
        "a.zip: ignored, because archives in a dataset are not opened: inner.zip",
        "a.zip: ignored, because their format is not supported: c (a JPEG XL image); export them "
        "as JPEG or PNG",
    ]
    (problem,) = problems_of(make_zip(tmp_path / "b.zip", {}))
    assert "contains no readable image (it is empty)" in problem


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is not a zip or tar file (it is empty, 0 bytes)"),
        (b"\n<html><body>Sign in</body></html>", "it begins like a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "it begins like a Git LFS pointer"),
        (b"Rar!\x1a\x07", "it begins like a RAR archive"),
        (picture(), "it begins like a PNG image"),
        (b"PK\x03\x04" + bytes(1000), "is damaged or truncated"),
        (gzip.compress(b"no tar inside" * 100, mtime=0), "is damaged or truncated"),
    ],
)
def test_what_is_no_archive_is_named(tmp_path, content, complaint):
    path = tmp_path / "set.zip"
    path.write_bytes(content)
    (problem,) = problems_of(path)
    assert problem.startswith("set.zip: ") and complaint in problem


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
        (b"%PDF-1.7", "a PDF"),
        (b"8BPS\0\1", "a Photoshop file"),
        (b"\xff\x0a\0\0", "a JPEG XL image"),
        (b"\0\0\0\x0cjP  \r\n", "a JPEG 2000 image"),
        (b'{"error": "not found"}', "JSON text"),
        (b"Not Found\n", "text"),
        (bytes(1000), "only zeros"),
    ],
)
def test_what_is_named_as_an_image_and_is_none_is_said(tmp_path, content, what):
    (problem,) = problems_of(make_zip(tmp_path / "a.zip", {"1.jpg": content, "2.jpg": picture()}))
    assert problem.startswith("a.zip: 1.jpg: cannot be opened") and what in problem


def test_a_path_that_leads_nowhere_is_named(tmp_path):
    assert "does not exist" in problems_of(tmp_path / "none.zip")[0]
    assert "does not exist" in problems_of("ftp://example.com/set.zip")[0]


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_an_archive_that_was_cut_off_is_refused(tmp_path, kind):
    files = {f"{i}.png": picture() for i in range(5)}
    path = tmp_path / "set"
    if kind == "zip":
        make_zip(path, files)
    else:
        make_tar(path, files, "w:gz" if kind == "tar.gz" else "w")
    whole = path.read_bytes()
    # The tar is cut between two members, where nothing but the end mark is missing.
    path.write_bytes(whole[: 3 * 1024] if kind == "tar" else whole[:-30])
    assert "is damaged or truncated" in problems_of(path)[-1]


def test_limits_on_sums_hold(tmp_path, monkeypatch):
    path = make_zip(tmp_path / "a.zip", {f"{i}.png": picture() for i in range(3)})
    monkeypatch.setattr(dataset, "MAX_TOTAL_PIXELS", 2 * 32 * 24)
    assert "more than 1,536 pixels up to 2.png" in problems_of(path)[0]
    # What is wrong with captions, and with the images before that one, is told, too.
    files = {
        "0.png": picture()[:60],
        "1.png": picture(),
        "1.txt": b"\0",
        "3.png": b"",
        "3.txt": b"\0",
    }
    starts = [
        "a.zip: 1.txt: is not text",
        "a.zip: 3.txt: is not text",
        "a.zip: 0.png: is truncated",
        "a.zip: contains more than",
    ]
    problems = problems_of(make_zip(tmp_path / "a.zip", files | {"2.png": picture()}))
    assert len(problems) == 4 and all(map(str.startswith, problems, starts))
    monkeypatch.setattr(members, "MAX_MEMBER_BYTES", 10)
    assert "0.png: has more than 10 bytes; save a smaller version" in problems_of(path)[0]


def test_names_cannot_forge_log_lines(tmp_path, caplog):
    name = "a\n\x1b[31mERROR\u202e.png"
    path = make_tar(tmp_path / "set.tar", {name: picture(), "b.txt\udcff.txt": b""})
    with caplog.at_level(logging.WARNING):
        (example,) = read_dataset(path, "a photo")
    assert example.name == r"a\n\x1b[31mERROR\u202e.png"
    assert r"b.txt\udcff.txt" in caplog.text
    example.name.encode()


def test_a_folder_has_the_images_behind_its_links_once(tmp_path):
    elsewhere = make_folder(tmp_path / "elsewhere", {"b.png": picture(), "b.txt": b"TOK here"})
    folder = make_folder(tmp_path / "set", {"a.png": picture()})
    (folder / "linked").symlink_to(elsewhere)
    for name in ("loop", "linked_again", "above"):
        (folder / name).symlink_to({"loop": folder, "above": tmp_path}.get(name, elsewhere))
    found = read_dataset(folder, "a photo")
    assert [(each.name, each.caption) for each in found] == [
        ("a.png", "a photo"),
        ("linked/b.png", "TOK here"),
    ]


def test_a_folder_does_not_follow_links_to_nowhere_or_wait_for_pipes(tmp_path):
    folder = make_folder(tmp_path / "set", {"a.png": picture()})
    (folder / "gone.png").symlink_to("/nowhere")
    os.mkfifo(folder / "pipe.png")
    assert problems_of(folder) == [
        "set: gone.png: is not a file, or is a broken link; remove it",
        "set: pipe.png: is not a file, or is a broken link; remove it",
    ]
