"""Qwen-Image-2.1's text encoder and transformer for a batch of prompts of different lengths.

The same weights and math as the classes' own, which take prompts of one length and rebuild masks
and rotary tables at each call. Texts are padded on the right, masked, and the image keeps the
position that it has without padding. A test checks that the results are equal.

B batch, C channels, H rows, W columns of latents; L text tokens, N image tokens, S tokens of the
sequence; D width, K head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2Tokenizer

from miniature.models import TextEncoder, Transformer
from miniature.qwen.models import VISION_MERGE, VISION_PATCH

# QwenImage21Pipeline's, word for word: the system turn, of which no features are kept; the user's
# turn; and what it has for a reference image.
SYSTEM = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"
USER = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
REFERENCE = "<image1><|vision_start|><|image_pad|><|vision_end|>"
SLOT = "<|image_pad|>"
TEXT_LENGTH = 32  # tokens of a user's turn in training; longer ones are padded to a multiple


@dataclass(frozen=True)
class Ids:
    """Token ids [B, L] of users' turns, right-padded, and their lengths [B]. With references, the
    slots' ids are not among them: the image comes after the first `place` tokens."""

    ids_BL: Tensor
    length_B: Tensor
    place: int | None = None

    def to(self, device: torch.device) -> "Ids":
        return replace(self, ids_BL=self.ids_BL.to(device), length_B=self.length_B.to(device))


@dataclass(frozen=True)
class Text:
    """Features [B, L, D] of `Ids`."""

    text_BLD: Tensor
    length_B: Tensor
    place: int | None = None

    @property
    def mask_BL(self) -> Tensor:
        """True for real tokens."""
        numbers = torch.arange(self.text_BLD.shape[1], device=self.text_BLD.device)
        return numbers < self.length_B[:, None]


def tokenize(tokenizer: Qwen2Tokenizer, prompts: Sequence[str], edits: bool = False) -> Ids:
    """Users' turns; with `edits`, each has a reference image. An empty prompt is a space."""
    texts = [USER.format((REFERENCE if edits else "") + (each or " ")) for each in prompts]
    rows, place = tokenizer(texts, padding=False).input_ids, None
    if edits:
        slot = tokenizer.convert_tokens_to_ids(SLOT)
        place = rows[0].index(slot)
        rows = [[each for each in row if each != slot] for row in rows]
    longest = max(len(row) for row in rows)
    width = -(-longest // TEXT_LENGTH) * TEXT_LENGTH
    pad = tokenizer.pad_token_id
    ids_BL = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    return Ids(ids_BL, torch.tensor([len(row) for row in rows]), place)


def vision_patches(pixels_BCHW: Tensor) -> Tensor:
    """What the image processor makes of pixels in [-1, 1]: [B * patches, values], in groups of the
    patches that are merged, each as two equal frames."""
    patch, merge = VISION_PATCH, VISION_MERGE
    height, width = (side // (patch * merge) for side in pixels_BCHW.shape[2:])
    x = pixels_BCHW.reshape(len(pixels_BCHW), 3, height, merge, patch, width, merge, patch)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None].expand(
        *(-1,) * 6, 2, patch, patch
    )
    return x.flatten(5).flatten(0, 4)


def encode(
    encoder: TextEncoder, system_L: Tensor, ids: Ids, pixels_BCHW: Tensor | None = None
) -> Text:
    """Features before the last norm, as the pipeline takes them, without the system turn.

    The system turn is encoded once for the batch, since text is causal. `pixels_BCHW` are the
    reference images of prompts that have one.
    """
    reader = encoder.model.language_model
    batch, start = len(ids.ids_BL), len(system_L)
    cache = reader(input_ids=system_L[None], use_cache=True).past_key_values
    for layer in cache.layers:
        layer.keys, layer.values = (
            each.expand(batch, -1, -1, -1) for each in (layer.keys, layer.values)
        )
    embeds_BLD = reader.embed_tokens(ids.ids_BL)
    positions_BL = torch.arange(ids.ids_BL.shape[1], device=embeds_BLD.device).expand(batch, -1)
    positions_3BL, deep = positions_BL.expand(3, -1, -1), dict[str, Any]()
    if ids.place is not None:
        assert pixels_BCHW is not None
        rows, columns = (s // VISION_PATCH // VISION_MERGE for s in pixels_BCHW.shape[2:])
        grid = torch.tensor([[1, rows * VISION_MERGE, columns * VISION_MERGE]] * batch)
        seen = encoder.model.visual(
            vision_patches(pixels_BCHW).to(encoder.dtype), grid_thw=grid.to(embeds_BLD.device)
        )
        slots, place = rows * columns, ids.place
        embeds_BLD = torch.cat(
            [embeds_BLD[:, :place], seen.pooler_output.view(batch, slots, -1).to(embeds_BLD.dtype),
             embeds_BLD[:, place:]], dim=1,
        )  # fmt: skip
        # A token steps by one on all axes (frame, row, column); an image keeps the frame.
        row, column = (each.flatten() for each in torch.meshgrid(
            torch.arange(rows), torch.arange(columns), indexing="ij"))  # fmt: skip
        image_3S = place + torch.stack((torch.zeros_like(row), row, column))
        image_3BS = image_3S[:, None].expand(-1, batch, -1).to(embeds_BLD.device)
        positions_3BL = torch.cat(
            [positions_3BL[..., :place], image_3BS,
             positions_3BL[..., place:] + max(rows, columns)], dim=-1,
        )  # fmt: skip
        at = torch.zeros(batch, embeds_BLD.shape[1], dtype=torch.bool, device=embeds_BLD.device)
        at[:, place : place + slots] = True
        deep = {"visual_pos_masks": at, "deepstack_visual_embeds": seen.deepstack_features}
    norm, reader.norm = reader.norm, torch.nn.Identity()
    try:
        text_BLD = reader(
            inputs_embeds=embeds_BLD, position_ids=positions_3BL + start, past_key_values=cache,
            use_cache=True, **deep,
        ).last_hidden_state  # fmt: skip
    finally:
        reader.norm = norm
    if ids.place is not None:
        text_BLD = torch.cat([text_BLD[:, :place], text_BLD[:, place + slots :]], dim=1)
    return Text(text_BLD, ids.length_B, ids.place)


@cache
def _layout(
    length: int, place: int | None, rows: int, columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the sequence, with a row and column of 0 for text: position [3, S] on the axes without
    the target's frame, the image of each token (-1: text), and the text token's number."""
    row = torch.arange(rows).repeat_interleave(columns) - (rows - rows // 2)
    column = torch.arange(columns).repeat(rows) - (columns - columns // 2)
    image_3N = torch.stack((torch.zeros_like(row), row, column))
    text = torch.arange(length)
    parts = [(text[:place], 0)] if place is not None else [(text, 0)]
    positions, images, numbers = [], [], []

    def add_text(part: Tensor, step: int) -> None:
        positions.append((part + step).expand(3, -1))
        images.append(torch.full_like(part, -1))
        numbers.append(part)

    def add_image(frame: int, number: int) -> None:
        positions.append(image_3N + torch.tensor([[frame], [0], [0]]))
        images.append(torch.full_like(row, number))
        numbers.append(torch.full_like(row, -1))

    for part, step in parts:
        add_text(part, step)
    if place is not None:
        add_image(place, 0)
        add_text(text[place:], max(rows, columns))
    add_image(0, 1)
    return torch.cat(positions, dim=1), torch.cat(images), torch.cat(numbers)


def _rotate(x_BSNK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates neighboring pairs, as the complex product in diffusers does."""
    even, odd = x_BSNK.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(x_BSNK.dtype)


def batched_forward(
    model: Transformer,
    latents_BCHW: Tensor,
    sigma_B: Tensor,
    text_BLD: Tensor,
    length_B: Tensor,
    place: int | None = None,
    reference_BCHW: Tensor | None = None,
) -> Tensor:
    """The velocity noise - x0 as [B, C, H, W]. Arguments as in `Text`; `reference_BCHW` has the
    size of the latents."""
    batch, _, rows, columns = latents_BCHW.shape
    length, tokens, device = text_BLD.shape[1], rows * columns, latents_BCHW.device
    positions_3S, image_S, number_S = (
        each.to(device) for each in _layout(length, place, rows, columns)
    )
    shift = 0 if place is None else max(rows, columns)
    frame_BS = torch.where(image_S == 1, length_B[:, None] + shift, positions_3S[0])
    axes = (frame_BS, *(each.expand(batch, -1) for each in positions_3S[1:]))
    angles_BSK = torch.cat(
        [axis[..., None] * 10000.0 ** -(torch.arange(0, d, 2, device=device) / d)
         for axis, d in zip(axes, model.config.axes_dims_rope, strict=True)], dim=-1,
    )[:, :, None]  # fmt: skip
    cos, sin = angles_BSK.cos(), angles_BSK.sin()
    order = torch.arange(len(image_S), device=device)
    same = (image_S[:, None] == image_S) & (image_S >= 0)
    seen_SS = (order[:, None] >= order) | same
    valid_BS = number_S < length_B[:, None]
    mask_B1SS = (seen_SS & valid_BS[:, None])[:, None]
    of_target = (image_S == 1)[None, :, None]

    def flat(each: Tensor) -> Tensor:
        return model.img_in(each.flatten(2).transpose(1, 2))

    text = model.txt_in(text_BLD)
    parts = [text, flat(latents_BCHW)]
    if place is not None:
        assert reference_BCHW is not None
        parts = [text[:, :place], flat(reference_BCHW), text[:, place:], parts[1]]
    x = torch.cat(parts, dim=1)
    time = model.time_text_embed(torch.cat((sigma_B, sigma_B.new_zeros(1))), x)
    modulation = model.modulation(time)
    # Text and reference are modulated at time 0, the last row.
    both = torch.where(of_target, modulation[:-1, None], modulation[-1:, None])
    scale1, gate1, scale2, gate2 = both.chunk(4, dim=-1)
    gate1, gate2 = gate1.tanh(), gate2.tanh()
    for block in model.transformer_blocks:
        attn = block.attn
        h = block.img_norm1(x) * (1 + scale1)
        q, k, v = (each(h).unflatten(-1, (attn.heads, -1))
                   for each in (attn.to_q, attn.to_k, attn.to_v))  # fmt: skip
        q, k = (_rotate(norm(each).to(v.dtype), cos, sin)
                for norm, each in ((attn.norm_q, q), (attn.norm_k, k)))  # fmt: skip
        # Not the fused kernel: its backward takes five times as long at a hundred tokens.
        score = q.transpose(1, 2) @ k.transpose(1, 2).transpose(2, 3) * q.shape[-1] ** -0.5
        score = score.float().masked_fill(~mask_B1SS, -1e9)
        h = score.softmax(dim=-1).to(v.dtype) @ v.transpose(1, 2)
        x = x + gate1 * attn.to_out[0](h.transpose(1, 2).flatten(2))
        h, mlp = block.img_norm2(x) * (1 + scale2), block.img_mlp
        x = x + gate2 * mlp.out(F.silu(mlp.gate_layer(h)) * mlp.proj(h))
    x = x[:, -tokens:]
    x = model.norm_out.norm(x) * (1 + model.norm_out.linear(F.silu(time[:-1])))[:, None]
    return model.proj_out(x).transpose(1, 2).unflatten(2, (rows, columns))
