"""Every picture that strangers send becomes upright 8-bit sRGB, or is refused with the reason."""

import random
import struct
import zlib

import numpy as np
import pytest
from dataset_files import RED, WHITE, encoded, make_zip, picture, png_claiming, problems_of
from PIL import Image, ImageCms
from skimage import data as photographs
from watched import watched

from inference.image_decoding import open_image, upright_srgb
from inference.images import BrokenImage, read_image
from trainer.data.dataset import DatasetError, read_dataset
from trainer.data.images import check
from trainer.data.members import Unusable

# ---- Pictures become upright 8-bit RGB -----------------------------------------------------------


def first_image(tmp_path, content, name="a.png"):
    (example,) = read_dataset(make_zip(tmp_path / "a.zip", {name: content}), "a photo")
    image = example.image()
    assert image.mode == "RGB"
    assert image.size == (example.width, example.height)
    return image


# EXIF 2.32, tag 0x0112: how a stored image must be turned to be upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(tmp_path, orientation):
    upright = Image.new("RGB", (64, 32), WHITE)
    upright.paste(RED, (0, 0, 16, 16))
    back = {6: 8, 8: 6}.get(orientation, orientation)
    stored = upright if back == 1 else upright.transpose(UPRIGHT[back])
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
    assert f"animations, only the first frame is used: {name}" in caplog.text


# ---- Colour profiles -----------------------------------------------------------------------------

# Red, green and blue of each space as XYZ under D50 (Lindbloom, and the ICC's files), and gamma.
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141))
P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
WIDE = {"Display P3": (np.array(P3).T, 2.2), "Adobe RGB (1998)": (np.array(ADOBE).T, 563 / 256)}


def icc_profile(name: str, space: bytes = b"RGB ") -> bytes:
    """A small ICC profile of version 2 (ICC.1:2001-04): three colours and a gamma."""
    colours, gamma = WIDE[name]

    def fixed(values: np.ndarray) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    described = b"desc" + bytes(4) + struct.pack(">I", len(name) + 1) + name.encode() + bytes(79)
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    tags = {b"desc": described + bytes(-len(described) % 4), b"cprt": b"text" + bytes(8)}
    tags[b"wtpt"] = b"XYZ " + bytes(4) + fixed(np.array([0.9642, 1.0, 0.8249]))
    for column, letter in enumerate("rgb"):
        tags[f"{letter}XYZ".encode()] = b"XYZ " + bytes(4) + fixed(colours[:, column])
        tags[f"{letter}TRC".encode()] = curve
    table, content = b"", b""
    for tag, value in tags.items():
        table += tag + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(content), len(value))
        content += value
    body = struct.pack(">I", len(tags)) + table + content
    header = struct.pack(
        ">I4sI4s4s4s", 128 + len(body), bytes(4), 0x02400000, b"mntr", space, b"XYZ "
    )
    header += bytes(12) + b"acsp" + bytes(28) + fixed(np.array([0.9642, 1.0, 0.8249])) + bytes(48)
    return header + body


def in_srgb(rgb: tuple[int, ...], name: str) -> np.ndarray:
    """The colour as sRGB, by the formulas (IEC 61966-2-1), not by the library."""
    colours, gamma = WIDE[name]
    linear = np.linalg.inv(np.array(SRGB).T) @ colours @ (np.array(rgb) / 255) ** gamma
    linear = linear.clip(0, 1)
    return 255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)


@pytest.mark.parametrize("color", [(180, 100, 90), (60, 140, 70), (128, 128, 128)])
@pytest.mark.parametrize("name", WIDE)
def test_wide_colours_become_srgb(tmp_path, name, color, caplog):
    content = picture(color=color, icc_profile=icc_profile(name))
    found = first_image(tmp_path, content).getpixel((3, 3))
    assert np.abs(np.array(found) - in_srgb(color, name)).max() <= 1.5
    assert not caplog.records


def test_wide_colours_become_srgb_beside_transparency(tmp_path):
    name = "Display P3"
    image = Image.new("RGBA", (16, 16), (180, 100, 90, 255))
    image.paste((0, 0, 0, 0), (8, 0, 16, 16))
    found = first_image(tmp_path, encoded(image, icc_profile=icc_profile(name)))
    assert np.abs(np.array(found.getpixel((2, 2))) - in_srgb((180, 100, 90), name)).max() <= 1.5
    assert found.getpixel((12, 2)) == WHITE


def test_an_srgb_profile_changes_no_pixel(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photo = Image.fromarray(photographs.astronaut())
    image = first_image(tmp_path, encoded(photo, icc_profile=profile))
    assert np.array_equal(np.asarray(image), np.asarray(photo))


WHOLE = icc_profile("Display P3")
RED_TAG = WHOLE.index(b"rXYZ")
BROKEN_PROFILES = {
    "garbage": b"not a profile" * 20,
    "cut short": WHOLE[:200],
    "of other colours": icc_profile("Display P3", b"CMYK"),
    "a tag beyond the end": WHOLE[: RED_TAG + 4] + b"\xff" * 8 + WHOLE[RED_TAG + 12 :],
    "no tags": WHOLE[:128] + bytes(4),
    "a million tags": WHOLE[:128] + struct.pack(">I", 10**6) + WHOLE[132:],
}


@pytest.mark.parametrize("profile", BROKEN_PROFILES.values(), ids=BROKEN_PROFILES)
def test_a_broken_profile_is_ignored_with_a_warning(tmp_path, profile, caplog):
    content = picture(color=(180, 100, 90), format="JPEG", quality=100, icc_profile=profile)
    image = first_image(tmp_path, content, "a.jpg")
    assert np.abs(np.array(image.getpixel((3, 3))) - (180, 100, 90)).max() <= 2
    assert "a.zip: broken color profiles are ignored: a.jpg" in caplog.text


# ---- Pictures that mean harm ---------------------------------------------------------------------


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png_with(kind: bytes, content: bytes) -> bytes:
    """A whole PNG with a chunk behind its header."""
    return picture()[:33] + png_chunk(kind, content) + picture()[33:]


def jpeg_of_scans(count: int) -> bytes:
    """A progressive JPEG that says its last scan over and over: a pass over all pixels each."""
    photo = picture(512, 512, format="JPEG", progressive=True)
    last = photo.rindex(b"\xff\xda")
    return photo[:last] + photo[last:-2] * count + photo[-2:]


ZEROS = zlib.compress(bytes(100 << 20), 9)
REFUSED = {
    "zero bytes": (b"", "cannot be opened as an image (it is empty, 0 bytes)"),
    "one pixel": (picture(1, 1), "is 1x1 pixels, too small for training"),
    "a strip": (picture(30_000, 10), "is 30000x10 pixels, more extreme than 1:8"),
    "a bomb": (png_claiming(30_000, 30_000), "has more than 89,478,485 pixels"),
    "a bomb that Pillow only warns of": (png_claiming(10_000, 9000), "has more than 89,478,485"),
    "a larger bomb": (png_claiming(2**31 - 1, 2**31 - 1), "has more than 89,478,485 pixels"),
    "a bomb in its profile": (png_with(b"iCCP", b"x\0\0" + ZEROS), "cannot be opened"),
    "a bomb in its text": (png_with(b"zTXt", b"x\0\0" + ZEROS), "(Decompressed data too large"),
    "a JPEG of ten thousand scans": (jpeg_of_scans(10_000), "has more than 200 scans"),
    "a PPM by another name": (picture(format="PPM"), "cannot be opened as an image"),
    "a JPEG XL by another name": (b"\xff\x0a" + bytes(60), "it begins like a JPEG XL image"),
    "a script": (b"%!PS-Adobe-3.0 EPSF-3.0\n(secret) run", "it begins like text"),
    "an SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "it begins like an SVG drawing"),
}


def test_every_bad_picture_is_named_in_one_message(tmp_path, recwarn):
    files = {f"{name}.png": content for name, (content, _) in REFUSED.items()}
    path = make_zip(tmp_path / "set.zip", {"good.png": picture()} | files)
    with watched(tmp_path / "own"):
        problems = problems_of(path)
    assert len(problems) == len(REFUSED)
    for name, (_, complaint) in REFUSED.items():
        (line,) = [line for line in problems if line.startswith(f"set.zip: {name}.png: ")]
        assert complaint in line
    assert not [each for each in recwarn if each.category is Image.DecompressionBombWarning]


def test_bad_pictures_are_skipped_and_counted_where_asked(tmp_path, caplog):
    files = {f"{name}.png": content for name, (content, _) in REFUSED.items()}
    path = make_zip(tmp_path / "set.zip", {"a.png": picture(), "z.png": picture()} | files)
    examples = read_dataset(path, "TOK", "<zwx>", skip_bad_images=True)
    assert [example.name for example in examples] == ["a.png", "z.png"]
    assert f"set.zip: {len(REFUSED)} of {len(REFUSED) + 2} images are skipped:" in caplog.text
    for name, (_, complaint) in REFUSED.items():
        assert f"{name}.png: " in caplog.text and complaint in caplog.text


def test_skipping_leaves_something_to_learn_from_or_fails(tmp_path):
    path = make_zip(tmp_path / "set.zip", {"a.png": b"", "b.png": picture(1, 1)})
    with pytest.raises(DatasetError) as caught:
        read_dataset(path, "TOK", "<zwx>", skip_bad_images=True)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and lines[2] == "set.zip: contains no usable image"


def test_skipping_pictures_forgives_nothing_else(tmp_path):
    files = {"a.png": picture(), "a.txt": b"\0", "b.png": b"", "../c.png": picture()}
    with pytest.raises(DatasetError) as caught:
        read_dataset(make_zip(tmp_path / "set.zip", files), "TOK", "<zwx>", skip_bad_images=True)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[1] for line in lines] == ["../c.png", "a.txt"]


def test_the_subject_has_to_be_in_a_caption_of_a_picture_that_is_left(tmp_path):
    files = {"a.png": picture(), "a.txt": b"a tree", "b.png": b"", "b.txt": b"TOK"}
    with pytest.raises(DatasetError, match="none of the 1 captions mentions the subject"):
        read_dataset(make_zip(tmp_path / "set.zip", files), "", "<zwx>", skip_bad_images=True)


@pytest.mark.parametrize("format", ["JPEG", "progressive JPEG", "PNG", "WEBP"])
def test_a_picture_that_was_cut_anywhere_is_refused(tmp_path, format):
    progressive = {"progressive": True} if format.startswith("progressive") else {}
    whole = encoded(Image.fromarray(photographs.chelsea()), format.split()[-1], **progressive)
    path = tmp_path / "set.zip"
    # The last bytes may be missing: all pixels are there before JPEG's and PNG's end marks.
    for length in random.Random(0).sample(range(len(whole) - 100), 12):
        make_zip(path, {"a.png": whole[:length]})
        (problem,) = problems_of(path)
        assert problem.startswith("set.zip: a.png: ")
        assert "is truncated or damaged" in problem or "cannot be opened" in problem


@pytest.mark.parametrize("progressive", [False, True], ids=["baseline", "progressive"])
def test_a_damaged_jpeg_is_refused_where_decoding_it_whole_fails(progressive):
    """It is checked at an eighth of its size; what passes there has to pass in the training."""
    photo = Image.fromarray(photographs.chelsea()).crop((0, 0, 203, 131))
    whole, chance = encoded(photo, "JPEG", progressive=progressive), random.Random(0)
    outcomes = set()
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 1, 20))):
            damaged[chance.randrange(2, len(damaged))] = chance.randrange(256)
        try:
            found = check(bytes(damaged))
        except Unusable:
            found = None
        try:
            with open_image(bytes(damaged)) as image:
                size = upright_srgb(image)[0].size
        except Exception:
            size = None
        assert (found and (found.width, found.height)) == size
        outcomes.add(size)
    assert {None, (203, 131)} <= outcomes


@pytest.mark.parametrize("size", [(200, 130), (131, 130), (130, 130)])
def test_the_sizes_of_a_jpeg_on_its_side_are_told_apart(size):
    """Of 131 and 130 pixels an eighth is the same."""
    exif = Image.Exif()
    for exif[0x0112] in range(1, 9):
        found = check(picture(*size, format="JPEG", exif=exif))
        upright = size if exif[0x0112] < 5 else size[::-1]
        assert (found.width, found.height) == upright


def test_a_strip_of_scans_within_reason_is_read(tmp_path):
    image = first_image(tmp_path, picture(512, 512, format="JPEG", progressive=True), "a.jpg")
    assert image.size == (512, 512)


# ---- The picture a prediction starts from --------------------------------------------------------

NOT_REFUSED = {"one pixel", "a strip"}  # the request's own size counts there


@pytest.mark.parametrize("name", sorted(REFUSED.keys() - NOT_REFUSED))
def test_a_prediction_refuses_the_same_pictures(tmp_path, name):
    path = tmp_path / "image.png"
    path.write_bytes(REFUSED[name][0])
    with watched(tmp_path / "own"), pytest.raises(BrokenImage, match="^image image.png"):
        read_image(path)


@pytest.mark.parametrize("name", WIDE)
def test_a_prediction_sees_the_colours_that_a_training_sees(tmp_path, name):
    content = picture(color=(180, 100, 90), icc_profile=icc_profile(name))
    path = tmp_path / "image.png"
    path.write_bytes(content)
    assert np.array_equal(np.asarray(read_image(path)), np.asarray(first_image(tmp_path, content)))
