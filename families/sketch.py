"""A family without weights: the real classes at their real sizes on the meta device.

Shapes, types and the order of all products are those of the real thing, so memory and arithmetic
can be counted in seconds on any machine.
"""

from typing import Any

import torch
from torch import nn
from transformers import logging as transformers_log

from families.bases import Base
from families.family import Family
from families.loading import FAMILIES
from families.published import PUBLISHED
from families.repository import local_config

COMPONENTS = ("transformer", "text_encoder", "vae")


def configs(base: Base) -> dict[str, dict[str, Any]]:
    """Each component's config: the base's own where it is on this machine, else the published."""
    published = PUBLISHED[base.family]
    found = {name: local_config(base, name) for name in COMPONENTS}
    return {name: published[name] if own is None else own for name, own in found.items()}


def sketch(base: Base, dtype: torch.dtype = torch.bfloat16) -> Family:
    """The base's family on the meta device; only its tokenizer and scheduler are missing."""
    family_class, found = FAMILIES[base.family], configs(base)
    family = family_class.__new__(family_class)
    family.base, family.device, family.dtype = base, torch.device("meta"), dtype
    level = transformers_log.get_verbosity()
    transformers_log.set_verbosity_error()
    try:
        with torch.device("meta"):
            transformer = family_class.transformer_class.from_config(found["transformer"])
            vae = family_class.vae_class.from_config(found["vae"])
            config_class = family_class.text_encoder_class.config_class
            text_encoder = family_class.text_encoder_class(
                config_class.from_dict(found["text_encoder"])
            )
    finally:
        transformers_log.set_verbosity(level)
    # Every value, defaults included, as a loaded config has them.
    family.transformer_config, family.vae_config = dict(transformer.config), dict(vae.config)
    family.__dict__.update(
        transformer=_still(transformer, dtype),
        vae=_still(vae, torch.float32),
        text_encoder=_still(family._reading_part(text_encoder), dtype),
    )
    return family


def outline(base: Base) -> nn.Module:
    """The base's transformer alone, on the meta device: its layers, their names and shapes."""
    found = local_config(base, "transformer")
    config = PUBLISHED[base.family]["transformer"] if found is None else found
    with torch.device("meta"):
        model: nn.Module = FAMILIES[base.family].transformer_class.from_config(config)
    return model


def _still(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return nn.Module.to(model, dtype).eval().requires_grad_(False)
