"""Z-Image's forward for a batch of equal shapes: the same weights and math, less Python overhead.

`ZImageTransformer2DModel.forward` takes lists, pads and rebuilds rotary tables at each call, which
takes as long as the computation at miniature size. A test checks that the results are equal.

B batch, C channels, H rows, W columns of latents; P image tokens, L caption tokens (both a
multiple of 32), S = P + L; D width, N heads, K head width.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF, ZImageTransformerBlock
from torch import Tensor

from miniature.models import Transformer

PATCH = 2


@cache
def _rotary(
    axes: tuple[int, ...], theta: float, rows: int, columns: int, caption: int
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, 1, K / 2], image tokens first, then the caption's.

    Caption token i sits at frame i + 1, the image at frame L + 1 (see `_pad_with_ids` in
    diffusers' transformer_z_image.py).
    """
    image = torch.cartesian_prod(
        torch.tensor([caption + 1]), torch.arange(rows), torch.arange(columns)
    )
    text = F.pad(torch.arange(1, caption + 1)[:, None], (0, 2))
    ids = torch.cat([image, text]).double()
    angles = [
        ids[:, i : i + 1] * theta ** -(torch.arange(0, d, 2, dtype=torch.float64) / d)
        for i, d in enumerate(axes)
    ]
    angles_SK = torch.cat(angles, dim=-1).float()[:, None]
    return angles_SK.cos(), angles_SK.sin()


def _rotate(x_BSNK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates neighboring pairs, as the complex product in diffusers does."""
    even, odd = x_BSNK.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(x_BSNK.dtype)


def _block(
    block: ZImageTransformerBlock,
    x_BSD: Tensor,
    rotary: tuple[Tensor, Tensor],
    time_BD: Tensor | None,
) -> Tensor:
    attention: Any = block.attention
    ffn = block.feed_forward
    if time_BD is None:
        scale1 = gate1 = scale2 = gate2 = None
        h = block.attention_norm1(x_BSD)
    else:
        mod = block.adaLN_modulation(time_BD)[:, None]
        scale1, gate1, scale2, gate2 = mod.chunk(4, dim=2)
        gate1, gate2 = gate1.tanh(), gate2.tanh()
        h = block.attention_norm1(x_BSD) * (1 + scale1)

    heads = (attention.heads, -1)
    q = _rotate(attention.norm_q(attention.to_q(h).unflatten(-1, heads)), *rotary)
    k = _rotate(attention.norm_k(attention.to_k(h).unflatten(-1, heads)), *rotary)
    v = attention.to_v(h).unflatten(-1, heads)
    # Not the fused kernel: its backward takes five times as long at a hundred tokens.
    score_BNSS = q.transpose(1, 2) @ k.transpose(1, 2).transpose(2, 3) * q.shape[-1] ** -0.5
    out = score_BNSS.softmax(dim=-1).to(v.dtype) @ v.transpose(1, 2)
    h = block.attention_norm2(attention.to_out[0](out.transpose(1, 2).flatten(2)))
    x_BSD = x_BSD + (h if gate1 is None else gate1 * h)

    h = block.ffn_norm1(x_BSD)
    if scale2 is not None:
        h = h * (1 + scale2)
    h = block.ffn_norm2(ffn.w2(F.silu(ffn.w1(h)) * ffn.w3(h)))
    return x_BSD + (h if gate2 is None else gate2 * h)


def batched_forward(
    model: Transformer,
    latents_BCHW: Tensor,
    time_B: Tensor,
    text_BLD: Tensor,
    text_mask_BL: Tensor,
) -> Tensor:
    """The model's raw output x0 - eps as [B, C, H, W].

    `time_B` is 1 - sigma; `text_mask_BL` is True for caption tokens, the others are replaced by the
    model's pad token. Raises ValueError for sizes that the class would pad.
    """
    batch, channels, height, width = latents_BCHW.shape
    rows, columns, caption = height // PATCH, width // PATCH, text_BLD.shape[1]
    patches = rows * columns
    if patches % SEQ_MULTI_OF or caption % SEQ_MULTI_OF:
        raise ValueError(
            f"{patches} image and {caption} caption tokens; both must be multiples of "
            f"{SEQ_MULTI_OF}; use the class's forward for other sizes"
        )
    tables = _rotary(tuple(model.axes_dims), float(model.rope_theta), rows, columns, caption)
    cos, sin = (table.to(latents_BCHW.device) for table in tables)
    time_BD = model.t_embedder(time_B * model.t_scale)

    x = latents_BCHW.reshape(batch, channels, rows, PATCH, columns, PATCH)
    x = x.permute(0, 2, 4, 3, 5, 1).reshape(batch, patches, -1)
    x = model.all_x_embedder["2-1"](x)
    for block in model.noise_refiner:
        x = _block(block, x, (cos[:patches], sin[:patches]), time_BD)

    text = model.cap_embedder(text_BLD)
    text = torch.where(text_mask_BL[..., None], text, model.cap_pad_token.to(text.dtype))
    for block in model.context_refiner:
        text = _block(block, text, (cos[patches:], sin[patches:]), None)

    x = torch.cat([x, text], dim=1)
    for block in model.layers:
        x = _block(block, x, (cos, sin), time_BD)

    final = model.all_final_layer["2-1"]
    x = final.norm_final(x[:, :patches]) * (1 + final.adaLN_modulation(time_BD))[:, None]
    x = final.linear(x).reshape(batch, rows, columns, PATCH, PATCH, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, height, width)
