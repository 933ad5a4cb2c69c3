"""Transformers of the published classes with tiny layers, and as many of them as is asked for."""

from typing import Any

import torch
from diffusers import (
    QwenImage21Transformer2DModel,
    QwenImageTransformer2DModel,
    ZImageTransformer2DModel,
)
from torch import nn

from families.registry import FAMILIES

# Blocks of the published models, whose linear layers a LoRA touches.
PUBLISHED_BLOCKS = {"Z-Image": 30, "Qwen-Image": 60, "Qwen-Image-2.1": 32}


def z_image(blocks: int = 2, seed: int = 0) -> Any:
    """Z-Image at a width of 64, with one refiner of each kind."""
    return _made(
        ZImageTransformer2DModel,
        seed,
        dim=64,
        n_layers=blocks,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=64,
        axes_dims=[8, 12, 12],
        axes_lens=[1536, 512, 512],
    )


def qwen_image(blocks: int = 2, seed: int = 0) -> Any:
    """Qwen-Image at a width of 64."""
    return _made(
        QwenImageTransformer2DModel,
        seed,
        num_layers=blocks,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=64,
        axes_dims_rope=(8, 12, 12),
    )


def qwen_image_21(blocks: int = 2, seed: int = 0) -> Any:
    """Qwen-Image-2.1 at a width of 64."""
    return _made(
        QwenImage21Transformer2DModel,
        seed,
        in_channels=16,
        out_channels=16,
        num_layers=blocks,
        attention_head_dim=32,
        num_attention_heads=2,
        context_in_dim=64,
        axes_dims_rope=(8, 12, 12),
    )


MODELS = {"Z-Image": z_image, "Qwen-Image": qwen_image, "Qwen-Image-2.1": qwen_image_21}


def linears(transformer: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer by name."""
    return {n: each for n, each in transformer.named_modules() if isinstance(each, nn.Linear)}


def block_linears(transformer: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the blocks: 8 in each of Z-Image's, 14 in each of Qwen-Image's, 7 in
    each of Qwen-Image-2.1's."""
    blocks = tuple(f"{family.trunk}." for family in FAMILIES.values())
    return {name: each for name, each in linears(transformer).items() if name.startswith(blocks)}


def _made(model_class: Any, seed: int, **config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(**config).eval().requires_grad_(False)
        for parameter in model.parameters():  # some start empty or as zeros
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.normal_().mul_(scale)
    return model
