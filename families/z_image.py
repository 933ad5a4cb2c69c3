"""Z-Image: a single-stream transformer over a Qwen3 text encoder.

Its transformer takes time 1 - sigma and answers x0 - noise; text features are those before the
encoder's last layer, template tokens included; captions and images are padded to multiples of 32
with learned tokens inside the transformer (diffusers, `pipelines/z_image`).
"""

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from transformers import Qwen3Model

from families.family import Family
from families.tiles import (
    group_norms,
    in_tiles,
    split_decoder,
    split_encoder,
    through,
)
from families.tokens import TokenizedPrompt

# Images of more pixels go through the VAE in tiles: those of the usual 1024 x 1024 do not, since
# its group norms make tiles cost several passes.
WHOLE_PIXELS = 1152 * 1024


class ZImage(Family):
    """Z-Image Turbo, Base, De-Turbo, and the embedded miniatures."""

    transformer_class = ZImageTransformer2DModel
    vae_class = AutoencoderKL
    text_encoder_class = Qwen3Model
    trunk = "layers"
    original_names = {
        "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
        "attention.out": ("attention.to_out.0",),
        "attention.q_norm": ("attention.norm_q",),
        "attention.k_norm": ("attention.norm_k",),
        "final_layer": ("all_final_layer.2-1",),
        "x_embedder": ("all_x_embedder.2-1",),
    }
    _noise_dtype = torch.float32

    @property
    def vae_factor(self) -> int:  # type: ignore[override]
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    @property
    def patch_size(self) -> int:  # type: ignore[override]
        return self.transformer_config["all_patch_size"][0]

    @property
    def latent_channels(self) -> int:  # type: ignore[override]
        return self.transformer_config["in_channels"]

    def _template(self, tokenizer: Any) -> str:
        message = [{"role": "user", "content": "{}"}]
        return tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )

    def _reading_part(self, model: Any) -> nn.Module:
        # hidden_states[-2] is what enters the last layer: that layer and the norm are never run.
        model.layers = model.layers[:-1]
        model.config.num_hidden_layers -= 1
        model.norm = nn.Identity()
        return model

    def _first_feature(self, prompt: TokenizedPrompt) -> int:
        return 0

    def encode_images(self, pixels_B3PP: Tensor) -> tuple[Tensor, Tensor]:
        pixels_B3PP = pixels_B3PP.to(self.device, torch.float32)
        if pixels_B3PP[0, 0].numel() <= WHOLE_PIXELS:
            posterior = self.vae.encode(pixels_B3PP).latent_dist
        else:
            posterior = DiagonalGaussianDistribution(self._encoded_in_tiles(pixels_B3PP))
        scale, shift = self.vae_config["scaling_factor"], self.vae_config["shift_factor"]
        return (posterior.mean - shift) * scale, posterior.std * scale

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        scale, shift = self.vae_config["scaling_factor"], self.vae_config["shift_factor"]
        latents_BCHW = latents_BCHW.float() / scale + shift
        if latents_BCHW[0, 0].numel() * self.vae_factor**2 <= WHOLE_PIXELS:
            return self.vae.decode(latents_BCHW, return_dict=False)[0]
        return self._decoded_in_tiles(latents_BCHW)

    def _decoded_in_tiles(self, latents_BCHW: Tensor) -> Tensor:
        """What the VAE's decoder gives, with its last blocks in tiles."""
        decoder = self.vae.decoder
        if self.vae.post_quant_conv is not None:
            latents_BCHW = self.vae.post_quant_conv(latents_BCHW)
        blocks = [[*block.resnets, *(block.upsamplers or ())] for block in decoder.up_blocks]
        last = [decoder.conv_norm_out, decoder.conv_act, decoder.conv_out]
        first, tiled, scale = split_decoder([*chain(*blocks), *last], Upsample2D)
        values = through(first, decoder.mid_block(decoder.conv_in(latents_BCHW)))
        return in_tiles(partial(through, tiled), group_norms(tiled), values, cell=1, scale=scale)

    def _encoded_in_tiles(self, pixels_B3PP: Tensor) -> Tensor:
        """What the VAE's encoder gives, with its first blocks in tiles."""
        encoder = self.vae.encoder
        blocks = [[*block.resnets, *(block.downsamplers or ())] for block in encoder.down_blocks]
        tiled, rest, cell = split_encoder([encoder.conv_in, *chain(*blocks)], Downsample2D)
        values = in_tiles(
            partial(through, tiled), group_norms(tiled), pixels_B3PP, cell=cell, scale=1 / cell
        )
        last = [encoder.mid_block, encoder.conv_norm_out, encoder.conv_act, encoder.conv_out]
        values = through([*rest, *last], values)
        return values if self.vae.quant_conv is None else self.vae.quant_conv(values)

    def velocity(self, latents_BCHW: Tensor, sigma_B: Tensor, text: Sequence[Tensor]) -> Tensor:
        # One frame per picture, as a list: the transformer takes pictures of any size.
        frames = list(latents_BCHW.to(self.dtype).unsqueeze(2).unbind())
        towards_image = self.transformer(
            frames, 1 - sigma_B, list(text), patch_size=self.patch_size, return_dict=False
        )[0]
        return -torch.stack(towards_image).squeeze(2).float()

    def lora_groups(self) -> dict[str, list[str]]:
        linears = {
            "attention": ("to_q", "to_k", "to_v", "to_out.0"),
            "feed_forward": ("w1", "w2", "w3"),
        }
        return {
            group: [
                f"layers.{layer}.{group}.{linear}"
                for layer in range(self.transformer_config["n_layers"])
                for linear in names
            ]
            for group, names in linears.items()
        }
