"""Reference images of editing models, as Qwen-Image-Edit-2509 and -2511 read them.

Each image is read twice: small, by the vision part of the text encoder, whose features stand in
the prompt; and large, by the VAE, whose latents stand behind the noisy ones in the transformer's
sequence. Sizes, words and order are those of diffusers' QwenImageEditPlusPipeline
(`pipelines/qwenimage`).

Tensor names carry their shape: B prompts, L tokens, D text features, S features of an image.
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

from families.text_features import embed
from families.tokens import PromptTokenizer, TokenizedPrompt
from families.transfer import onto

if TYPE_CHECKING:
    from families.family import Family

SEEN_PIXELS = 384 * 384  # of an image for the text encoder
LATENT_PIXELS = 1024 * 1024  # and for the VAE
SIDES = 32  # pixels: both sides are multiples of it
_SLOT = "<|image_pad|>"
_PICTURE = f"Picture {{}}: <|vision_start|>{_SLOT}<|vision_end|>"


@dataclass(frozen=True)
class References:
    """The reference images of a prompt, encoded."""

    latents: tuple[Tensor, ...]  # 1CHW float32 each, normalized
    features: tuple[Tensor, ...]  # SD each
    grids: tuple[tuple[int, int], ...]  # rows and columns of each image's features
    digest: str  # of the images' pixels


def encode_references(family: "Family", images: Sequence[Image.Image]) -> References:
    """As `Family.encode_references`."""
    images = [each.convert("RGB") for each in images]
    found = [_see(family, each) for each in images]
    digest = hashlib.sha256()
    for each in images:
        digest.update(repr(each.size).encode() + each.tobytes())
    return References(
        latents=tuple(family.encode_images(_pixels(each))[0] for each in images),
        features=tuple(features_SD for features_SD, _ in found),
        grids=tuple(grid for _, grid in found),
        digest=digest.hexdigest(),
    )


def size_near(pixels: int, image: Image.Image) -> tuple[int, int]:
    """Width and height of about so many pixels, in the image's aspect ratio."""
    width = math.sqrt(pixels * image.width / image.height)
    height = width * image.height / image.width
    across, down = (max(1, round(side / SIDES)) * SIDES for side in (width, height))
    return across, down


def _pixels(image: Image.Image) -> Tensor:
    """Pixels 13PP in [-1, 1] for the VAE."""
    scaled = image.resize(size_near(LATENT_PIXELS, image), Image.Resampling.LANCZOS)
    levels = torch.from_numpy(numpy.array(scaled)).permute(2, 0, 1)
    return (levels.float() / 127.5 - 1).unsqueeze(0)


def _see(family: "Family", image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
    """features_SD of the text encoder's vision part, and their rows and columns."""
    from transformers import Qwen2VLImageProcessorPil

    eye = family.text_encoder.visual
    merge = eye.spatial_merge_size
    processor: Any = Qwen2VLImageProcessorPil(patch_size=eye.patch_size, merge_size=merge)
    scaled = image.resize(size_near(SEEN_PIXELS, image), Image.Resampling.LANCZOS)
    made = processor(images=[scaled], return_tensors="pt")
    patches, grid = made["pixel_values"].to(family.dtype), made["image_grid_thw"]
    seen = eye(onto(family.device, patches), grid_thw=onto(family.device, grid))
    _, rows, columns = grid[0].tolist()
    return seen.pooler_output, (rows // merge, columns // merge)


def encode_edit(
    family: "Family",
    prompt: str,
    references: References,
    vectors: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """As `Family.encode_edit`; at most `Family.max_text_tokens` tokens of the prompt are read."""
    vectors = vectors or {}
    tokenizer = family.prompts.tokenizer
    pictures = "".join(_PICTURE.format(k + 1) for k in range(len(references.grids)))
    template = family.prompts.template.replace("{}", f"{pictures}{{}}")
    counts = {token: len(rows) for token, rows in vectors.items()}
    slot = tokenizer.get_added_vocab()[_SLOT]
    tokenized = PromptTokenizer(tokenizer, template).tokenize(prompt, counts)
    tokenized = _with_slots(tokenized, slot, [rows * columns for rows, columns in references.grids])
    limit = min(len(tokenized.ids), tokenized.template_length + family.max_text_tokens)
    slots_L = torch.tensor(tokenized.ids[:limit]) == slot
    embeds_1LD = embed(family, [tokenized], [limit], vectors)
    features_SD = torch.cat(references.features).to(embeds_1LD)
    at_S1 = onto(family.device, slots_L.nonzero())
    embeds_1LD = embeds_1LD.index_put((torch.zeros_like(at_S1[:, 0]), at_S1[:, 0]), features_SD)
    hidden_1LD = family.text_encoder(
        inputs_embeds=embeds_1LD,
        position_ids=onto(family.device, positions(slots_L, references.grids)),
        use_cache=False,
    ).last_hidden_state
    first = family._first_feature(family.tokenize(""))  # the images are in the user's turn
    return hidden_1LD[0, first:]


def _with_slots(prompt: TokenizedPrompt, slot: int, counts: Sequence[int]) -> TokenizedPrompt:
    """The prompt with so many slots in place of the one slot of each image, all before its text."""
    left, ids = iter(counts), list[int]()
    for each in prompt.ids:
        ids += [each] * (next(left) if each == slot else 1)
    more = len(ids) - len(prompt.ids)
    return replace(
        prompt,
        ids=tuple(ids),
        new=tuple((column + more, token, index) for column, token, index in prompt.new),
        template_length=prompt.template_length + more,
        prompt_end=prompt.prompt_end + more,
    )


def positions(slots_L: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
    """Position ids [3, 1, L] (frame, row, column) of a text with slots of images.

    A token steps by one on all three axes. An image keeps the frame, counts rows and columns from
    there, and the text goes on after the longer of them (`Qwen2_5_VLModel.get_rope_index`, which
    QwenImageEditPlusPipeline relied on; with transformers 5 it passes no `mm_token_type_ids`, and
    images lose their rows and columns).
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
