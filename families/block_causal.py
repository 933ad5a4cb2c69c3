"""The forward pass of Qwen-Image-2.1's transformer, whose sequence mixes text and images.

The sequence is causal, except that each image sees itself in full: text with reference images at
their places, and the noisy image at the end. Everything before that image is modulated at time 0.
The same as the model's own `forward` (diffusers, `models/transformers/transformer_qwenimage21.py`),
but it waits for no device, runs on models without weights, and needs no slots for the images.

Tensor names carry their shape: B images, C channels, H and W latent rows and columns, L text
tokens, D text features, N tokens of the sequence.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Part = int | tuple[int, int]  # of the sequence: text tokens, or an image's rows and columns


def velocity(
    model: Any,
    latents_BCHW: Tensor,
    sigma_B: Tensor,
    text_BLD: Tensor,
    references: Sequence[Tensor] = (),
    places: Sequence[int] = (),
) -> Tensor:
    """The velocity of noisy latents, BCHW float32, with texts of one length.

    `references` are latents 1CHW, each after the first `places[k]` tokens of the text.
    """
    batch, dtype = len(latents_BCHW), text_BLD.dtype
    images = [*(each.expand(batch, -1, -1, -1) for each in references), latents_BCHW]
    text_BLN = model.txt_in(text_BLD)
    states, parts = list[Tensor](), list[Part]()
    for (start, end), image_BCHW in zip(
        pairwise((0, *places, text_BLD.shape[1])), images, strict=True
    ):
        image_BNC = image_BCHW.flatten(2).transpose(1, 2).to(dtype)
        states += [text_BLN[:, start:end], model.img_in(image_BNC)]
        parts += [end - start, (image_BCHW.shape[2], image_BCHW.shape[3])]
    states_BND = torch.cat(states, dim=1)
    # As rounded by the pipeline, and a last row for what is before the image: time 0.
    time = (sigma_B * 1000).to(dtype) / 1000
    embedded = model.time_text_embed(torch.cat((time, time.new_zeros(1))), states_BND)
    modulation = model.modulation(embedded)
    segments = _segments(parts)
    length = segments[-1][1]  # of all but the image
    of_image = torch.arange(states_BND.shape[1], device=states_BND.device) >= length
    rotary = _rotary(model.pos_embed, parts, states_BND.device)
    recomputed = torch.is_grad_enabled() and model.gradient_checkpointing
    for block in model.transformer_blocks:
        run = partial(model._gradient_checkpointing_func, block) if recomputed else block
        no_cache = (None, None, None)
        states_BND = run(states_BND, modulation, rotary, None, of_image, *no_cache, segments, None)
    states_BND = model.norm_out(states_BND[:, length:], embedded[:-1])
    velocity_BCN = model.proj_out(states_BND).transpose(1, 2)
    return velocity_BCN.unflatten(2, latents_BCHW.shape[2:]).float()


def _segments(parts: Sequence[Part]) -> list[tuple[int, int, bool]]:
    """Start, end, and whether it is text, of each part but the last, which sees everything."""
    segments, start = [], 0
    for each in parts[:-1]:
        size = each if isinstance(each, int) else each[0] * each[1]
        segments.append((start, start + size, isinstance(each, int)))
        start += size
    return segments


def _rotary(embed: Any, parts: Sequence[Part], device: torch.device) -> Tensor:
    """Rotary factors [N, head / 2], complex.

    A text token has the same position on all three axes (frame, row, column). An image's frame is
    the position after the text before it; its rows and columns are centered on 0. The text goes on
    after the longer of them.
    """
    embed.freqs = [each.to(device) for each in embed.freqs]  # kept, as in its own forward
    axes: tuple[list[Tensor], ...] = ([], [], [])
    position = 0
    for each in parts:
        if isinstance(each, int):
            text = torch.arange(position, position + each, device=device)
            found = (text, text, text)
            position += each
        else:
            rows, columns = each
            row = torch.arange(rows, device=device) - (rows - rows // 2)
            column = torch.arange(columns, device=device) - (columns - columns // 2)
            frame = torch.full((rows * columns,), position, device=device)
            found = (frame, row.repeat_interleave(columns), column.repeat(rows))
            position += max(rows, columns)
        for axis, index in zip(axes, found, strict=True):
            axis.append(index)
    tables = zip(embed.freqs, axes, strict=True)
    return torch.cat([table[torch.cat(axis)] for table, axis in tables], dim=-1)
