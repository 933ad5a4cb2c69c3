"""The part of a family that edits images: how its editing models read reference images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, cast

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from families.family import Family
    from families.references import References

IMAGE_SLOT = "<|image_pad|>"  # the token in whose place the text encoder gets an image's features


@dataclass(frozen=True)
class ReferenceFormat:
    """How the editing models of a family read reference images, as their pipeline does."""

    text: str  # of each image, before the prompt: {} is its number, and `IMAGE_SLOT` its place
    between: str = ""  # two of these texts
    # Pixels of an image for the text encoder; None: it gets the same image as the VAE.
    seen_pixels: int | None = None
    # The transformer gets an image's latents in place of its text features, which it never reads.
    latents_in_text: bool = False

    @property
    def name(self) -> str:
        """What a prompt calls an image: {} is its number."""
        return self.text.partition("<|vision_start|>")[0].rstrip(": ")


class Editing:
    """The methods of `Family` for bases with `Base.most_references`."""

    reference_format: ClassVar[ReferenceFormat | None] = None  # None: no model of it edits

    @cached_property
    def vision_encoder(self) -> Any:
        """The vision part of the text encoder, frozen, in `dtype`; loaded for reference images
        only, and released with the text encoder."""
        from families import components

        return components.load_vision_encoder(cast("Family", self))

    @cached_property
    def image_processor(self) -> Any:
        """Prepares images for `vision_encoder`, with the checkpoint's own sizes and limits."""
        from families import components

        return components.load_image_processor(cast("Family", self).base)

    def encode_references(self, images: Sequence[Image.Image]) -> References:
        """Upright images, encoded once for all passes."""
        from families.references import encode_references

        return encode_references(cast("Family", self), images)

    def encode_edit(
        self, prompt: str, references: References, vectors: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """text_LD of a prompt beside its reference images; `vectors` as in `encode_prompts`."""
        from families.references import encode_edit

        return encode_edit(cast("Family", self), prompt, references, vectors)

    def edit_velocity(
        self,
        latents_BCHW: Tensor,
        sigma_B: Tensor,
        text: Sequence[Tensor],
        references: References,
    ) -> Tensor:
        """`Family.velocity` beside reference images, the same for the whole batch; `text` is from
        `encode_edit`, with as many images."""
        raise NotImplementedError(f"{type(self).__name__} has no editing models")
