"""Loads the components of a base model: configs, scheduler, tokenizer, and the models, frozen."""

from typing import TYPE_CHECKING, Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from families.base import Base
from families.quantization import (
    QUANTIZATIONS,
    Change,
    apply_storage,
    quantize_transformer,
)
from families.repository import component_folder, transformer_source
from families.sharding import shard
from families.weights import from_one_file, whole

if TYPE_CHECKING:
    from families.family import Family


def load_config(model_class: Any, base: Base, component: str) -> dict[str, Any]:
    """The config of the transformer or the VAE."""
    if component == "transformer":
        return model_class.load_config(_transformer_config(base))
    return model_class.load_config(component_folder(base, component))


def load_scheduler(base: Base) -> Any:
    return FlowMatchEulerDiscreteScheduler.from_pretrained(component_folder(base, "scheduler"))


def load_tokenizer(base: Base, folder: str) -> Any:
    return AutoTokenizer.from_pretrained(component_folder(base, folder), trust_remote_code=False)


def load_transformer(family: "Family", change: Change | None) -> Any:
    """As `Family.load_transformer`: in the family's `dtype`, stored as in its `storage`.

    In CPU memory, unquantized weights are memory-mapped files: clean pages that the system can
    drop. A quantized model is made from them weight by weight, so that at no time more than one
    weight is in CPU memory in addition to the quantized ones. A sharded model is quantized there,
    whole, before it is split.
    """
    storage, device, dtype = family.storage, family.device, family.dtype
    on_cpu = storage.offload or storage.shard  # first
    in_place = storage.quantize == "none" and not on_cpu
    model = _from_files(family, family.base, device if in_place else torch.device("cpu"))
    if storage.quantize != "none":
        where = torch.device("cpu") if on_cpu else device
        model = quantize_transformer(model, storage.quantize, where, dtype, change)
    elif storage.shard:
        return shard(model, device, change)
    elif change is not None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(change(name, parameter))
    if not in_place:
        model = apply_storage(model, storage, device)
    return model.eval().requires_grad_(False)


def original_transformer(family: "Family", base: Base | None = None) -> nn.Module:
    """The transformer as in its files, in CPU memory, in addition to the one in use.

    base: another one of the family; default: the family's.
    """
    return _from_files(family, base or family.base, torch.device("cpu"))


def _from_files(family: "Family", base: Base, device: torch.device) -> nn.Module:
    """The unquantized transformer, straight from the files to a device."""
    model_class, dtype = family.model_class("transformer"), family.dtype
    source = transformer_source(base)
    if source.is_file():
        model = from_one_file(model_class, source, _transformer_config(base), dtype)
    else:
        model = whole(model_class, source, dtype, device_map={"": device})
    return _frozen(model, device)


def load_vae(family: "Family") -> nn.Module:
    """The autoencoder, in float32."""
    folder = component_folder(family.base, "vae")
    return _frozen(whole(family.model_class("vae"), folder, torch.float32), family.device)


def load_text_encoder(family: "Family") -> nn.Module:
    """The language model without its vocabulary head, in the family's `dtype` or quantized."""
    folder = component_folder(family.base, "text_encoder")
    options: dict[str, Any] = {}
    if family.storage.quantize_text != "none":
        quantization = QUANTIZATIONS[family.storage.quantize_text]
        options["quantization_config"] = quantization.text_encoder_config(family.dtype, [])
        options["device_map"] = {"": family.device}
    model = whole(family.model_class("text_encoder"), folder, family.dtype, **options)
    if family.storage.shard:
        return shard(family._reading_part(model).eval(), family.device)
    return _frozen(family._reading_part(model), family.device)


def load_vision_encoder(family: "Family") -> nn.Module:
    """The vision part of the text encoder alone, in the family's `dtype`, never quantized."""
    folder = component_folder(family.base, "text_encoder")
    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    names = {r"^(?:model\.)?visual\.": ""}  # of its weights in the whole model's files
    options = {"config": config.vision_config, "key_mapping": names}
    return _frozen(whole(AutoModel, folder, family.dtype, **options), family.device)


def load_image_processor(base: Base) -> Any:
    """The image processor of a vision encoder, as its files in the repository say."""
    from transformers import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil.from_pretrained(component_folder(base, "processor"))


def linear_layers(model_class: Any, config: Any) -> list[str]:
    """Names of all linear layers of a transformer, without its weights."""
    with torch.device("meta"):
        model = model_class.from_config(config)
    return [name for name, each in model.named_modules() if isinstance(each, nn.Linear)]


def _transformer_config(base: Base) -> Any:
    """The folder with the transformer's config.json; a single file uses `completed_by`'s."""
    source = transformer_source(base)
    return source if source.is_dir() else component_folder(base, "transformer")


def _frozen(model: nn.Module, device: torch.device) -> nn.Module:
    return model.to(device).eval().requires_grad_(False)
