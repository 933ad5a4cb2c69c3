"""The miniature's architectures, and writing them in the Hub's layout.

Classes of diffusers and transformers with a few million parameters. `write_random` writes a base
with random weights for tests; training starts from the same builders.
"""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImageTransformer2DModel,
)
from diffusers import __version__ as diffusers_version
from torch import nn
from transformers import Qwen3Config, Qwen3Model

from miniature.tokenizer import build_tokenizer

# Neither library's classes show their modules' methods to a type checker.
Transformer: TypeAlias = Any  # ZImageTransformer2DModel
TextEncoder: TypeAlias = Any  # Qwen3Model
Vae: TypeAlias = Any  # AutoencoderKL

PIXELS = 64  # native side length
EMBEDDING_ROWS = 1088  # 64 spare rows beyond the 1,024 tokens, as real Qwen checkpoints have some


@dataclass(frozen=True)
class Architecture:
    """Sizes of the miniature."""

    dim: int = 192  # width of the transformer
    layers: int = 5  # joint blocks
    refiner_layers: int = 1  # blocks for image tokens only, and for caption tokens only
    heads: int = 6
    rope_axes: tuple[int, int, int] = (8, 12, 12)  # frame, row, column; adds up to dim / heads
    latent_channels: int = 8
    vae_widths: tuple[int, ...] = (16, 32, 64)  # two halvings: 64 pixels become 16 x 16 latents
    text_width: int = 128
    text_layers: int = 4  # the last one is not used: the pipeline takes hidden_states[-2]
    text_heads: int = 4
    sigma_shift: float = 3.0  # static, as Z-Image-Turbo's


ARCHITECTURE = Architecture()


def build_transformer(arch: Architecture = ARCHITECTURE) -> Transformer:
    """A float32 transformer with random weights from torch's global generator.

    Blocks are initialized as the identity (adaLN gates at zero) and the output with zeros, as in
    DiT (Peebles & Xie 2023), for a stable start of training.
    """
    model: Transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=arch.latent_channels,
        dim=arch.dim,
        n_layers=arch.layers,
        n_refiner_layers=arch.refiner_layers,
        n_heads=arch.heads,
        n_kv_heads=arch.heads,
        norm_eps=1e-5,
        qk_norm=True,
        cap_feat_dim=arch.text_width,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=list(arch.rope_axes),
        axes_lens=[1024, 512, 512],
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(model.x_pad_token, std=0.02)
    nn.init.normal_(model.cap_pad_token, std=0.02)
    for name, parameter in model.named_parameters():
        if "adaLN_modulation" in name or "all_final_layer.2-1.linear" in name:
            nn.init.zeros_(parameter)
    return model


def build_text_encoder(arch: Architecture = ARCHITECTURE) -> TextEncoder:
    """A float32 Qwen3 with random weights from torch's global generator."""
    config = Qwen3Config(
        vocab_size=EMBEDDING_ROWS,
        hidden_size=arch.text_width,
        intermediate_size=arch.text_width * 3,
        num_hidden_layers=arch.text_layers,
        num_attention_heads=arch.text_heads,
        num_key_value_heads=arch.text_heads // 2,
        head_dim=arch.text_width // arch.text_heads,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.05,
        use_cache=False,
        tie_word_embeddings=False,
        architectures=["Qwen3Model"],
    )
    return Qwen3Model(config)


def build_vae(arch: Architecture = ARCHITECTURE) -> Vae:
    """A float32 autoencoder that downsamples by 4.

    Its posterior has a log variance of -20, so that `sample()` and `mode()` are nearly equal.
    """
    vae: Vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(arch.vae_widths),
        up_block_types=("UpDecoderBlock2D",) * len(arch.vae_widths),
        block_out_channels=arch.vae_widths,
        layers_per_block=1,
        latent_channels=arch.latent_channels,
        norm_num_groups=8,
        sample_size=PIXELS,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
    )
    half = arch.latent_channels
    with torch.no_grad():
        vae.encoder.conv_out.weight[half:].zero_()
        vae.encoder.conv_out.bias[half:] = -20.0
    return vae


def build_scheduler(shift: float = ARCHITECTURE.sigma_shift) -> FlowMatchEulerDiscreteScheduler:
    """Flow-matching Euler steps over 1,000 model times with a static shift."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000, shift=shift, use_dynamic_shifting=False
    )


MODEL_INDEX: dict[str, Any] = {
    "_class_name": "ZImagePipeline",
    "_diffusers_version": diffusers_version,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3Model"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "ZImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_base(
    folder: Path,
    transformer: Transformer,
    text_encoder: TextEncoder | None = None,
    vae: Vae | None = None,
    shift: float = ARCHITECTURE.sigma_shift,
) -> None:
    """Writes a base in the Hub's layout, atomically.

    Modules are written in their dtype. Without `text_encoder` (and then without tokenizer) and
    `vae`, the folder has only model_index.json, transformer/ and scheduler/.
    """
    with written(folder, MODEL_INDEX) as scratch:
        transformer.save_pretrained(scratch / "transformer")
        scheduler: Any = build_scheduler(shift)
        scheduler.save_pretrained(scratch / "scheduler")
        if text_encoder is not None:
            text_encoder.save_pretrained(scratch / "text_encoder")
            build_tokenizer().save_pretrained(scratch / "tokenizer")
        if vae is not None:
            vae.save_pretrained(scratch / "vae")


@contextmanager
def written(folder: Path, index: dict[str, Any]) -> Iterator[Path]:
    """A folder for a base's parts, which replaces `folder` at the end."""
    scratch = folder.with_name(folder.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    yield scratch
    for file in scratch.glob("*/config.json"):  # without the path a module was loaded from
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (scratch / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)


def write_random(
    folder: Path,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    arch: Architecture = ARCHITECTURE,
) -> None:
    """Writes a base with random weights into `folder`; deterministic by seed.

    Unlike at the start of training, no weight is zero, so that all of them have an effect. The
    caller's random state is not changed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = build_transformer(arch)
        text_encoder, vae = build_text_encoder(arch), build_vae(arch)
        for parameter in transformer.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.05)
        vae.register_to_config(scaling_factor=0.5, shift_factor=0.1)
    write_base(Path(folder), transformer.to(dtype), text_encoder.to(dtype), vae.to(dtype))
