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
from families.family import Family
from families.models.miniature_qwen import MINIATURE_QWEN
from families.tokens import TokenizedPrompt

if TYPE_CHECKING:
    from torch import Tensor, nn

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
    inference_steps=40,
    guidance_scale=1.0,
    default_resolution=1024,
    recommended_up_to=2048,
    size_multiple=32,
    generation_memory=33.0,
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


class QwenImage21(Family):
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
    )
    patch_size = 1

    @property
    def vae_factor(self) -> int:  # type: ignore[override]
        return 2 ** len(self.vae_config["temperal_downsample"])

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

    def encode_images(self, pixels_B3PP: Tensor) -> tuple[Tensor, Tensor]:
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
        from torch.nn import functional as F

        pixels_B3PP = pixels_B3PP.to(self.device).float()
        pixels_B4FPP = F.pad(pixels_B3PP, (0, 0, 0, 0, 0, 1), value=1.0).unsqueeze(2)  # opaque
        whole = pixels_B3PP[0, 0].numel() <= WHOLE_PIXELS
        encoded = self.vae.encoder(pixels_B4FPP) if whole else self._encoded_in_tiles(pixels_B4FPP)
        posterior = DiagonalGaussianDistribution(self.vae.quant_conv(encoded))
        mean_C11, std_C11 = self._statistics()
        mean_BCHW, std_BCHW = posterior.mean.squeeze(2), posterior.std.squeeze(2)
        return (mean_BCHW - mean_C11) / std_C11, std_BCHW / std_C11

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Pixels B4PP float32, RGB and alpha, in [-1, 1]."""
        from families.tiles import SIZE_CHANGES, in_tiles, through

        mean_C11, std_C11 = self._statistics()
        latents_BCFHW = (latents_BCHW.float() * std_C11 + mean_C11).unsqueeze(2)
        decoder = self.vae.decoder
        values = self.vae.post_quant_conv(latents_BCFHW)
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

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each latent channel, from the VAE's config."""
        import torch

        mean, std = (
            torch.tensor(self.vae_config[name], device=self.device).view(-1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )
        return mean, std

    # The transformer.

    def velocity(self, latents_BCHW: Tensor, sigma_B: Tensor, text: Sequence[Tensor]) -> Tensor:
        import torch

        # An image's position is after its text. With padding, a shorter prompt would get another
        # velocity than alone, so texts of each length are computed together.
        rows_of: dict[int, list[int]] = {}
        for row, each in enumerate(text):
            rows_of.setdefault(len(each), []).append(row)
        if len(rows_of) == 1:
            return self._velocity(latents_BCHW, sigma_B, torch.stack(list(text)))
        found: dict[int, Tensor] = {}
        for rows in rows_of.values():
            given = [
                torch.stack([each[row] for row in rows]) for each in (latents_BCHW, sigma_B, text)
            ]
            found |= dict(zip(rows, self._velocity(*given), strict=True))
        return torch.stack([found[row] for row in range(len(text))])

    def _velocity(self, latents_BCHW: Tensor, sigma_B: Tensor, text_BLD: Tensor) -> Tensor:
        """The velocity with texts of one length.

        The same as the model's own `forward` without references, but it waits for no device and
        runs on models without weights.
        """
        import torch

        model = self.transformer
        length, (rows, columns) = text_BLD.shape[1], latents_BCHW.shape[-2:]
        image_BND = latents_BCHW.flatten(2).transpose(1, 2).to(self.dtype)
        states = torch.cat((model.txt_in(text_BLD), model.img_in(image_BND)), dim=1)
        # As rounded by the pipeline, and a last row for the text: time 0.
        time = (sigma_B * 1000).to(self.dtype) / 1000
        embedded = model.time_text_embed(torch.cat((time, time.new_zeros(1))), states)
        modulation = model.modulation(embedded)
        of_image = torch.arange(states.shape[1], device=states.device) >= length
        positions = self._rotary(length, rows, columns)
        segments = [(0, length, True)]  # causal; the rest is the image, which sees everything
        recomputed = torch.is_grad_enabled() and model.gradient_checkpointing
        for block in model.transformer_blocks:
            run = partial(model._gradient_checkpointing_func, block) if recomputed else block
            no_cache = (None, None, None)
            states = run(states, modulation, positions, None, of_image, *no_cache, segments, None)
        states = model.norm_out(states[:, length:], embedded[:-1])
        velocity_BCN = model.proj_out(states).transpose(1, 2)
        return velocity_BCN.unflatten(2, (rows, columns)).float()

    def _rotary(self, length: int, rows: int, columns: int) -> Tensor:
        """Rotary factors [length + rows * columns, head / 2], complex.

        A text token has the same position on all three axes (frame, row, column). The image's
        frame is the position after the text; its rows and columns are centered on 0.
        """
        import torch

        embed, device = self.transformer.pos_embed, self.device
        embed.freqs = [each.to(device) for each in embed.freqs]  # kept, as in its own forward
        text = torch.arange(length, device=device)
        frame = torch.full((rows * columns,), length, device=device)
        row = torch.arange(rows, device=device) - (rows - rows // 2)
        column = torch.arange(columns, device=device) - (columns - columns // 2)
        image = (frame, row.repeat_interleave(columns), column.repeat(rows))
        tables = zip(embed.freqs, image, strict=True)
        return torch.cat([table[torch.cat((text, each))] for table, each in tables], dim=-1)

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
