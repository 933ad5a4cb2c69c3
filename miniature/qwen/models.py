"""The second miniature's architectures, and writing it in the Hub's layout.

Classes of diffusers and transformers as in Qwen-Image-2.1, with under five million parameters.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage21,
    QwenImage21Transformer2DModel,
)
from diffusers import __version__ as diffusers_version
from torch import nn
from transformers import (
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from miniature.models import (
    EMBEDDING_ROWS,
    TextEncoder,
    Transformer,
    Vae,
    build_scheduler,
    written,
)
from miniature.tokenizer import build_tokenizer

WIDTH, HEADS, LAYERS = 160, 5, 6  # of the transformer
ROPE_AXES = (8, 12, 12)  # frame, row, column; adds up to WIDTH / HEADS
TEXT_WIDTH, TEXT_HEADS, TEXT_LAYERS = 128, 4, 3
VISION_WIDTH, VISION_LAYERS = 64, 2
LATENT_CHANNELS = 48
HALVINGS = 4
FACTOR = 2**HALVINGS  # of the autoencoder; QwenImage21Pipeline has it built in
# Native side length: 8 x 8 latents, as many tokens as the first miniature has. At 64 pixels, no
# autoencoder of this size and factor kept the textures.
PIXELS = 128
VISION_PATCH, VISION_MERGE = FACTOR, 2  # so that a slot of the text stands for 2 x 2 latents


def build_transformer() -> Transformer:
    """A float32 transformer with random weights from torch's global generator.

    As in the first miniature, its blocks start as the identity and its output as zeros.
    """
    model: Transformer = QwenImage21Transformer2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        context_in_dim=TEXT_WIDTH,
        axes_dims_rope=ROPE_AXES,
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in (model.modulation[1], model.norm_out.linear, model.proj_out):
        nn.init.zeros_(module.weight)
    return model


def build_text_encoder() -> TextEncoder:
    """A float32 Qwen3-VL with random weights from torch's global generator."""
    ids = build_tokenizer().get_added_vocab()
    text = {
        "vocab_size": EMBEDDING_ROWS,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": TEXT_WIDTH * 3,
        "num_hidden_layers": TEXT_LAYERS,
        "num_attention_heads": TEXT_HEADS,
        "num_key_value_heads": TEXT_HEADS // 2,
        "head_dim": TEXT_WIDTH // TEXT_HEADS,
        "max_position_embeddings": 1024,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_interleaved": True,
            "mrope_section": [6, 5, 5],
        },
        "initializer_range": 0.05,
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": VISION_LAYERS,
        "hidden_size": VISION_WIDTH,
        "intermediate_size": 2 * VISION_WIDTH,
        "num_heads": 2,
        "out_hidden_size": TEXT_WIDTH,
        "patch_size": VISION_PATCH,
        "spatial_merge_size": VISION_MERGE,
        "num_position_embeddings": (PIXELS // VISION_PATCH) ** 2,
        "deepstack_visual_indexes": [0],
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,  # its head is never used
    )
    return Qwen3VLForConditionalGeneration(config)


def build_image_processor() -> Any:
    """Normalizes to [-1, 1], and neither enlarges nor shrinks images of up to 256 pixels."""
    return Qwen2VLImageProcessorPil(
        patch_size=VISION_PATCH,
        merge_size=VISION_MERGE,
        temporal_patch_size=2,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        size={"shortest_edge": (2 * FACTOR) ** 2, "longest_edge": (4 * PIXELS) ** 2},
    )


def build_vae() -> Vae:
    """A float32 autoencoder for RGBA that downsamples by 16.

    Alpha is always opaque when decoded: no image of the dataset is transparent. The posterior has a
    log variance of -20, so that `sample()` and `mode()` are nearly equal.
    """
    vae: Vae = AutoencoderKLQwenImage21(
        base_dim=16,
        decoder_base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False] * HALVINGS,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
    with torch.no_grad():
        vae.quant_conv.weight[LATENT_CHANNELS:].zero_()
        vae.quant_conv.bias[LATENT_CHANNELS:] = -20.0
        vae.decoder.conv_out.weight[3].zero_()
        vae.decoder.conv_out.bias[3] = 1.0
    return vae


CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}"
    "{%- else %}{%- for part in message.content %}"
    "{%- if part.type == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- else %}{{- part.text }}{%- endif %}"
    "{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
MODEL_INDEX: dict[str, Any] = {
    "_class_name": "QwenImage21Pipeline",
    "_diffusers_version": diffusers_version,
    "processor": ["transformers", "Qwen3VLProcessor"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3VLForConditionalGeneration"],
    "transformer": ["diffusers", "QwenImage21Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage21"],
}


def write_base(folder: Path, transformer: Transformer, text_encoder: TextEncoder, vae: Vae) -> None:
    """Writes the base in the Hub's layout, atomically, with modules in their dtype."""
    with written(folder, MODEL_INDEX) as scratch:
        transformer.save_pretrained(scratch / "transformer")
        text_encoder.save_pretrained(scratch / "text_encoder")
        vae.save_pretrained(scratch / "vae")
        scheduler: Any = build_scheduler()
        scheduler.save_pretrained(scratch / "scheduler")
        processor, tokenizer = scratch / "processor", build_tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.save_pretrained(processor)
        images: Any = build_image_processor()
        images.save_pretrained(processor)
        # For Qwen3VLProcessor, which has a processor of videos too.
        video = images.to_dict() | {"video_processor_type": "Qwen3VLVideoProcessor"}
        video.pop("image_processor_type", None)
        (processor / "video_preprocessor_config.json").write_text(
            json.dumps(video, indent=2) + "\n"
        )
