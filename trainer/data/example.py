"""One image of a dataset with its captions, checked."""

from dataclasses import dataclass, field

from PIL import Image

from inference.image_decoding import open_image, upright_srgb
from trainer.data.mapped_file import Content
from trainer.data.measures import Measures


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
    mask_file: str = ""  # the name of its mask: white is the subject; empty if there is none
    mask: Content = field(default=b"", repr=False)  # the encoded file
    measures: Measures | None = None  # of its pixels; None: not decoded yet
    others: tuple[str, ...] = ()  # further captions, which take turns with the first

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions, those that count more first."""
        return self.caption, *self.others

    def image(self, at_least: tuple[int, int] | None = None) -> Image.Image:
        """The decoded image: upright, 8-bit sRGB, transparency over white.

        A JPEG may be decoded at a half, a quarter or an eighth of its size, if both sides are still
        at least `at_least` (width and height, upright), which is much faster.
        """
        with open_image(bytes(self.data)) as image:
            if at_least is not None:
                rotated = image.size != (self.width, self.height)
                image.draft(None, at_least[::-1] if rotated else at_least)
            return upright_srgb(image)[0]
