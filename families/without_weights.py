"""Base models without weights: their classes at full size on the meta device.

Shapes, dtypes and operations are those of the real model, so memory and FLOPs can be counted in
seconds on any machine.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from families.base import Base, Config
from families.family import Family, WeightStorage
from families.registry import family_of
from families.repository import local_config
from families.weights import quiet_transformers

COMPONENTS = ("transformer", "text_encoder", "vae")


def config_of(base: Base, component: str) -> dict[str, Any]:
    """A component's config: the base's if it is on this machine, otherwise the published one."""
    own = local_config(base, component)
    config: Config = family_of(base).published[component] if own is None else own
    return dict(config)


def family_without_weights(base: Base, dtype: torch.dtype = torch.bfloat16) -> Family:
    """The base's family on the meta device, without tokenizer and scheduler."""
    family_class = family_of(base)
    found = {name: config_of(base, name) for name in COMPONENTS}
    family = family_class.__new__(family_class)
    family.base, family.device, family.dtype = base, torch.device("meta"), dtype
    family.storage = WeightStorage()
    with quiet_transformers(), _no_values():
        transformer = family_class.model_class("transformer").from_config(found["transformer"])
        vae = family_class.model_class("vae").from_config(found["vae"])
        text_class = family_class.model_class("text_encoder")
        text_encoder = text_class(text_class.config_class.from_dict(found["text_encoder"]))
    # All values, defaults included, as in a loaded config.
    family.transformer_config, family.vae_config = dict(transformer.config), dict(vae.config)
    if base.most_references:
        family.__dict__["vision_encoder"] = _frozen(text_encoder.model.visual, dtype)
    family.__dict__.update(
        transformer=_frozen(transformer, dtype),
        vae=_frozen(vae, torch.float32),
        text_encoder=_frozen(family._reading_part(text_encoder), dtype),
    )
    return family


def transformer_without_weights(base: Base) -> nn.Module:
    """The base's transformer on the meta device, for layer names and shapes."""
    with _no_values():
        model: nn.Module = (
            family_of(base).model_class("transformer").from_config(config_of(base, "transformer"))
        )
    return model


@contextmanager
def _no_values() -> Iterator[None]:
    """The meta device. Linear layers skip their initialization, which takes most of the time."""
    initialize = nn.Linear.reset_parameters
    nn.Linear.reset_parameters = lambda self: None  # type: ignore[method-assign]
    try:
        with torch.device("meta"):
            yield
    finally:
        nn.Linear.reset_parameters = initialize  # type: ignore[method-assign]


def _frozen(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return nn.Module.to(model, dtype).eval().requires_grad_(False)
