"""Reference images of pairs: encoded once, and used beside the rows of a batch.

Latents and features of the vision encoder are on disk, as those of images
(`trainer.learning.features`). Shapes: B images, C latent channels, H and W latent rows and columns.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image, ImageOps
from torch import Tensor

from families.family import Family
from families.references import References
from families.transfer import onto
from inference.progress import Progress
from trainer.data import Bucket, Example, crop
from trainer.learning.mapped_tensors import Tensors

WHAT = "control images"
SAME_RATIO = 0.02  # difference of aspect ratios up to which a control image shows the same frame


@dataclass(frozen=True)
class ControlView:
    """The control images of an example as one of its training images needs them."""

    example: Example
    bucket: Bucket | None = None  # of the training image; None: the whole control images
    mirrored: bool = False
    shift: float = 0.0  # of the crop

    def images(self) -> list[Image.Image]:
        """The decoded control images."""
        images = []
        for control, box in zip(self.example.controls, self._boxes, strict=True):
            image = control.image(None)
            image = image if box is None else image.crop(box)
            images.append(ImageOps.mirror(image) if self.mirrored else image)
        return images

    @property
    def key(self) -> Hashable:
        """Equal for equal images."""
        return tuple(each.name for each in self.example.controls), self._boxes, self.mirrored

    @property
    def _boxes(self) -> tuple[tuple[int, int, int, int] | None, ...]:
        """The crop of each; None: the whole.

        A control image with the aspect ratio of its training image is cropped as that is, so that
        what the edit keeps stays in its place. Others show another frame and are never cropped.
        """
        width, height = self.example.width, self.example.height
        boxes: list[tuple[int, int, int, int] | None] = []
        for each in self.example.controls:
            across, down = each.width / width, each.height / height
            if self.bucket is None or abs(math.log(across / down)) > SAME_RATIO:
                boxes.append(None)
                continue
            left, top, right, bottom = crop(width, height, self.bucket, self.shift)
            box = round(left * across), round(top * down), round(right * across)
            whole = 0, 0, each.width, each.height
            boxes.append(None if (found := (*box, round(bottom * down))) == whole else found)
        return tuple(boxes)


@torch.no_grad()
def encode_controls(
    family: Family,
    views: Sequence[ControlView],
    advance: Callable[[str, int, int], None] = lambda *_: None,
) -> list[References | None]:
    """The encoded control images of each view, memory-mapped on the CPU; None if it has none.

    Each image keeps its aspect ratio and has the size of inference. `advance` is called with the
    phase, the number of pairs encoded and their total. Raises `NoSpace` if the disk is full.
    """
    different = {each.key: each for each in views if each.example.controls}
    tensors, found = Tensors[tuple[Hashable, str, int]](WHAT), dict[Hashable, References]()
    count = len(different)
    with Progress(total=count, desc=f"encoding {WHAT}", unit="pair", disable=not count) as progress:
        for key, view in different.items():
            encoded = family.encode_references(view.images())
            for kind in ("latents", "features"):
                for number, each in enumerate(getattr(encoded, kind)):
                    tensors.add((key, kind, number), each)
            found[key] = replace(encoded, latents=(), features=())
            progress.update()
            advance(f"encoding {WHAT}", int(progress.n), count)
    mapped = tensors.mapped()

    def kept(view: ControlView) -> References | None:
        if view.key not in found:
            return None
        latents, features = (
            tuple(mapped[view.key, kind, number] for number in range(len(view.example.controls)))
            for kind in ("latents", "features")
        )
        return replace(found[view.key], latents=latents, features=features)

    return [kept(each) for each in views]


def on_device(references: References, device: torch.device) -> References:
    """A copy whose tensors are on the device."""
    return replace(
        references,
        latents=tuple(onto(device, each) for each in references.latents),
        features=tuple(onto(device, each) for each in references.features),
    )


def velocity(
    family: Family,
    latents_BCHW: Tensor,
    sigma_B: Tensor,
    text: Sequence[Tensor],
    references: Sequence[References] = (),
) -> Tensor:
    """`Family.velocity`, with `references` that of an editing model, BCHW float32.

    references: of each row. Rows with the same ones are computed together; with a sharded model,
    which all processes must call equally often, each row alone.
    """
    if not references:
        return family.velocity(latents_BCHW, sigma_B, text)
    rows_of: dict[str | int, list[int]] = {}
    for row, each in enumerate(references):
        rows_of.setdefault(row if family.storage.shard else each.digest, []).append(row)
    found: dict[int, Tensor] = {}
    for rows in rows_of.values():
        own = references[rows[0]]
        latents = tuple(onto(family.device, each) for each in own.latents)
        answer = family.edit_velocity(
            torch.stack([latents_BCHW[row] for row in rows]),
            torch.stack([sigma_B[row] for row in rows]),
            [text[row] for row in rows],
            replace(own, latents=latents),
        )
        found |= dict(zip(rows, answer, strict=True))
    return torch.stack([found[row] for row in range(len(references))])
