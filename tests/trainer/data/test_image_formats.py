"""Images of every format that people have, and what files of these formats must not cost."""

import io
import logging
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from dataset_files import RED, encoded, make_zip, picture, problems_of
from PIL import Image
from skimage import data as photographs
from watched import watched

from inference.color_profiles import profile_for
from inference.image_decoding import open_image, upright_srgb
from inference.image_limits import ImageLimit
from inference.images import read_image
from trainer.data.dataset import read_dataset
from trainer.data.images import check, probe
from trainer.data.members import Unusable

FILES = Path(__file__).parent / "images"  # made with pillow-heif, which can write
UPRIGHT, TURNED, P3 = (
    (FILES / f"{name}.heic").read_bytes() for name in ("upright", "turned", "display-p3")
)
FORMATS = {
    "HEIC": UPRIGHT,
    "AVIF": picture(64, 32, format="AVIF", quality=95),
    "TIFF": picture(64, 32, format="TIFF"),
    "TIFF, LZW": picture(64, 32, format="TIFF", compression="tiff_lzw"),
    "TIFF, Deflate": picture(64, 32, format="TIFF", compression="tiff_adobe_deflate"),
    "TIFF, PackBits": picture(64, 32, format="TIFF", compression="packbits"),
    "BMP": picture(64, 32, format="BMP"),
    "GIF": picture(64, 32, format="GIF"),
    "JPEG 2000": picture(64, 32, format="JPEG2000"),
    "JPEG 2000 codestream": picture(64, 32, format="JPEG2000", no_jp2=True),
}


@pytest.mark.parametrize("suffix", [".own", "", ".jpg", ".jpg_large"])
def test_every_format_is_read_by_its_content(tmp_path: Path, suffix: str) -> None:
    own = {"J": ".jp2", "H": ".HEIC", "T": ".tif", "A": ".avif", "B": ".bmp", "G": ".gif"}
    files = {
        f"{number}{own[name[0]] if suffix == '.own' else suffix}": content
        for number, (name, content) in enumerate(FORMATS.items())
    }
    examples = read_dataset(make_zip(tmp_path / "a.zip", files), "a photo")
    assert [each.name for each in examples] == [*files]
    for example in examples:
        image = example.image()
        assert image.size == (64, 32) == (example.width, example.height)
        assert np.abs(np.array(image.getpixel((4, 4))) - RED).max() <= 4


def test_a_heic_is_turned_by_its_own_property_alone() -> None:
    for content in (UPRIGHT, TURNED):  # the second by irot, which EXIF repeats
        image, _ = upright_srgb(open_image(content))
        assert image.size == (64, 32) and image.getpixel((4, 4))[1] < 10
        assert image.getpixel((60, 4))[1] > 245 and image.getpixel((4, 28))[1] > 245
    place = TURNED.index(b"irot") + 4
    exif_alone = TURNED[:place] + b"\0" + TURNED[place + 1 :]
    found = check(exif_alone)
    assert (found.width, found.height) == (32, 64)


def test_an_avif_and_a_tiff_are_turned_by_exif() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    avif = picture(64, 32, format="AVIF", exif=exif)
    for content in (avif, picture(64, 32, format="TIFF", tiffinfo={0x0112: 6})):
        found = check(content)
        assert (found.width, found.height) == upright_srgb(open_image(content))[0].size == (32, 64)


def test_of_several_frames_and_pages_the_first_is_used_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in (RED, (0, 0, 255))]
    files = {
        f"a.{format.lower()}": encoded(frames[0], format, save_all=True, append_images=frames[1:])
        for format in ("AVIF", "GIF", "TIFF")
    }
    examples = read_dataset(make_zip(tmp_path / "a.zip", files), "a photo")
    assert all(each.image().getpixel((3, 3))[2] < 10 for each in examples)
    assert "animations, only the first frame is used: a.avif, a.gif, a.tiff" in caplog.text


def test_more_bits_and_transparency_are_kept_from_other_formats() -> None:
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)[None].repeat(40, axis=0)
    for format in ("TIFF", "JPEG2000"):
        image, _ = upright_srgb(open_image(encoded(Image.fromarray(ramp), format)))
        assert [image.getpixel((x, 0))[0] for x in range(256)] == list(range(256))
    clear = Image.new("RGBA", (32, 16), (0, 0, 0, 0))
    for format in ("TIFF", "GIF", "AVIF", "JPEG2000"):
        assert upright_srgb(open_image(encoded(clear, format)))[0].getpixel((3, 3)) == (255,) * 3
    with pytest.raises(Unusable, match="pixels of 32 bits; export it with 8 or 16"):
        check(encoded(Image.new("F", (16, 16)), "TIFF"))


# ---- Color spaces without a profile --------------------------------------------------------------


def png_named(primaries: int, transfer: int, color: tuple[int, int, int]) -> bytes:
    """A PNG that names its color space in a cICP chunk (PNG, third edition, 11.3.2.6)."""
    chunk = b"cICP" + bytes((primaries, transfer, 0, 1))
    whole = picture(32, 32, color=color)
    return (
        whole[:33]
        + struct.pack(">I", 4)
        + chunk
        + struct.pack(">I", zlib.crc32(chunk))
        + whole[33:]
    )


def test_display_p3_is_converted_wherever_it_is_named() -> None:
    """200, 60, 40 in Display P3 is 217.5, 41.6, 22.7 in sRGB, by the formulas of both."""
    avif = bytearray(picture(32, 32, color=(200, 60, 40), format="AVIF", quality=100))
    place = avif.index(b"colrnclx") + 8
    avif[place : place + 4] = struct.pack(">HH", 12, 13)
    for content in (png_named(12, 13, (200, 60, 40)), P3, bytes(avif)):
        image, broken = upright_srgb(open_image(content))
        assert np.abs(np.array(image.getpixel((3, 3))) - (217, 42, 23)).max() <= 2
        assert not broken


def test_what_is_srgb_or_unknown_is_not_converted() -> None:
    for named in ((1, 13), (1, 1), (2, 2), (99, 13), (0, 0)):
        assert profile_for(*named) is None
        image, _ = upright_srgb(open_image(png_named(*named, (200, 60, 40))))
        assert image.getpixel((3, 3)) == (200, 60, 40)


@pytest.mark.parametrize(("transfer", "white", "half"), [(16, 0.5807, 59), (18, 0.75, 98)])
def test_of_hdr_paper_white_is_white(transfer: int, white: float, half: int) -> None:
    """The signal of 203 cd/m² (ITU-R BT.2408): 58 % in PQ, 75 % in HLG. Half of it by formula."""
    level = round(255 * white)
    image, _ = upright_srgb(open_image(png_named(9, transfer, (level,) * 3)))
    assert min(image.getpixel((3, 3))) >= 252
    image, _ = upright_srgb(open_image(png_named(9, transfer, (level // 2,) * 3)))
    assert abs(image.getpixel((3, 3))[0] - half) <= 1


# ---- Descriptions inside of images ---------------------------------------------------------------


def test_descriptions_in_image_files_are_not_used_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from PIL.PngImagePlugin import PngInfo

    text, exif = PngInfo(), Image.Exif()
    text.add_text("parameters", "a fox, masterpiece\nSteps: 20")
    exif[0x010E] = "a fox"
    xmp = b"<x><dc:subject><rdf:Bag><rdf:li>fox</rdf:li></rdf:Bag></dc:subject></x>"
    files = {"a.png": picture(pnginfo=text), "b.jpg": picture(format="JPEG", exif=exif)}
    files |= {"c.webp": picture(format="WEBP", xmp=xmp), "d.jpg": picture(format="JPEG")}
    files |= {"d.xmp": b"<x/>"}
    path = make_zip(tmp_path / "a.zip", files)
    assert {each.caption for each in read_dataset(path, "a photo")} == {"a photo"}
    line = (
        "descriptions in image files and XMP are not used as captions: a.png, b.jpg, c.webp, d.xmp"
    )
    assert line in caplog.text
    caplog.clear()
    captions = {f"{name}.txt": b"x" for name in "abcd"}
    captioned = make_zip(tmp_path / "captioned.zip", files | captions)
    with caplog.at_level(logging.INFO):
        read_dataset(captioned, "a photo")
    [record] = [each for each in caplog.records if line in each.getMessage()]
    assert record.levelno == logging.INFO  # with captions of their own it is for information


# ---- Files that mean harm ------------------------------------------------------------------------


def patched(content: bytes, mark: bytes, offset: int, new: bytes) -> bytes:
    place = content.index(mark) + offset
    return content[:place] + new + content[place + len(new) :]


def box(kind: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return struct.pack(">I4s", 8 + len(content), kind) + content


def heic_of(references: bytes) -> bytes:
    """A HEIC of two items: 1 of 4096x4096 pixels, made as `references` say, and a tile 2."""
    size = box(b"ispe", bytes(4), struct.pack(">II", 4096, 4096))
    links = struct.pack(">IIHBBHBB", 0, 2, 1, 1, 1, 2, 1, 1)
    properties = box(b"iprp", box(b"ipco", size), box(b"ipma", links))
    primary = box(b"pitm", struct.pack(">IH", 0, 1))
    content = (primary, box(b"iref", bytes(4), references), properties)
    return box(b"ftyp", b"heic", bytes(4), b"mif1heic") + box(b"meta", bytes(4), *content)


def tiff_with(tag: int, kind: int, count: int, value: int) -> bytes:
    """A TIFF whose first tag is replaced."""
    whole = picture(16, 16, format="TIFF")
    (start,) = struct.unpack_from("<I", whole, 4)
    entry = struct.pack("<HHII", tag, kind, count, value)
    return whole[: start + 2] + entry + whole[start + 14 :]


def tiled_tiff(side: int) -> bytes:
    """A TIFF of 16x16 pixels that claims tiles of `side`² pixels."""
    order, tags = "<", []
    for tag, value in ((256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1), (322, side)):
        tags.append(struct.pack(f"{order}HHII", tag, 4, 1, value))
    for tag, value in ((323, side), (324, 200), (325, 8)):
        tags.append(struct.pack(f"{order}HHII", tag, 4, 1, value))
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(tags) + bytes(4)
    return head.ljust(200, b"\0") + zlib.compress(bytes(256))


SMALL = {"codeblock_size": (4, 4)}
HOSTILE = {
    "a HEIC of a large size": patched(UPRIGHT, b"ispe", 8, struct.pack(">II", 30_000, 30_000)),
    "a HEIC with another size inside": patched(UPRIGHT, b"ispe", 8, struct.pack(">II", 16, 16)),
    "a HEIC of one tile 5,000 times": heic_of(
        box(b"dimg", struct.pack(">HH", 1, 5000), struct.pack(">H", 2) * 5000)
    ),
    "a HEIC made of itself": heic_of(box(b"dimg", struct.pack(">HHH", 1, 1, 1))),
    "a HEIC whose boxes leave it": patched(UPRIGHT, b"meta", -4, b"\x7f\xff\xff\xff"),
    "an AVIF of a large size": patched(
        picture(32, 32, format="AVIF"), b"ispe", 8, struct.pack(">II", 30_000, 30_000)
    ),
    "a JPEG 2000 in small code blocks": picture(2000, 2000, format="JPEG2000", **SMALL),
    "a JPEG 2000 in small code blocks, bare": picture(
        2000, 2000, format="JPEG2000", no_jp2=True, **SMALL
    ),
    "a JPEG 2000 in small precincts": picture(
        600, 600, format="JPEG2000", precinct_size=(16, 16), codeblock_size=(16, 16)
    ),
    "a JPEG 2000 of many tiles": picture(2000, 2000, format="JPEG2000", tile_size=(16, 16)),
    "a JPEG 2000 of a large size": patched(
        FORMATS["JPEG 2000"], b"\xff\x51", 6, struct.pack(">II", 60_000, 60_000)
    ),
    "a TIFF of a large size": tiff_with(256, 4, 1, 1 << 31),
    "a TIFF of large tiles": tiled_tiff(32_768),
    "a TIFF of ten million strips": tiff_with(273, 4, 10_000_000, 8),
    "a TIFF by fax": encoded(Image.new("1", (64, 32)), "TIFF", compression="group4"),
    "a BMP with runs": patched(picture(8, 8, format="BMP"), b"BM", 30, b"\1"),
    "a GIF of a large size": patched(FORMATS["GIF"], b"GIF8", 6, b"\xff\xff\xff\xff"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_files_that_would_cost_more_than_their_pixels_are_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {f"{name}.jpg": each for name, each in HOSTILE.items()})
    with watched(tmp_path / "own"):
        problems = problems_of(path)
    assert sorted(line.split(": ")[1] for line in problems) == sorted(f"{k}.jpg" for k in HOSTILE)
    for content in HOSTILE.values():
        file = tmp_path / "image"
        file.write_bytes(content)
        with pytest.raises(ValueError, match="^image image "):
            read_image(file)
        with pytest.raises((ImageLimit, Unusable)):
            probe(content)
            check(content)


def test_tiles_of_a_usual_size_are_read() -> None:
    photo = Image.fromarray(photographs.chelsea())
    for options in ({"tile_size": (128, 128)}, {"num_resolutions": 6}, {"quality_layers": [20, 5]}):
        assert check(encoded(photo, "JPEG2000", **options)).width == photo.width


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.filterwarnings("ignore:Metadata Warning")
@pytest.mark.parametrize("format", ["AVIF", "TIFF", "BMP", "GIF", "JPEG2000", "HEIC"])
def test_an_image_that_was_cut_anywhere_is_refused(format: str) -> None:
    photo = Image.fromarray(photographs.chelsea()[:100, :150])
    whole = UPRIGHT if format == "HEIC" else encoded(photo, format)
    for length in random.Random(0).sample(range(len(whole) - 12), 12):
        with pytest.raises(Unusable):
            probe(whole[:length])
            check(whole[:length])


def test_a_png_whose_pixels_are_damaged_is_refused() -> None:
    whole = picture(64, 48, format="PNG")
    place = whole.index(b"IDAT") + 8
    with pytest.raises(Unusable, match="is truncated or damaged"):
        check(whole[:place] + b"\xff" * 20 + whole[place + 20 :])


def test_other_programs_that_use_pillow_still_recognize_their_own_files() -> None:
    with Image.open(io.BytesIO(picture(format="PPM"))) as image:  # not sent to the parser of HEIC
        assert image.format == "PPM"
