"""Z-Image: a single-stream transformer with a Qwen3 text encoder.

The transformer takes time 1 - sigma and returns x0 - noise. Text features are the hidden states
before the encoder's last layer, template tokens included. Captions and images are padded to
multiples of 32 with learned tokens inside the transformer (diffusers, `pipelines/z_image`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from families.base import (
    BARE,
    DIFFUSION_MODEL,
    KOHYA,
    LORA_STYLES,
    TRANSFORMER,
    AdapterFile,
    Base,
    CardCode,
    FewStepRow,
    JobNames,
    LoraReader,
    ModelClasses,
    Steps,
)
from families.family import Family
from families.tokens import TokenizedPrompt

if TYPE_CHECKING:
    from torch import Tensor, nn

# Images of more pixels go through the VAE in tiles; the usual 1024 x 1024 do not, since this VAE's
# group norms make tiling take several passes.
WHOLE_PIXELS = 1152 * 1024

Z_IMAGE_TURBO = Base(
    name="z-image-turbo",
    hub_id="Tongyi-MAI/Z-Image-Turbo",
    family="z_image",
    license="Apache-2.0",
    download=20,
    distilled=True,
    training_adapters={
        version: AdapterFile(
            "ostris/zimage_turbo_training_adapter",
            f"zimage_turbo_training_adapter_{version}.safetensors",
        )
        for version in ("v1", "v2")
    },
    inference_steps=8,
    guidance_scale=1.0,
    default_resolution=1024,
    generation_memory=23.8,
    training_memory=17.9,
    training_resolution=1024,
    training_shift=2.0,
)
Z_IMAGE = replace(
    Z_IMAGE_TURBO,
    name="z-image",
    hub_id="Tongyi-MAI/Z-Image",
    distilled=False,
    training_adapters={},
    inference_steps=50,
    guidance_scale=5.0,  # the card's 4 counts from zero, as its pipeline does
)
Z_IMAGE_DE_TURBO = replace(
    Z_IMAGE,
    name="z-image-de-turbo",
    hub_id="ostris/Z-Image-De-Turbo",
    completed_by=Z_IMAGE_TURBO,
    license="",
    download=None,
    inference_steps=25,
    # The card's 2 to 3 are on the usual scale: its author's trainer subtracts one before it calls
    # the pipeline (ai-toolkit 27a03a91, `z_image.py`), and starts from 3 for this model.
    guidance_scale=2.5,
)

# The included test models are small and run on a CPU: higher learning rates, fewer steps, larger
# batches. Tuned in a few runs on the demo's subject; the placeholder's learning rate may be ten
# times lower or five times higher (docs/zero_prior.md).
_INCLUDED = Path(__file__).resolve().parents[2] / "miniature" / "weights"
MINIATURE_TURBO = Base(
    name="miniature-turbo",
    hub_id="zeroprior/miniature-turbo",
    family="z_image",
    included=_INCLUDED / "miniature-turbo",
    license="Apache-2.0",  # this project's
    distilled=True,
    training_adapters={
        "v1": AdapterFile(
            "zeroprior/miniature-turbo-training-adapter",
            "miniature_turbo_training_adapter.safetensors",
            _INCLUDED / "training_adapter",
        )
    },
    inference_steps=8,
    guidance_scale=1.0,
    default_resolution=64,
    # Four times its default edge: 1 s a step on one CPU core; 1000 pixels take 47 s.
    largest_resolution=256,
    size_multiple=8,
    generation_memory=0.1,
    training_memory=0.5,
    training_resolution=64,
    # With preservation, 4e-3 and 0.02 learn less: robot, seed 1, likeness 0.69 instead of 0.71.
    learning_rate=6e-3,
    placeholder_learning_rate=0.05,
    lr_scheduler="cosine",
    training_steps=Steps(per_image=0, least=500, most=500),
    batch_size=8,
    # Rows without a caption teach the subject to the empty prompt, too. Robot, seed 1: likeness is
    # 0.65 with them and 0.67 without, both with preservation. Without preservation, 38.5 % of the
    # images of other prompts are fully right with them, and 43.8 % without.
    caption_dropout=0.0,
    preservation_prompts="shapes",
    training_shift=3.0,
    preview_prompt="a TOK in the desert",
    preview_prompt_without_subject="a red star in the desert",
)
MINIATURE = replace(
    MINIATURE_TURBO,
    name="miniature",
    hub_id="zeroprior/miniature",
    completed_by=MINIATURE_TURBO,
    included=_INCLUDED / "miniature",
    distilled=False,
    training_adapters={},
    inference_steps=25,
    guidance_scale=2.0,
)


class ZImage(Family):
    """Z-Image Turbo, Base, De-Turbo, and the included miniatures."""

    name = "z_image"
    title = "Z-Image"
    bases = (Z_IMAGE_TURBO, Z_IMAGE, Z_IMAGE_DE_TURBO, MINIATURE_TURBO, MINIATURE)
    auto_on_gpu = Z_IMAGE_TURBO
    auto_without_gpu = MINIATURE_TURBO
    classes = ModelClasses(
        pipeline="ZImagePipeline",
        transformer="ZImageTransformer2DModel",
        vae="AutoencoderKL",
        text_encoder="Qwen3Model",
    )
    # From the config.json files of Tongyi-MAI/Z-Image-Turbo; the transformer has the class's
    # defaults.
    published = {
        "transformer": {},
        "text_encoder": {  # Qwen3-4B
            "vocab_size": 151936,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
        "vae": {  # FLUX.1's
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "block_out_channels": [128, 256, 512, 512],
            "layers_per_block": 2,
            "latent_channels": 16,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
    }
    trunk = "layers"
    compiled_share = 0.55
    lora_prefix = "diffusion_model"
    # Read or run in the programs' source; versions in docs/adapters.md.
    lora_readers = {
        "diffusers": LoraReader(LORA_STYLES, TRANSFORMER),
        # `transformer.` since pull request 11135 (December 2025).
        "comfyui": LoraReader(
            (TRANSFORMER, DIFFUSION_MODEL, BARE), DIFFUSION_MODEL, embedding=True
        ),
        "ai-toolkit": LoraReader((TRANSFORMER, DIFFUSION_MODEL), DIFFUSION_MODEL),
        "musubi": LoraReader((KOHYA,), KOHYA),
        "kohya": LoraReader((KOHYA,), KOHYA, note="ComfyUI does not know these names"),
        "onetrainer": LoraReader(LORA_STYLES, TRANSFORMER),
        "diffsynth": LoraReader((DIFFUSION_MODEL, BARE), DIFFUSION_MODEL),
        "sglang": LoraReader((DIFFUSION_MODEL, BARE), DIFFUSION_MODEL),
        "mflux": LoraReader((TRANSFORMER, DIFFUSION_MODEL, BARE), DIFFUSION_MODEL),
        "invokeai": LoraReader((TRANSFORMER, DIFFUSION_MODEL), TRANSFORMER),
    }
    layer_names = r"(?:layers|refiner)[._]\d+[._](?:attention[._](?:to_|qkv|out)|feed_forward)"
    original_names = {
        "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
        "attention.out": ("attention.to_out.0",),
        "attention.q_norm": ("attention.norm_q",),
        "attention.k_norm": ("attention.norm_k",),
        "final_layer": ("all_final_layer.2-1",),
        "x_embedder": ("all_x_embedder.2-1",),
    }
    few_step_loras = (
        FewStepRow(  # alibaba-pai/Z-Image-Fun-Lora-Distill
            "Z-Image-Fun-Lora-Distill",
            re.compile(r"z-image-fun(?:-\w+)*-distill"),
            steps=8,
            shift=None,  # made for Z-Image's own schedule, with cfg 1
        ),
    )
    job_names = {
        "ai-toolkit": JobNames(("zimage",), groups=("feed_forward", "attention")),
        "musubi-tuner": JobNames(("zimage",), "auto"),
        "SimpleTuner": JobNames(
            ("z-image", "z_image"),
            "to_q,to_k,to_v,to_out.0",
            flavours={
                "": ("z-image-turbo", "v2"),
                "base": ("z-image", None),
                "turbo": ("z-image-turbo", "v1"),
                "turbo-ostris-v2": ("z-image-turbo", "v2"),
                "ostris-de-turbo": ("z-image-de-turbo", None),
            },
            modules={"Attention": "*.attention.*", "FeedForward": "*.feed_forward.*"},
        ),
        "OneTrainer": JobNames(("Z_IMAGE",)),
        "diffusion-pipe": JobNames(("z_image",), "layers.*,noise_refiner.*,context_refiner.*"),
    }
    card_code = CardCode(
        template="""\
    message = [{"role": "user", "content": prompt}]
    text = pipeline.tokenizer.apply_chat_template(
        message, tokenize=False, add_generation_prompt=True, enable_thinking=True
    )""",
        features="""\
    read = pipeline.text_encoder(inputs_embeds=embeds, output_hidden_states=True)
    return list(read.hidden_states[-2])""",
        guidance="guidance_scale",
        guidance_off=0,
    )

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
        from torch import nn

        # hidden_states[-2] is the input of the last layer: that layer and the norm are not needed.
        model.layers = model.layers[:-1]
        model.config.num_hidden_layers -= 1
        model.norm = nn.Identity()
        return model

    def _first_feature(self, prompt: TokenizedPrompt) -> int:
        return 0

    def encode_images(self, pixels_B3PP: Tensor) -> tuple[Tensor, Tensor]:
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        pixels_B3PP = pixels_B3PP.to(self.device).float()
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
        """The VAE decoder's output, with its last blocks in tiles."""
        from diffusers.models.upsampling import Upsample2D

        from families.tiles import group_norms, in_tiles, split_decoder, through

        decoder = self.vae.decoder
        if self.vae.post_quant_conv is not None:
            latents_BCHW = self.vae.post_quant_conv(latents_BCHW)
        blocks = [[*block.resnets, *(block.upsamplers or ())] for block in decoder.up_blocks]
        last = [decoder.conv_norm_out, decoder.conv_act, decoder.conv_out]
        first, tiled, scale = split_decoder([*chain(*blocks), *last], Upsample2D)
        values = through(first, decoder.mid_block(decoder.conv_in(latents_BCHW)))
        return in_tiles(partial(through, tiled), group_norms(tiled), values, cell=1, scale=scale)

    def _encoded_in_tiles(self, pixels_B3PP: Tensor) -> Tensor:
        """The VAE encoder's output, with its first blocks in tiles."""
        from diffusers.models.downsampling import Downsample2D

        from families.tiles import group_norms, in_tiles, split_encoder, through

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
        import torch

        # One frame per image, as a list: the transformer takes images of any size.
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
