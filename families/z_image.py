"""Z-Image: a single-stream transformer over a Qwen3 text encoder.

Its transformer takes time 1 - sigma and answers x0 - noise; text features are those before the
encoder's last layer, template tokens included; captions and images are padded to multiples of 32
with learned tokens inside the transformer (diffusers, `pipelines/z_image`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen3Model

from families.family import Family
from families.tokens import TokenizedPrompt


class ZImage(Family):
    """Z-Image Turbo, Base, De-Turbo, and the embedded miniatures."""

    transformer_class = ZImageTransformer2DModel
    vae_class = AutoencoderKL
    text_encoder_class = Qwen3Model
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
        posterior = self.vae.encode(pixels_B3PP.to(self.device, torch.float32)).latent_dist
        scale, shift = self.vae_config["scaling_factor"], self.vae_config["shift_factor"]
        return (posterior.mean - shift) * scale, posterior.std * scale

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        scale, shift = self.vae_config["scaling_factor"], self.vae_config["shift_factor"]
        return self.vae.decode(latents_BCHW.float() / scale + shift, return_dict=False)[0]

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
