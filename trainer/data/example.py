"""One image of a dataset with its captions, checked."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from PIL import Image

from inference.image_decoding import open_image, upright_alpha, upright_srgb
from trainer.data.mapped_file import Content
from trainer.data.measures import Measures


@dataclass(frozen=True)
class Control:
    """An image before the edit, checked: a reference image of an editing model."""

    name: str  # member name in the archive
    width: int  # pixels, upright
    height: int  # pixels, upright
    data: Content = field(repr=False)  # the encoded file

    def image(self, background: str | None = "white") -> Image.Image:
        """The decoded image: upright, 8-bit sRGB, transparency over the background or kept (None),
        as a model gets it."""
        with open_image(bytes(self.data)) as image:
            return upright_srgb(image, background)[0]


@dataclass(frozen=True)
class Example:
    """A checked image with its caption."""

    name: str  # member name in the archive, printable; not a path to write to
    caption: str  # with the subject's token
    width: int  # pixels, upright
    height: int  # pixels, upright
    data: Content = field(repr=False)  # the encoded file
    caption_file: str = ""  # its name, or its folder's with a slash; empty for default_caption
    repeats: int = 1  # how often it is used, relative to others: 10 in a folder `10_robot`
    # The name of the mask that is used: its own for its transparency, empty if there is none.
    mask_file: str = ""
    mask: Content = field(default=b"", repr=False)  # the encoded file
    measures: Measures | None = None  # of its pixels; None: not decoded yet
    others: tuple[str, ...] = ()  # further captions, which take turns with the first
    controls: tuple[Control, ...] = ()  # before the edit that the caption asks for, in order
    transparent: bool = False  # some of its pixels are

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions, those that count more first."""
        return self.caption, *self.others

    def image(
        self, at_least: tuple[int, int] | None = None, background: str | None = "white"
    ) -> Image.Image:
        """The decoded image: upright, 8-bit sRGB, transparency over the background or kept (None).

        A JPEG may be decoded at a half, a quarter or an eighth of its size, if both sides are still
        at least `at_least` (width and height, upright), which is much faster.
        """
        with open_image(bytes(self.data)) as image:
            if at_least is not None:
                rotated = image.size != (self.width, self.height)
                image.draft(None, at_least[::-1] if rotated else at_least)
            return upright_srgb(image, background)[0]

    def mask_image(self) -> Image.Image:
        """The decoded mask, in mode L: white is trained on. Only if there is one."""
        return decode_mask(self.mask, transparency=self.mask_file == self.name)


def decode_mask(data: Content, transparency: bool) -> Image.Image:
    """A mask, upright, in mode L: the luminance of an image file, over black, or its transparency.

    An image without transparency is opaque: white. Pillow may raise any exception on malformed
    images: catch `Exception`.
    """
    with open_image(bytes(data)) as image:
        if not transparency:
            return upright_srgb(image, "black")[0].convert("L")
        alpha = upright_alpha(image)
        return Image.new("L", image.size, 255) if alpha is None else alpha


def own_captions(examples: Sequence[Example]) -> list[Example]:
    """The examples with captions of files alone: empty instead of `default_caption` or the name of
    a folder."""
    return [
        each
        if each.caption_file and each.caption_file[-1] != "/"
        else replace(each, caption="", others=())
        for each in examples
    ]
