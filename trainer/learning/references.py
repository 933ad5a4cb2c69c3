"""Reference images of pairs: encoded once, and used beside the rows of a batch.

Latents and features of the vision encoder are on disk, as those of images
(`trainer.learning.features`). Shapes: B images, C latent channels, H and W latent rows and columns.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from PIL import ImageOps
from torch import Tensor

from families.family import Family
from families.references import References
from families.transfer import onto
from inference.progress import Progress
from trainer.data import Example
from trainer.learning.mapped_tensors import Tensors

Key = tuple[tuple[str, ...], bool]  # names of the control images, and whether they are mirrored
WHAT = "control images"


@torch.no_grad()
def encode_controls(
    family: Family,
    examples: Sequence[Example],
    mirrored: Sequence[bool] = (False,),
    advance: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[Key, References]:
    """The encoded control images of all examples that have some, memory-mapped on the CPU.

    Each is encoded in its own aspect ratio and at the size of inference. `advance` is called with
    the phase, the number of pairs encoded and their total. Raises `NoSpace` if the disk is full.
    """
    controls = {_names(each): each.controls for each in examples if each.controls}
    keys = [(names, side) for names in controls for side in mirrored]
    tensors, found = Tensors[tuple[Key, str, int]](WHAT), dict[Key, References]()
    with Progress(
        total=len(keys), desc=f"encoding {WHAT}", unit="pair", disable=not keys
    ) as progress:
        for names, side in keys:
            images = [each.image() for each in controls[names]]
            images = [ImageOps.mirror(each) if side else each for each in images]
            encoded = found[names, side] = family.encode_references(images)
            for kind in ("latents", "features"):
                for number, each in enumerate(getattr(encoded, kind)):
                    tensors.add(((names, side), kind, number), each)
            found[names, side] = replace(encoded, latents=(), features=())
            progress.update()
            advance(f"encoding {WHAT}", int(progress.n), len(keys))
    mapped = tensors.mapped()

    def kept(key: Key, kind: str) -> tuple[Tensor, ...]:
        return tuple(mapped[key, kind, number] for number in range(len(key[0])))

    return {
        key: replace(each, latents=kept(key, "latents"), features=kept(key, "features"))
        for key, each in found.items()
    }


def _names(example: Example) -> tuple[str, ...]:
    return tuple(each.name for each in example.controls)


def controls_in(
    encoded: Mapping[Key, References], example: Example, mirrored: bool
) -> References | None:
    """The control images of an example among those of `encode_controls`; None if it has none."""
    return encoded.get((_names(example), mirrored))


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

    references: of each row. Rows with the same ones are computed together.
    """
    if not references:
        return family.velocity(latents_BCHW, sigma_B, text)
    rows_of: dict[str, list[int]] = {}
    for row, each in enumerate(references):
        rows_of.setdefault(each.digest, []).append(row)
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
