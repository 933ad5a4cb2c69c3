"""Reference images of editing models, read as in diffusers' pipelines (`families.editing`).

Each image is read twice: by the vision encoder, whose features stand in the prompt, and by the VAE,
whose latents stand in the transformer's sequence. Sizes, words and order are those of
QwenImageEditPlusPipeline (`pipelines/qwenimage`) and QwenImage21Pipeline (`pipelines/qwenimage21`).

Tensor names carry their shape: B prompts, L tokens, D text features, S features of an image, K
layers of features.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy
import torch
from PIL import Image
from torch import Tensor

from families.editing import IMAGE_SLOT, ReferenceFormat
from families.text_features import embed
from families.tokens import PromptTokenizer, TokenizedPrompt
from families.transfer import onto

if TYPE_CHECKING:
    from families.family import Family


@dataclass(frozen=True)
class References:
    """The reference images of a prompt, encoded."""

    latents: tuple[Tensor, ...]  # 1CHW float32 each, normalized
    # KSD each: the features of the vision encoder's last layer, then those of earlier ones, which
    # the text encoder adds after its first layers (DeepStack, arXiv 2406.04334).
    features: tuple[Tensor, ...]
    grids: tuple[tuple[int, int], ...]  # rows and columns of each image's features
    digest: str  # of the images' pixels and the size at which they are read
    # Text features before each image; empty if the images are not at places of the text
    # (`ReferenceFormat.latents_in_text`).
    places: tuple[int, ...] = ()


def encode_references(family: "Family", images: Sequence[Image.Image]) -> References:
    """As `Family.encode_references`."""
    seen_pixels, edge = _format(family).seen_pixels, family.base.reference_resolution
    digest, latents, features, grids = hashlib.sha256(repr(edge).encode()), [], [], []
    for image in images:
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        image = image if family.base.alpha_channel else _over_white(image)
        digest.update(repr((image.size, image.mode)).encode() + image.tobytes())
        scaled = _resized(image, edge**2, family.resolution_multiple)
        latents.append(family.encode_images(_pixels(scaled))[0])
        if seen_pixels is not None:
            scaled = _resized(image, seen_pixels, family.resolution_multiple)
        features_KSD, grid = _see(family, _over_white(scaled))
        features.append(features_KSD)
        grids.append(grid)
    return References(
        latents=tuple(latents),
        features=tuple(features),
        grids=tuple(grids),
        digest=digest.hexdigest(),
        places=_places(family, grids) if _format(family).latents_in_text else (),
    )


def size_near(pixels: int, size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Width and height of about so many pixels, in the aspect ratio of that width and height."""
    width = math.sqrt(pixels * size[0] / size[1])
    height = width * size[1] / size[0]
    across, down = (max(1, round(side / multiple)) * multiple for side in (width, height))
    return across, down


def _resized(image: Image.Image, pixels: int, multiple: int) -> Image.Image:
    return image.resize(size_near(pixels, image.size, multiple), Image.Resampling.LANCZOS)


def _over_white(image: Image.Image) -> Image.Image:
    """The image in RGB. Only a VAE with an alpha channel gets an image's transparency."""
    if image.mode != "RGBA":
        return image
    whole = Image.new("RGB", image.size, "white")
    whole.paste(image, mask=image.getchannel("A"))
    return whole


def _pixels(image: Image.Image) -> Tensor:
    """Pixels 13PP in [-1, 1] for the VAE, or 14PP with transparency."""
    levels = torch.from_numpy(numpy.array(image)).permute(2, 0, 1)
    return (levels.float() / 127.5 - 1).unsqueeze(0)


def _see(family: "Family", image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
    """features_KSD of the vision encoder, and their rows and columns."""
    eye, merge = family.vision_encoder, family.vision_encoder.spatial_merge_size
    made = family.image_processor(images=[image], return_tensors="pt")
    patches, grid = made["pixel_values"].to(family.dtype), made["image_grid_thw"]
    seen = eye(onto(family.device, patches), grid_thw=onto(family.device, grid))
    _, rows, columns = grid[0].tolist()
    layers = (seen.pooler_output, *getattr(seen, "deepstack_features", ()))
    return torch.stack(layers), (rows // merge, columns // merge)


def encode_edit(
    family: "Family",
    prompt: str,
    references: References,
    vectors: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """As `Family.encode_edit`; at most `Family.max_text_tokens` tokens of the prompt are read."""
    vectors = vectors or {}
    tokenized = _tokenized(family, prompt, references.grids, vectors)
    limit = min(len(tokenized.ids), tokenized.template_length + family.max_text_tokens)
    slots_L = _slots(family, tokenized)[:limit]
    at_S = onto(family.device, slots_L.nonzero()[:, 0])
    features_KSD = torch.cat(references.features, dim=1).to(family.dtype)
    embeds_1LD = embed(family, [tokenized], [limit], vectors)
    embeds_1LD = embeds_1LD.index_put((torch.zeros_like(at_S), at_S), features_KSD[0])
    deep: dict[str, Any] = {}
    if len(features_KSD) > 1:
        deep["visual_pos_masks"] = onto(family.device, slots_L.unsqueeze(0))
        deep["deepstack_visual_embeds"] = list(features_KSD[1:])
    hidden_1LD = family.text_encoder(
        inputs_embeds=embeds_1LD,
        position_ids=onto(family.device, positions(slots_L, references.grids)),
        use_cache=False,
        **deep,
    ).last_hidden_state
    kept_L = torch.ones_like(slots_L) if not references.places else ~slots_L
    kept_L[: _first(family)] = False
    return hidden_1LD[0].index_select(0, onto(family.device, kept_L.nonzero()[:, 0]))


def _format(family: "Family") -> ReferenceFormat:
    assert family.reference_format is not None, f"{family.base.name} does not edit"
    return family.reference_format


def _first(family: "Family") -> int:
    """The first feature that is kept; the images are after it, in the user's turn."""
    return family._first_feature(family.tokenize(""))


def _places(family: "Family", grids: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Text features before each image, without the slots of other images."""
    slots = _slots(family, _tokenized(family, "", grids, {})).tolist()
    starts = [k for k, each in enumerate(slots) if each and not slots[k - 1]]
    return tuple(start - sum(slots[:start]) - _first(family) for start in starts)


def _slots(family: "Family", tokenized: TokenizedPrompt) -> Tensor:
    """Whether each id is a slot of an image."""
    slot = family.prompts.tokenizer.get_added_vocab()[IMAGE_SLOT]
    return torch.tensor(tokenized.ids) == slot


def _tokenized(
    family: "Family",
    prompt: str,
    grids: Sequence[tuple[int, int]],
    vectors: Mapping[str, Tensor],
) -> TokenizedPrompt:
    """The prompt after the images, each of which has a slot for each of its features."""
    tokenizer, form = family.prompts.tokenizer, _format(family)
    images = form.between.join(form.text.format(k + 1) for k in range(len(grids)))
    template = family.prompts.template.replace("{}", f"{images}{{}}")
    counts = {token: len(rows) for token, rows in vectors.items()}
    slot = tokenizer.get_added_vocab()[IMAGE_SLOT]
    found = PromptTokenizer(tokenizer, template).tokenize(prompt, counts)
    left, ids = iter(grids), list[int]()
    for each in found.ids:
        ids += [each] * (math.prod(next(left)) if each == slot else 1)
    more = len(ids) - len(found.ids)
    return replace(
        found,
        ids=tuple(ids),
        new=tuple((column + more, token, index) for column, token, index in found.new),
        template_length=found.template_length + more,
        prompt_end=found.prompt_end + more,
    )


def positions(slots_L: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
    """Position ids [3, 1, L] (frame, row, column) of a text with slots of images.

    A token steps by one on all three axes. An image keeps the frame, counts rows and columns from
    there, and the text goes on after the longer of them (`get_rope_index` of Qwen2_5_VLModel and
    Qwen3VLModel, which the pipelines rely on; QwenImageEditPlusPipeline passes no
    `mm_token_type_ids` to transformers 5, and images lose their rows and columns).
    """
    parts, at, left = [], 0, iter(grids)
    ids, index = slots_L.tolist(), 0
    while index < len(ids):
        if not ids[index]:
            parts.append(torch.full((3, 1), at))
            at, index = at + 1, index + 1
            continue
        rows, columns = next(left)
        row = torch.arange(rows).repeat_interleave(columns)
        column = torch.arange(columns).repeat(rows)
        parts.append(torch.stack((torch.zeros_like(row), row, column)) + at)
        at, index = at + max(rows, columns), index + rows * columns
    return torch.cat(parts, dim=1).unsqueeze(1)
