"""Reads a dataset: an archive or a folder of pictures and captions becomes checked examples.

Everything that can be wrong with it is found here, before any model is loaded, and reported
together. Archives come from strangers: nothing is ever extracted to disk, members are read into
memory one by one, and the limits below bound what a hostile one can cost. Knows nothing of
buckets, latents or tokenizers.
"""

import gzip
import io
import logging
import os
import re
import stat
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, cast

import numpy as np
from PIL import Image

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp"}
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
UNREAD_IMAGE_SUFFIXES = {".heic", ".heif", ".avif", ".jxl", ".gif", ".bmp", ".tif", ".tiff"}
JUNK_NAMES = {"__macosx", "thumbs.db", "desktop.ini"}

# Limits. LoRA datasets have tens to hundreds of pictures; these are far above, and small enough
# that the worst archive within them costs minutes and a few GB, not the machine.
MAX_MEMBERS = 10_000  # files and folders in the archive, skipped ones included
MAX_TOTAL_BYTES = 2 << 30  # unpacked, all members; pictures stay in memory until encoded
MAX_MEMBER_BYTES = 256 << 20  # unpacked, one picture
MAX_CAPTION_BYTES = 64 << 10  # many times what a text encoder reads
MAX_PACKING_RATIO = 100  # unpacked / packed; photographs hardly shrink at all
RATIO_FREE_BYTES = 1 << 20  # small members may be packed better: plain drawings, blank text
MAX_NAME_LENGTH = 1000  # characters
MAX_READ_BYTES = 4 << 20  # one read by a parser; a zip directory of MAX_MEMBERS needs half
MAX_IMAGE_PIXELS = 89_478_485  # where Pillow begins to suspect a decompression bomb
MAX_TOTAL_PIXELS = 30_000_000_000  # 1,250 photos of 24 megapixels; minutes of decoding
MIN_SIDE = 8  # pixels; less is an icon or a tracking pixel, not a picture
MAX_ASPECT_RATIO = 8  # long / short; a centre crop would show an eighth of such a strip

# What a file with a misleading name turns out to be, from its first bytes.
SIGNATURES = (
    (re.compile(rb"\xff\xd8\xff"), "a JPEG image"),
    (re.compile(rb"\x89PNG"), "a PNG image"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "a WebP image"),
    (re.compile(rb"GIF8"), "a GIF image"),
    (re.compile(rb"BM"), "a BMP image"),
    (re.compile(rb"II\*\x00|MM\x00\*"), "a TIFF image"),
    (re.compile(rb"....ftyp(hei|hev|mif|msf)", re.DOTALL), "a HEIC image"),
    (re.compile(rb"....ftypavi[fs]", re.DOTALL), "an AVIF image"),
    (re.compile(rb"....ftyp", re.DOTALL), "a video"),
    (re.compile(rb"PK\x03\x04|PK\x05\x06"), "a zip archive"),
    (re.compile(rb"\x1f\x8b"), "a gzip archive"),
    (re.compile(rb"Rar!"), "a RAR archive"),
    (re.compile(rb"7z\xbc\xaf"), "a 7-Zip archive"),
    (re.compile(rb"BZh|\xfd7zXZ"), "a bzip2 or xz archive"),
    (re.compile(rb"\s*<(!doctype|html)", re.IGNORECASE), "a web page, so its download failed"),
    (re.compile(rb"version https://git-lfs"), "a Git LFS pointer, not the file itself"),
)

# EXIF 2.32, tag 0x0112: how the stored picture must be turned to stand upright.
EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Letters that would make TOK part of a longer word. Not \w: captions in Chinese or Japanese put
# no space around it.
_LETTER = r"[0-9A-Za-z_\u00C0-\u024F]"


class DatasetError(ValueError):
    """The dataset cannot be trained on. The message has one line per problem, all of them."""


@dataclass(frozen=True)
class Example:
    """One picture and its caption, checked."""

    name: str  # member name in the archive, printable; not a path to write to
    caption: str  # the subject's token is already in its place
    width: int  # pixels, upright
    height: int  # pixels, upright
    data: bytes = field(repr=False)  # the encoded file as it lay in the archive

    def image(self) -> Image.Image:
        """The picture, upright, RGB with 8 bits, alpha laid over white."""
        with Image.open(io.BytesIO(self.data), formats=IMAGE_FORMATS) as image:
            return _upright_rgb(image)


def read_dataset(
    archive: str | os.PathLike[str], default_caption: str, subject: str | None = None
) -> list[Example]:
    """The examples of a dataset, sorted by name.

    archive: a zip, tar or tar.gz file (told by its content, not its name) or a folder, flat or
        nested. Pictures are jpg, jpeg, png or webp; the caption of `a.jpg` is `a.txt` beside it.
    default_caption: for pictures without a caption file, or with an empty one.
    subject: the placeholder token in zero-prior mode. The word TOK and the token itself stand for
        it in captions. None in baseline mode, where captions stay as written.

    Raises DatasetError that lists every problem. What does no harm is logged as a warning.
    """
    path = Path(os.path.abspath(archive))  # so that a folder given as . has a name
    problems: list[str] = []
    files = _read_files(path, problems)
    images = {name: data for name, data in files.items() if _suffix(name) in IMAGE_SUFFIXES}
    if not images and not problems:
        problems.append(
            f"holds no picture that can be read ({_listed(sorted(files)) or 'it is empty'}); "
            "put JPEG, PNG or WebP pictures in it"
        )
    captions = _captions_by_stem(files, problems)

    examples, animated, silent = [], [], []
    pixels = 0
    for name, data in sorted(images.items()):
        caption = _one_line(default_caption)
        if _stem(name) in captions:
            caption_name, caption_data = captions[_stem(name)]
            try:
                caption = _caption_text(caption_data) or caption
            except _Unusable as error:
                problems.append(f"{caption_name}: {error}")
        if subject is not None:
            caption, mentions = _place(subject, caption)
            if not mentions:
                silent.append(name)

        try:
            width, height = _probe(data)
            pixels += width * height
            if pixels > MAX_TOTAL_PIXELS:
                problems.append(
                    f"holds more than {MAX_TOTAL_PIXELS:,} pixels up to {name}; "
                    "use fewer pictures or scale them down"
                )
                break
            image, moves = _decode(data)
        except _Unusable as error:
            problems.append(f"{name}: {error}")
            continue
        if moves:
            animated.append(name)
        examples.append(Example(name, caption, image.width, image.height, data))

    if images and len(silent) == len(images):
        problems.append(
            f"none of the {len(images)} captions mentions the subject; write TOK or {subject} "
            "where it belongs, in the caption files or in default_caption "
            "('a photo of TOK'), or train without a placeholder token"
        )
    if problems:
        # a.jpg and a.png share a.txt, whose problem is then found twice.
        lines = [f"{path.name}: {problem}" for problem in dict.fromkeys(problems)]
        raise DatasetError("\n".join(lines))

    _warn_left_out(path, files, captions)
    if animated:
        log.warning("%s: only the first frame is used of: %s", path.name, _listed(animated))
    if silent:
        log.warning(
            "%s: %d of %d captions do not mention the subject: %s",
            path.name,
            len(silent),
            len(examples),
            _listed(silent),
        )
    return examples


def name_subject(text: str, subject: str) -> str:
    """The text with the subject's token in place of every whole word TOK (case matters)."""
    return _place(subject, text)[0]


class _Unusable(Exception):
    """What is wrong with one member, and what to do; becomes one line of a DatasetError."""


# ---- Captions ------------------------------------------------------------------------------------


def _place(subject: str, text: str) -> tuple[str, bool]:
    """The text with the subject in place of TOK, and whether it mentions the subject at all."""
    # The token is looked for first, so that the TOK within a token such as <TOK> is left alone.
    pattern = f"{_whole(subject)}|{_whole('TOK')}"
    text, mentions = re.subn(pattern, lambda _: subject, text)
    return text, mentions > 0


def _whole(word: str) -> str:
    before = f"(?<!{_LETTER})" if re.match(_LETTER, word[:1]) else ""
    after = f"(?!{_LETTER})" if re.match(_LETTER, word[-1:]) else ""
    return before + re.escape(word) + after


def _captions_by_stem(files: dict[str, bytes], problems: list[str]) -> dict[str, tuple[str, bytes]]:
    """Caption files as (name, content), by folder and name without the suffix."""
    captions: dict[str, tuple[str, bytes]] = {}
    for name in sorted(files):
        if _suffix(name) != ".txt":
            continue
        if _stem(name) in captions:
            first, _ = captions[_stem(name)]
            problems.append(f"{name}: is a second caption beside {first}; remove one of them")
        captions[_stem(name)] = name, files[name]
    return captions


def _caption_text(data: bytes) -> str:
    """A caption file's text on one line; empty when there is none. Raises _Unusable."""
    if len(data) > MAX_CAPTION_BYTES:
        raise _Unusable(f"is longer than {MAX_CAPTION_BYTES:,} bytes; shorten this caption")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):  # Notepad's "Unicode"
        encodings = ["utf-16"]
    else:
        # Latin-1 knows every byte, so one of these always fits.
        encodings = ["utf-8-sig", "cp1252", "latin-1"]
    for encoding in encodings:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return _one_line(text)
        break
    raise _Unusable("is not text; save the caption as a UTF-8 text file")


def _one_line(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


# ---- Pictures ------------------------------------------------------------------------------------


def _probe(data: bytes) -> tuple[int, int]:
    """Width and height as the header states them, checked before any pixel is decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            width, height = image.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        width = height = MAX_IMAGE_PIXELS
    except Exception as error:  # hostile headers make Pillow raise whatever it trips over
        raise _Unusable(
            f"cannot be opened as a picture ({_what_is(data)}); "
            "export it again as JPEG, PNG or WebP, or remove it"
        ) from error
    if width * height > MAX_IMAGE_PIXELS:
        raise _Unusable(f"has more than {MAX_IMAGE_PIXELS:,} pixels; scale it down")
    if min(width, height) < MIN_SIDE:
        raise _Unusable(
            f"is {width}x{height} pixels, too small to learn from; "
            f"remove it or use one of {MIN_SIDE} pixels or more on each side"
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise _Unusable(
            f"is {width}x{height} pixels, more extreme than 1:{MAX_ASPECT_RATIO}; "
            "crop it around the subject"
        )
    return width, height


def _decode(data: bytes) -> tuple[Image.Image, bool]:
    """The whole picture as `Example.image` will give it, and whether it is an animation."""
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            # MPO is how phones store a photo with its depth map or a second view: not a film.
            moves = getattr(image, "is_animated", False) and image.format != "MPO"
            return _upright_rgb(image), moves
    except Exception as error:  # hostile pixels make Pillow raise whatever it trips over
        raise _Unusable(
            f"is truncated or damaged ({error}); export it again or remove it"
        ) from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION)
    except Exception:  # broken EXIF does no harm to the pixels
        orientation = None

    if image.mode.startswith("I"):  # 16-bit greyscale, which convert("RGB") would clip
        pixels_HW = np.asarray(image).astype(np.float32) / 257
        image = Image.fromarray(pixels_HW.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    image = image.convert("RGB")
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _what_is(data: bytes) -> str:
    if not data:
        return "it is empty, 0 bytes"
    for signature, what in SIGNATURES:
        if signature.match(data):
            return f"it begins like {what}"
    return "its content is unknown"


# ---- Archives and folders ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Member:
    name: str  # as it is written in the archive; a folder's ends with a slash
    size: int  # bytes, as the archive claims
    refusal: str | None  # why it must not be read
    open: Callable[[], IO[bytes]]


def _read_files(path: Path, problems: list[str]) -> dict[str, bytes]:
    """The files of an archive or folder by their cleaned names, without junk.

    Pictures and texts come with their content, of which at most one byte more than allowed; other
    files, which are never opened, with none.
    """
    files: dict[str, bytes] = {}
    total = 0
    try:
        for count, member in enumerate(_members(path), start=1):
            total += max(member.size, 0)
            if count > MAX_MEMBERS:
                raise _Unusable(f"holds more than {MAX_MEMBERS:,} files; use fewer pictures")
            if total > MAX_TOTAL_BYTES:
                raise _Unusable(
                    f"unpacks to more than {MAX_TOTAL_BYTES:,} bytes; "
                    "use fewer or smaller pictures and leave other files out"
                )
            name = _printable(member.name[:200])
            try:
                parts = _safe_parts(member.name)
                if member.name.endswith("/"):
                    continue
                if any(part.startswith(".") or part.lower() in JUNK_NAMES for part in parts):
                    continue
                name = _printable("/".join(parts))
                if member.refusal:
                    raise _Unusable(member.refusal)
                if name in files:
                    raise _Unusable("is in the archive twice; rename or remove one")
                files[name] = _read(member, _suffix(name))
            except _Unusable as error:
                problems.append(f"{name}: {error}")
    except _Unusable as error:
        problems.append(str(error))
    except Exception as error:  # hostile structures make the parsers raise whatever they trip over
        problems.append(f"is damaged or cut off ({error}); make or upload it again")
    return files


def _read(member: _Member, suffix: str) -> bytes:
    if suffix in IMAGE_SUFFIXES:
        limit = MAX_MEMBER_BYTES
        if member.size > limit:
            raise _Unusable(f"has more than {limit:,} bytes; save it smaller")
    elif suffix == ".txt":
        limit = MAX_CAPTION_BYTES + 1
    else:
        return b""
    data = bytearray()
    try:
        with member.open() as file:
            while chunk := file.read(min(1 << 20, limit - len(data))):
                data += chunk
    except Exception as error:
        raise _Unusable(f"cannot be read ({error}); pack the archive again") from error
    if len(data) < min(member.size, limit):
        raise _Unusable(f"is cut off ({len(data):,} of {member.size:,} bytes); pack it again")
    return bytes(data)


def _members(path: Path) -> Iterator[_Member]:
    if path.is_dir():
        yield from _folder_members(path)
        return
    if not path.exists():
        raise _Unusable("does not exist; give the path of a zip or tar file, or of a folder")
    if not path.is_file():
        raise _Unusable("is not a file; give the path of a zip or tar file, or of a folder")

    with path.open("rb", buffering=0) as raw:
        head = raw.read(tarfile.BLOCKSIZE)
        raw.seek(0)
        if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            yield from _zip_members(_BoundedReader(raw))
        elif head.startswith(b"\x1f\x8b"):
            # GzipFile is a buffered reader by type, and raw enough to be read through another.
            unpacked = cast(io.RawIOBase, gzip.GzipFile(fileobj=raw))
            yield from _tar_members(_BoundedReader(unpacked))
        elif _is_tar_header(head):
            yield from _tar_members(_BoundedReader(raw))
        else:
            raise _Unusable(
                f"is not a zip or tar file ({_what_is(head)}); pack the pictures in one"
            )


def _folder_members(folder: Path) -> Iterator[_Member]:
    for parent, subfolders, names in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            regular = path.is_file()
            yield _Member(
                path.relative_to(folder).as_posix(),
                path.stat().st_size if regular else 0,
                None if regular else "is not a file or leads nowhere; remove it",
                lambda path=path: path.open("rb"),  # type: ignore[misc]
            )


def _zip_members(file: "_BoundedReader") -> Iterator[_Member]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            yield _Member(
                info.filename,
                info.file_size,
                None if info.is_dir() else _zip_refusal(info),
                lambda info=info: archive.open(info),  # type: ignore[misc]
            )


def _zip_refusal(info: zipfile.ZipInfo) -> str | None:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        return "is a link or device; put the file itself in"
    if info.flag_bits & 0x1:
        return "is encrypted; pack the archive without a password"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is packed in an unusual way; pack the archive again as an ordinary zip"
    packed = max(info.compress_size, 1)
    if info.file_size > max(RATIO_FREE_BYTES, MAX_PACKING_RATIO * packed):
        return f"unpacks to {info.file_size:,} bytes from {packed:,}, as no picture does; remove it"
    return None


def _tar_members(file: "_BoundedReader") -> Iterator[_Member]:
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for info in archive:
            if info.size < 0:
                raise _Unusable("is damaged (a negative size); make or upload it again")
            plain = info.isdir() or (info.isreg() and not info.issparse())
            yield _Member(
                info.name + "/" if info.isdir() else info.name,
                info.size,
                None if plain else "is a link, device or sparse file; put the file itself in",
                lambda info=info: archive.extractfile(info),  # type: ignore[misc, arg-type]
            )
        # tarfile takes a broken header for the end. The true end is a block of zeros.
        file.seek(archive.offset)  # type: ignore[attr-defined]
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise _Unusable("is damaged or cut off (no end mark); make or upload it again")
        while file.read(MAX_READ_BYTES):  # lets gzip check its sum
            pass


def _is_tar_header(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return len(head) == tarfile.BLOCKSIZE and not any(head)
    return True


class _BoundedReader(io.BufferedReader):
    """Bounds each read and their sum, because parsers believe the sizes that headers claim."""

    def __init__(self, raw: io.RawIOBase) -> None:
        super().__init__(raw)
        self._taken = 0

    def read(self, size: int | None = -1, /) -> bytes:
        most = MAX_READ_BYTES + 1
        data = super().read(most if size is None or size < 0 else min(size, most))
        self._taken += len(data)
        if len(data) > MAX_READ_BYTES or self._taken > 2 * MAX_TOTAL_BYTES:
            raise _Unusable("has an oversized directory or header; pack the pictures again")
        return data


def _safe_parts(name: str) -> list[str]:
    """Folders and file name of a member. Raises _Unusable for names that lead elsewhere."""
    # Windows packs with backslashes; macOS writes é as two characters, others as one.
    name = unicodedata.normalize("NFC", name[: MAX_NAME_LENGTH + 1].replace("\\", "/"))
    if len(name) > MAX_NAME_LENGTH:
        raise _Unusable("has an overlong name; rename it")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or re.match("[A-Za-z]:/", name) or ".." in parts:
        raise _Unusable("has a path that leads out of the archive; pack it with plain names")
    return parts


def _printable(name: str) -> str:
    """Safe in logs and JSON: no line breaks, terminal codes, direction marks or half characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _listed(names: list[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _warn_left_out(
    path: Path, files: dict[str, bytes], captions: dict[str, tuple[str, bytes]]
) -> None:
    unread = sorted(name for name in files if _suffix(name) in UNREAD_IMAGE_SUFFIXES)
    if unread:
        log.warning(
            "%s: left out, because only JPEG, PNG and WebP are read: %s",
            path.name,
            _listed(unread),
        )
    stems = {_stem(name) for name in files if _suffix(name) in IMAGE_SUFFIXES}
    orphans = sorted(name for stem, (name, _) in captions.items() if stem not in stems)
    if orphans:
        log.warning("%s: captions without a picture: %s", path.name, _listed(orphans))
