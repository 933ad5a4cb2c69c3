"""Loads the included weights, and merges the training adapter.

`miniature` has only a transformer and a scheduler; it uses text encoder, tokenizer and VAE of
`miniature-turbo`.
"""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Transformer2DModel,
    ZImageTransformer2DModel,
)
from safetensors.torch import load_file
from transformers import Qwen2Tokenizer, Qwen3Model, Qwen3VLForConditionalGeneration

from miniature.device import DEVICE
from miniature.models import Transformer
from miniature.qwen.sampling import QwenBase
from miniature.sampling import Base

WEIGHTS = Path(__file__).parent / "weights"
JUDGE = "judge.safetensors"
TURBO, UNDISTILLED, QWEN = "miniature-turbo", "miniature", "miniature-qwen"
ADAPTER = "training_adapter/miniature_turbo_training_adapter.safetensors"
ADAPTER_PREFIX = "diffusion_model."


def load_base(name: str, weights: Path = WEIGHTS, dtype: torch.dtype = torch.float32) -> Base:
    """Loads a base by name, frozen. Raises FileNotFoundError naming a missing folder."""
    own, shared = weights / name, weights / TURBO
    for folder in (own / "transformer", shared / "text_encoder", shared / "vae"):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is missing; build it: python -m miniature.build")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(own / "scheduler")
    base = Base(
        transformer=ZImageTransformer2DModel.from_pretrained(
            own / "transformer", torch_dtype=dtype
        ),
        text_encoder=Qwen3Model.from_pretrained(shared / "text_encoder", dtype=dtype),
        tokenizer=Qwen2Tokenizer.from_pretrained(shared / "tokenizer"),
        vae=AutoencoderKL.from_pretrained(shared / "vae", torch_dtype=torch.float32),
        shift=float(scheduler.config.shift),
    )
    for module in (base.transformer, base.text_encoder, base.vae):
        module.to(DEVICE).eval().requires_grad_(False)
    return base


def load_qwen(weights: Path = WEIGHTS, dtype: torch.dtype = torch.float32) -> QwenBase:
    """Loads the second miniature, frozen. Raises FileNotFoundError if it is missing."""
    own = weights / QWEN
    if not own.is_dir():
        raise FileNotFoundError(f"{own} is missing; build it: python -m miniature.build")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(own / "scheduler")
    base = QwenBase(
        transformer=QwenImage21Transformer2DModel.from_pretrained(
            own / "transformer", torch_dtype=dtype
        ),
        text_encoder=Qwen3VLForConditionalGeneration.from_pretrained(
            own / "text_encoder", dtype=dtype
        ),
        tokenizer=Qwen2Tokenizer.from_pretrained(own / "processor"),
        vae=AutoencoderKLQwenImage21.from_pretrained(own / "vae", torch_dtype=torch.float32),
        shift=float(scheduler.config.shift),
    )
    for module in (base.transformer, base.text_encoder, base.vae):
        module.to(DEVICE).eval().requires_grad_(False)
    return base


def merge_adapter(transformer: Transformer, path: Path, strength: float = 1.0) -> int:
    """Adds B A to every weight of the adapter, in float32; returns the number of changed weights.

    Alpha is the rank, as in the published adapter. Raises KeyError for a name that the model does
    not have and ValueError if nothing was merged.
    """
    tensors = load_file(path)
    modules = dict(transformer.named_modules())
    merged = 0
    for key, down in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removesuffix(".lora_A.weight")
        target = modules.get(name.removeprefix(ADAPTER_PREFIX))
        if target is None:
            raise KeyError(f"{path}: {name} is not a module of the transformer")
        weight = target.weight
        assert isinstance(weight, torch.Tensor)
        delta = (tensors[f"{name}.lora_B.weight"].float() @ down.float()).to(weight.device)
        weight.data = (weight.data.float() + strength * delta).to(weight.dtype)
        merged += 1
    if not merged:
        raise ValueError(f"{path} contains no lora_A tensors")
    return merged
