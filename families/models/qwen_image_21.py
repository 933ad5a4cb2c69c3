"""Qwen-Image-2.1: a single-stream transformer with the language model of Qwen3-VL as text encoder.

The transformer takes time sigma and returns noise - x0 on unpatched latents of a VAE with an alpha
channel. Text is causal and modulated at time 0; the image sees all of it. Text features are the
output of the encoder's last layer before the last norm, without the system turn (diffusers,
`pipelines/qwenimage21`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from families.base import (
    BARE,
    DIFFUSION_MODEL,
    KOHYA,
    TRANSFORMER,
    AdapterFile,
    Base,
    CardCode,
    JobNames,
    LoraReader,
    ModelClasses,
    Terms,
)
from families.editing import IMAGE_SLOT, ReferenceFormat
from families.models.miniature_qwen import MINIATURE_QWEN
from families.tokens import TokenizedPrompt
from families.video_vae import VideoVaeFamily

if TYPE_CHECKING:
    from torch import Tensor, nn

    from families.references import References

# Images of more pixels go through the VAE in tiles.
WHOLE_PIXELS = 640 * 640
# Cells around a tile of the decoder, whose shortcuts span whole blocks. Three residual blocks of
# two convolutions and an upsampling, at 1, 2 and 4 pixels a cell, and the last convolution: 11.5.
DECODER_HALO = 12

# QwenImage21Pipeline's, word for word.
TEMPLATE = (
    "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
USER_TOKENS = 3  # of `<|im_start|>user\n`, which stay: only the system turn is dropped

QWEN_IMAGE_21 = Base(
    name="qwen-image-2.1",
    hub_id="Qwen/Qwen-Image-2.1",
    family="qwen_image_21",
    license="Qwen Research License, non-commercial",
    terms=Terms(
        # The license asks for the first two sentences (4.b and 3.c).
        notice=(
            "Built with Qwen. Qwen is licensed under the Qwen RESEARCH LICENSE AGREEMENT, "
            "Copyright (c) 2026 Hangzhou Tongyi Laboratory Technology Co., Ltd. All Rights "
            "Reserved. For research and evaluation only; commercial use needs another license."
        ),
        url="https://huggingface.co/Qwen/Qwen-Image-2.1/blob/main/LICENSE",
        hub_name="qwen-research",
    ),
    download=33,
    # Plain LoRA training on it is less stable than on Qwen-Image (docs/turbo.md).
    training_adapters={
        "v3": AdapterFile(
            "SimpleTuner/Qwen-Image-2.1-training-assistant-v3",
            "pytorch_lora_weights.safetensors",
        )
    },
    most_references=10,
    attention_share=0.06,
    inference_steps=40,
    guidance_scale=1.0,
    default_resolution=1024,
    # Edits of a square image at 1024 fail in all programs, at 992 not (diffusers #14824).
    editing_resolution=992,
    recommended_up_to=2048,
    size_multiple=32,
    alpha_channel=True,
    generation_memory=33.0,
    editing_memory=1.2,
    training_memory=26.5,
    training_resolution=1024,
    training_shift=2.0,  # its own schedule at that size: e^mu = 2.0
)
QWEN_IMAGE_21_TURBO = replace(
    QWEN_IMAGE_21,
    name="qwen-image-2.1-turbo",
    hub_id="Qwen/Qwen-Image-2.1-Turbo",
    download=32,
    distilled=True,
    training_adapters={},
    train_on=QWEN_IMAGE_21,
    inference_steps=8,
    sample_sigmas=(
        *(1.0, 0.978453, 0.95418, 0.926626),
        *(0.89508, 0.845148, 0.704534, 0.414568),
    ),
)


class QwenImage21(VideoVaeFamily):
    """Qwen-Image-2.1, its Turbo and a miniature. `auto` never chooses them: their license is not
    free."""

    name = "qwen_image_21"
    title = "Qwen-Image-2.1"
    bases = (QWEN_IMAGE_21, QWEN_IMAGE_21_TURBO, MINIATURE_QWEN)
    classes = ModelClasses(
        pipeline="QwenImage21Pipeline",
        transformer="QwenImage21Transformer2DModel",
        vae="AutoencoderKLQwenImage21",
        text_encoder="Qwen3VLForConditionalGeneration",
    )
    # Transformer and VAE have the classes' defaults; the text encoder is Qwen3-VL-8B.
    published = {
        "transformer": {},
        "text_encoder": {
            "text_config": {
                "vocab_size": 151936,
                "hidden_size": 4096,
                "intermediate_size": 12288,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 5_000_000.0,
                    "mrope_interleaved": True,
                    "mrope_section": [24, 20, 20],
                },
            },
            "vision_config": {
                "depth": 27,
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_heads": 16,
                "out_hidden_size": 4096,
                "deepstack_visual_indexes": [8, 16, 24],
            },
            "tie_word_embeddings": False,
        },
        "vae": {},
    }
    reference_format = ReferenceFormat(
        f"<image{{}}><|vision_start|>{IMAGE_SLOT}<|vision_end|>",
        between=" ",
        latents_in_text=True,
    )
    trunk = "transformer_blocks"
    compiled_share = 0.72
    tokenizer_folder = "processor"
    sees_images = True
    # The pipeline does not cut, and rewritten prompts are long. From 8192 tokens on, positions
    # would read the transformer's table for negative ones.
    max_text_tokens = 4096
    empty_prompt = " "
    noise_in_dtype = True
    # Read in the programs' source in November 2026; versions in docs/adapters.md.
    lora_readers = {
        "diffusers": LoraReader(
            (TRANSFORMER, DIFFUSION_MODEL),
            TRANSFORMER,
            note="`diffusion_model.` only with separate gate_layer and proj",
        ),
        "comfyui": LoraReader(
            (TRANSFORMER, BARE),
            TRANSFORMER,
            note="`diffusion_model.` and `lora_unet_` only with gate_layer and proj fused to "
            "gate_up; separate ones are ignored without a message",
        ),
        "musubi": LoraReader((KOHYA,), KOHYA),
        "diffsynth": LoraReader((DIFFUSION_MODEL, BARE), DIFFUSION_MODEL),
        "sglang": LoraReader((TRANSFORMER,), TRANSFORMER),
        "mflux": LoraReader((TRANSFORMER, DIFFUSION_MODEL, BARE), TRANSFORMER),
    }
    layer_names = r"transformer_blocks[._]\d+[._]img_mlp[._](?:gate_layer|gate_up|proj|out)\b"
    original_names = {"img_mlp.gate_up": ("img_mlp.gate_layer", "img_mlp.proj")}
    job_names = {"ai-toolkit": JobNames(("qwen_image_2",))}
    card_code = CardCode(
        template="""\
    text = pipeline.prompt_template_t2i.format(prompt)""",
        features="""\
    reader = pipeline.text_encoder.model.language_model
    before_norm = reader.norm.register_forward_hook(lambda norm, given, result: given[0])
    read = reader(inputs_embeds=embeds)
    before_norm.remove()
    return read.last_hidden_state[:, pipeline._drop_idx :]""",
        guidance="true_cfg_scale",
        guidance_off=1,
        tokenizer="pipeline.processor.tokenizer",
        editing_size="output_resolution",
    )
    patch_size = 1

    @property
    def latent_channels(self) -> int:  # type: ignore[override]
        return self.transformer_config["in_channels"]

    @property
    def resolution_multiple(self) -> int:
        return 2 * self.vae_factor  # as in the pipeline

    def _template(self, tokenizer: Any) -> str:
        return TEMPLATE

    def _reading_part(self, model: Any) -> nn.Module:
        from torch import nn

        reader = model.model.language_model  # vision tower and vocabulary head are never run
        reader.norm = nn.Identity()
        return reader

    def _first_feature(self, prompt: TokenizedPrompt) -> int:
        return prompt.template_length - USER_TOKENS

    # The VAE. Its own `encode` and `decode` fill caches for videos that images don't need.

    def encode_images(self, pixels_BCPP: Tensor) -> tuple[Tensor, Tensor]:
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
        from torch.nn import functional as F

        pixels_BCPP = pixels_BCPP.to(self.device).float()
        missing = 4 - pixels_BCPP.shape[1]
        pixels_B4FPP = F.pad(pixels_BCPP, (0, 0, 0, 0, 0, missing), value=1.0).unsqueeze(2)
        whole = pixels_BCPP[0, 0].numel() <= WHOLE_PIXELS
        encoded = self.vae.encoder(pixels_B4FPP) if whole else self._encoded_in_tiles(pixels_B4FPP)
        posterior = DiagonalGaussianDistribution(self.vae.quant_conv(encoded))
        return self.normalized(posterior)

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Pixels B4PP float32, RGB and alpha, in [-1, 1]."""
        from families.tiles import SIZE_CHANGES, in_tiles, through

        decoder = self.vae.decoder
        values = self.vae.post_quant_conv(self.denormalized(latents_BCHW))
        if latents_BCHW[0, 0].numel() * self.vae_factor**2 <= WHOLE_PIXELS:
            return decoder(values, first_chunk=True).clamp_(-1, 1).squeeze(2)
        # Whole blocks are tiled, since a shortcut leads around each.
        blocks = [partial(block, first_chunk=True) for block in decoder.up_blocks]
        last = [decoder.norm_out, decoder.nonlinearity, decoder.conv_out]
        larger = [k for k, each in enumerate(decoder.up_blocks) if each.upsampler is not None]
        start = larger[-SIZE_CHANGES]
        values = through([decoder.conv_in, decoder.mid_block, *blocks[:start]], values)
        tiled = partial(through, [*blocks[start:], *last])
        scale, halo = 2**SIZE_CHANGES, DECODER_HALO
        pixels_B4FPP = in_tiles(tiled, (), values, cell=1, scale=scale, halo=halo)
        return pixels_B4FPP.clamp_(-1, 1).squeeze(2)

    def _encoded_in_tiles(self, pixels_B4FPP: Tensor) -> Tensor:
        """The VAE encoder's output for one frame, with its first blocks in tiles."""
        from families.tiles import SIZE_CHANGES, in_tiles, through

        encoder = self.vae.encoder
        blocks, cell = list(encoder.down_blocks), 2**SIZE_CHANGES  # each of the first halves
        tiled = partial(through, [encoder.conv_in, *blocks[:SIZE_CHANGES]])
        values = in_tiles(tiled, (), pixels_B4FPP, cell=cell, scale=1 / cell)
        last = [encoder.mid_block, encoder.norm_out, encoder.nonlinearity, encoder.conv_out]
        return through([*blocks[SIZE_CHANGES:], *last], values)

    # The transformer.

    def velocity(self, latents_BCHW: Tensor, sigma_B: Tensor, text: Sequence[Tensor]) -> Tensor:
        return self._velocity(latents_BCHW, sigma_B, text)

    def edit_velocity(
        self,
        latents_BCHW: Tensor,
        sigma_B: Tensor,
        text: Sequence[Tensor],
        references: References,
    ) -> Tensor:
        return self._velocity(latents_BCHW, sigma_B, text, references)

    def _velocity(
        self,
        latents_BCHW: Tensor,
        sigma_B: Tensor,
        text: Sequence[Tensor],
        references: References | None = None,
    ) -> Tensor:
        import torch

        from families.block_causal import velocity

        images, places = (references.latents, references.places) if references else ((), ())
        # An image's position is after its text. With padding, a shorter prompt would get another
        # velocity than alone, so texts of each length are computed together.
        rows_of: dict[int, list[int]] = {}
        for row, each in enumerate(text):
            rows_of.setdefault(len(each), []).append(row)
        if len(rows_of) == 1:
            text_BLD = torch.stack(list(text))
            return velocity(self.transformer, latents_BCHW, sigma_B, text_BLD, images, places)
        found: dict[int, Tensor] = {}
        for rows in rows_of.values():
            some, sigmas, text_BLD = (
                torch.stack([each[row] for row in rows]) for each in (latents_BCHW, sigma_B, text)
            )
            answer = velocity(self.transformer, some, sigmas, text_BLD, images, places)
            found |= dict(zip(rows, answer, strict=True))
        return torch.stack([found[row] for row in range(len(text))])

    def lora_groups(self) -> dict[str, list[str]]:
        linears = {
            "attention": ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
            "feed_forward": ("img_mlp.gate_layer", "img_mlp.proj", "img_mlp.out"),
        }
        return {
            group: [
                f"transformer_blocks.{block}.{linear}"
                for block in range(self.transformer_config["num_layers"])
                for linear in names
            ]
            for group, names in linears.items()
        }
