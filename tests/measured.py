"""Models of any depth, and what a step on them keeps."""

from typing import Any

import torch
from torch import nn

from adapters.lora import Lora
from families.family import Family
from trainer.learning.loss import flow_loss
from trainer.memory.step_cost import Shape


def of_depth(family: Family, blocks: int) -> Family:
    """The family with a transformer of so many blocks in its trunk, everything else as it is."""
    config = dict(family.transformer.config)
    config["n_layers" if "n_layers" in config else "num_layers"] = blocks
    with torch.device(family.device):
        transformer = family.model_class("transformer").from_config(config)
    family.transformer_config = config
    vars(family)["transformer"] = nn.Module.to(transformer, family.dtype).requires_grad_(False)
    return family


def saved_bytes(family: Family, lora: Lora, shape: Shape) -> int:
    """What autograd keeps after a forward pass, weights left out: PyTorch's own account."""
    weights = {each.untyped_storage()._cdata for each in family.transformer.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    rows, columns = family.latent_size(shape.width, shape.height)
    on: dict[str, Any] = {"device": family.device}
    latents = torch.randn(shape.batch_size, family.latent_channels, rows, columns, **on)
    width = family.text_encoder.get_input_embeddings().weight.shape[1]
    text = [torch.randn(shape.text_tokens, width, dtype=family.dtype, **on)] * shape.batch_size
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = flow_loss(family, latents, latents, torch.full((shape.batch_size,), 0.5, **on), text)
    assert loss.requires_grad
    return sum(size for size, _ in kept.values())
