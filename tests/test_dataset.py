"""What may come in as a dataset, what becomes of it, and what is refused with which words."""

import gzip
import io
import logging
import os
import struct
import tarfile
import time
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image
from skimage import data as photographs

from trainer import dataset, members, pictures
from trainer.dataset import DatasetError, name_subject, read_dataset

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def picture(width=32, height=24, color=RED, format="PNG", **options):
    return encoded(Image.new("RGB", (width, height), color), format, **options)


def make_zip(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def make_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def make_folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def problems_of(archive, default_caption="a photo", subject=None):
    with pytest.raises(DatasetError) as caught:
        read_dataset(archive, default_caption, subject)
    return str(caught.value).splitlines()


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
        (b"caf\xe9 \x81", "café \x81"),
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


# ---- Pictures become upright 8-bit RGB -----------------------------------------------------------


def first_image(tmp_path, content, name="a.png"):
    (example,) = read_dataset(make_zip(tmp_path / "a.zip", {name: content}), "a photo")
    image = example.image()
    assert image.mode == "RGB"
    assert image.size == (example.width, example.height)
    return image


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(tmp_path, orientation):
    upright = Image.new("RGB", (64, 32), WHITE)
    upright.paste(RED, (0, 0, 16, 16))
    back = {6: 8, 8: 6}.get(orientation, orientation)
    stored = upright if back == 1 else upright.transpose(pictures.UPRIGHT[back])
    exif = Image.Exif()
    exif[0x0112] = orientation

    image = first_image(tmp_path, encoded(stored, "JPEG", quality=95, exif=exif), "a.jpg")

    assert image.size == (64, 32)
    assert image.getpixel((4, 4))[1] < 30
    assert image.getpixel((60, 4))[1] > 225 and image.getpixel((4, 28))[1] > 225


def with_alpha(mode):
    image = Image.new("RGBA", (16, 16), (*RED, 255))
    image.paste((0, 0, 255, 0), (8, 0, 16, 16))
    if mode == "P":
        palette = Image.new("P", (16, 16), 0)
        palette.putpalette([*RED, 0, 0, 255])
        palette.paste(1, (8, 0, 16, 16))
        return encoded(palette, transparency=1)
    if mode == "RGB":
        return encoded(image.convert("RGB"), transparency=(0, 0, 255))
    return encoded(image.convert(mode))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_what_is_transparent_becomes_white(tmp_path, mode):
    image = first_image(tmp_path, with_alpha(mode))
    assert image.getpixel((2, 2)) == ((76, 76, 76) if mode == "LA" else RED)
    assert image.getpixel((12, 2)) == WHITE


def test_half_transparent_is_half_white(tmp_path):
    content = encoded(Image.new("RGBA", (16, 16), (0, 0, 0, 128)))
    assert first_image(tmp_path, content).getpixel((0, 0)) == (127, 127, 127)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)[None].repeat(40, axis=0)
    image = first_image(tmp_path, encoded(Image.fromarray(ramp)))
    assert [image.getpixel((x, 0))[0] for x in range(256)] == list(range(256))


def test_cmyk_as_adobe_inverts_it_keeps_its_colours(tmp_path):
    content = encoded(Image.new("RGB", (16, 16), RED).convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in content
    red, green, blue = first_image(tmp_path, content, "a.jpg").getpixel((8, 8))
    assert red > 245 and green < 10 and blue < 10


def test_greyscale_bilevel_and_misnamed_pictures_are_read(tmp_path):
    assert first_image(tmp_path, encoded(Image.new("L", (16, 16), 99))).getpixel((0, 0)) == (
        (99,) * 3
    )
    assert first_image(tmp_path, encoded(Image.new("1", (16, 16), 1))).getpixel((0, 0)) == WHITE
    assert first_image(tmp_path, picture(), "a.jpg").getpixel((0, 0)) == RED


def test_broken_exif_does_not_cost_the_picture(tmp_path):
    content = picture(format="JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xffgarbage")
    assert first_image(tmp_path, content, "a.jpg").size == (32, 24)


@pytest.mark.parametrize(("name", "format"), [("a.webp", "WEBP"), ("a.png", "PNG")])
def test_of_an_animation_the_first_frame_is_used(tmp_path, caplog, name, format):
    frames = [Image.new("RGB", (16, 16), color) for color in (RED, (0, 0, 255))]
    content = encoded(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)
    assert first_image(tmp_path, content, name).getpixel((0, 0)) == RED
    assert f"only the first frame is used of: {name}" in caplog.text


# ---- What is refused, with what words ------------------------------------------------------------


def png_claiming(width, height):
    """A tiny PNG whose header claims any size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header
    body += struct.pack(">I", zlib.crc32(header))
    return body + picture()[33:]


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
        "bad/empty.png: cannot be opened as a picture (it is empty, 0 bytes)",
        "bad/page.jpg: cannot be opened as a picture (it begins like a web page",
        "bad/phone.jpg: cannot be opened as a picture (it begins like a HEIC image)",
        "bad/lfs.webp: cannot be opened as a picture (it begins like a Git LFS pointer",
        "bad/dot.png: is 1x1 pixels, too small to learn from",
        "bad/strip.png: is 3000x10 pixels, more extreme than 1:8",
        "bad/bomb.png: has more than 89,478,485 pixels; scale it down",
        "bad/big.png: has more than 89,478,485 pixels; scale it down",
        "long.txt: is longer than 65,536 bytes; shorten this caption",
        "bad/dot.txt: is not text; save the caption as a UTF-8 text file",
        "binary.txt: is not text; save the caption as a UTF-8 text file",
        "twice.txt: is a second caption beside twice.TXT; remove one of them",
    ):
        assert [line.startswith(f"set.zip: {start}") for line in problems].count(True) == 1, start
    assert len(problems) == 14


def test_other_files_are_only_worth_a_warning(tmp_path, caplog):
    files = {"a.png": picture(), "b.heic": b"x", "c.gif": b"x", "d.mp4": b"x", "README.txt": b"\0"}
    (example,) = read_dataset(make_zip(tmp_path / "a.zip", files), "a photo")
    assert example.caption == "a photo"
    assert "only JPEG, PNG and WebP are read: b.heic, c.gif" in caplog.text
    assert "captions without a picture: README.txt" in caplog.text
    assert "d.mp4" not in caplog.text


def test_a_dataset_without_pictures_says_what_it_found(tmp_path):
    files = {"inner.zip": b"x", "b.heic": b"x"}
    (problem,) = problems_of(make_zip(tmp_path / "a.zip", files))
    assert problem == (
        "a.zip: holds no picture that can be read (b.heic, inner.zip); "
        "put JPEG, PNG or WebP pictures in it"
    )
    (problem,) = problems_of(make_zip(tmp_path / "b.zip", {}))
    assert "holds no picture that can be read (it is empty)" in problem


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is not a zip or tar file (it is empty, 0 bytes)"),
        (b"\n<html><body>Sign in</body></html>", "it begins like a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "it begins like a Git LFS pointer"),
        (b"Rar!\x1a\x07", "it begins like a RAR archive"),
        (picture(), "it begins like a PNG image"),
        (b"PK\x03\x04" + bytes(1000), "is damaged or cut off"),
        (gzip.compress(b"no tar inside" * 100), "is damaged or cut off"),
    ],
)
def test_what_is_no_archive_is_named(tmp_path, content, complaint):
    path = tmp_path / "set.zip"
    path.write_bytes(content)
    (problem,) = problems_of(path)
    assert problem.startswith("set.zip: ") and complaint in problem


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
    assert "is damaged or cut off" in problems_of(path)[-1]


# ---- Hostile archives ----------------------------------------------------------------------------

UNSAFE_NAMES = ["../evil.png", "/etc/evil.png", "a/../../evil.png", "C:\\evil.png", "..\\evil.png"]


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_paths_that_lead_out_of_the_archive_are_refused(tmp_path, make):
    files = dict.fromkeys(UNSAFE_NAMES, picture())
    problems = problems_of(make(tmp_path / "set", files))
    assert len(problems) == len(UNSAFE_NAMES)
    for name, problem in zip(UNSAFE_NAMES, problems, strict=True):
        assert problem.startswith(f"set: {name}: has a path that leads out of the archive")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "set"]


def test_links_devices_and_sparse_files_in_a_tar_are_refused(tmp_path):
    path = tmp_path / "set.tar"
    types = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, b"S", b"?"]
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for number, kind in enumerate(types):
            info = tarfile.TarInfo(f"{number}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    problems = problems_of(path)
    assert len(problems) == len(types)
    assert all("is a link, device or sparse file" in problem for problem in problems)


def test_links_strange_packing_and_doubles_in_a_zip_are_refused(tmp_path):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        link = zipfile.ZipInfo("link.png")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("lzma.png", picture(), zipfile.ZIP_LZMA)
        archive.writestr("twice.png", picture())
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("twice.png", picture())
    assert problems_of(path) == [
        "set.zip: link.png: is a link or device; put the file itself in",
        "set.zip: lzma.png: is packed in an unusual way; pack the archive again as an ordinary zip",
        "set.zip: twice.png: is in the archive twice; rename or remove one",
    ]


def patched_zip(path, files, offset, value, compression=zipfile.ZIP_DEFLATED):
    """A zip in whose directory one field of the first member says something else."""
    content = bytearray(make_zip(path, files, compression).read_bytes())
    at = content.index(b"PK\x01\x02") + offset
    content[at : at + len(value)] = value
    path.write_bytes(content)
    return path


def test_encrypted_members_lying_sizes_and_flipped_bits_are_named(tmp_path):
    files = {"a.png": picture()}
    path = patched_zip(tmp_path / "locked.zip", files, 8, b"\x01\x00")
    assert "a.png: is encrypted; pack the archive without a password" in problems_of(path)[0]

    longer = struct.pack("<I", len(picture()) + 1000)
    path = patched_zip(tmp_path / "longer.zip", files, 24, longer)
    assert "a.png: is cut off" in problems_of(path)[0]

    shorter = struct.pack("<I", len(picture()) - 10)
    path = patched_zip(tmp_path / "shorter.zip", files, 24, shorter)
    assert "a.png: cannot be read (Bad CRC-32" in problems_of(path)[0]

    path = make_zip(tmp_path / "flipped.zip", files, zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    content[60] ^= 1
    path.write_bytes(content)
    assert "a.png: cannot be read (Bad CRC-32" in problems_of(path)[0]


def test_a_broken_tar_header_does_not_pass_for_the_end(tmp_path):
    path = make_tar(tmp_path / "set.tar", {"a.png": picture(), "b.png": picture()})
    content = bytearray(path.read_bytes())
    content[1024] ^= 1
    path.write_bytes(content)
    assert "is damaged or cut off (no end mark)" in problems_of(path)[0]


def deflated_zeros(size):
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    zeros = bytes(1 << 20)
    return b"".join(packer.compress(zeros) for _ in range(size >> 20)) + packer.flush()


def tar_header(name, size, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def bomb_by_ratio(path):
    make_zip(path, {"bomb.png": bytes(50 << 20)})
    return "bomb.png: unpacks to 52,428,800 bytes from"


def bomb_of_many_members(path):
    with gzip.open(path, "wb", compresslevel=1) as file:
        for number in range(30_000):
            file.write(tar_header(f"{number}/", 0, tarfile.DIRTYPE))
    return "holds more than 10,000 files"


def bomb_of_a_long_directory(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", picture())
    content = path.read_bytes()
    at, end = content.index(b"PK\x01\x02"), content.index(b"PK\x05\x06")
    directory = content[at:end] * 120_000
    tail = content[end : end + 12] + struct.pack("<II", len(directory), at) + b"\0\0"
    path.write_bytes(content[:at] + directory + tail)
    return "has an oversized directory or header"


def bomb_of_huge_claims(path):
    path.write_bytes(tar_header("a.png", 1 << 40) + bytes(1024))
    return "unpacks to more than 2,147,483,648 bytes"


def bomb_in_a_tar_header(path):
    # A name of 64 MB, which tarfile would read whole.
    header = gzip.compress(tar_header("././@LongLink", 64 << 20, tarfile.GNUTYPE_LONGNAME))
    path.write_bytes(header + deflated_zeros(64 << 20))
    return "has an oversized directory or header"


def bomb_of_nested_headers(path):
    link = tar_header("././@LongLink", 0, tarfile.GNUTYPE_LONGNAME)
    path.write_bytes(link * 5000 + bytes(1024))
    return "is damaged or cut off (maximum recursion depth"


@pytest.mark.parametrize(
    "bomb",
    [
        bomb_by_ratio,
        bomb_of_many_members,
        bomb_of_a_long_directory,
        bomb_of_huge_claims,
        bomb_in_a_tar_header,
        bomb_of_nested_headers,
    ],
)
def test_bombs_are_refused_in_bounded_time_and_memory(tmp_path, bomb):
    path = tmp_path / "set"
    complaint = bomb(path)
    tracemalloc.start()
    started = time.monotonic()
    try:
        problems = problems_of(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert complaint in problems[-1]
    assert peak < 40 << 20
    assert time.monotonic() - started < 30


def test_limits_on_sums_hold(tmp_path, monkeypatch):
    path = make_zip(tmp_path / "a.zip", {f"{i}.png": picture() for i in range(3)})
    monkeypatch.setattr(dataset, "MAX_TOTAL_PIXELS", 2 * 32 * 24)
    assert "more than 1,536 pixels up to 2.png" in problems_of(path)[0]
    monkeypatch.setattr(members, "MAX_MEMBER_BYTES", 10)
    assert "0.png: has more than 10 bytes; save it smaller" in problems_of(path)[0]


def test_names_cannot_forge_log_lines(tmp_path, caplog):
    name = "a\n\x1b[31mERROR\u202e.png"
    path = make_tar(tmp_path / "set.tar", {name: picture(), "b.txt\udcff.txt": b""})
    with caplog.at_level(logging.WARNING):
        (example,) = read_dataset(path, "a photo")
    assert example.name == r"a\n\x1b[31mERROR\u202e.png"
    assert r"b.txt\udcff.txt" in caplog.text
    example.name.encode()


def test_a_zip64_archive_is_read(tmp_path):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("a.png", "w", force_zip64=True) as file:
            file.write(picture())
    assert len(read_dataset(path, "a photo")) == 1


def test_a_folder_does_not_follow_links_to_nowhere_or_wait_for_pipes(tmp_path):
    folder = make_folder(tmp_path / "set", {"a.png": picture()})
    (folder / "gone.png").symlink_to("/nowhere")
    os.mkfifo(folder / "pipe.png")
    assert problems_of(folder) == [
        "set: gone.png: is not a file or leads nowhere; remove it",
        "set: pipe.png: is not a file or leads nowhere; remove it",
    ]
