"""Base models with random weights in the Hub's layout, and images to train on.

Everything that a run does can be run on them without a download: they only know nothing. Widths
are the published ones, or tiny for a CPU; the number of blocks can be lower than published.
"""

import io
import json
import math
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from families.base import Base
from families.family import Family
from families.registry import family_of, find_base

SCHEDULERS: dict[str, dict[str, Any]] = {  # as published
    "z_image": {"shift": 3.0},
    "qwen_image": {
        "shift": 1.0,
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 0.9,
        "base_image_seq_len": 256,
        "max_image_seq_len": 8192,
        "shift_terminal": 0.02,
        "time_shift_type": "exponential",
    },
}
SCHEDULERS["qwen_image_21"] = SCHEDULERS["qwen_image"]
BLOCKS = {  # the field of the config
    "z_image": "n_layers",
    **dict.fromkeys(("qwen_image", "qwen_image_21"), "num_layers"),
}
TEXT_LAYERS = "num_hidden_layers"

_ROPE = {"rope_type": "default", "rope_theta": 1_000_000.0}
TINY: dict[str, dict[str, dict[str, Any]]] = {
    "z_image": {
        "transformer": {
            **{"dim": 64, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2},
            **{"cap_feat_dim": 64, "axes_dims": [8, 12, 12], "axes_lens": [1536, 512, 512]},
        },
        "text_encoder": {
            **{"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128},
            **{"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
            **{"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": _ROPE},
        },
        "vae": {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4},
    },
    "qwen_image": {
        "transformer": {
            **{"num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2},
            **{"joint_attention_dim": 64, "axes_dims_rope": (8, 12, 12)},
        },
        "text_encoder": {
            "text_config": {
                **{"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128},
                **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
                "rope_parameters": _ROPE | {"mrope_section": [4, 6, 6]},
            },
            "vision_config": {
                **{"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2},
                **{"out_hidden_size": 64, "fullatt_block_indexes": [0]},
            },
            "tie_word_embeddings": False,
        },
        "vae": {"base_dim": 8},
    },
    "qwen_image_21": {
        "transformer": {
            **{"num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2},
            **{"context_in_dim": 64, "axes_dims_rope": (8, 12, 12)},
        },
        "text_encoder": {
            "text_config": {
                **{"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128},
                **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
                "head_dim": 32,
                "rope_parameters": _ROPE | {"mrope_section": [6, 5, 5], "mrope_interleaved": True},
            },
            "vision_config": {
                **{"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2},
                **{"out_hidden_size": 64, "deepstack_visual_indexes": [0]},
            },
            "tie_word_embeddings": False,
        },
        "vae": {"base_dim": 8, "decoder_base_dim": 8},
    },
}


def write_random_base(
    vault: Path,
    base: Base,
    device: torch.device,
    blocks: int | None = None,
    text_layers: int | None = None,
    tiny: bool = False,
) -> Path:
    """Writes a base into a `$MODEL_VAULT`, with its training adapter; returns its folder.

    Models are made on `device` and written in bfloat16, or tiny ones in float32. `blocks` and
    `text_layers` are fewer than published to save disk and time.
    """
    family, folder = family_of(base), vault / base.hub_id
    dtype = torch.float32 if tiny else torch.bfloat16
    for component in ("transformer", "text_encoder", "vae"):
        config = _config(family, component, tiny)
        if component == "transformer" and blocks is not None:
            config[BLOCKS[family.name]] = blocks
        if component == "text_encoder" and text_layers is not None:
            config.get("text_config", config)[TEXT_LAYERS] = text_layers
        if "vision_config" in config:  # never run
            first = dict.fromkeys(("fullatt_block_indexes", "deepstack_visual_indexes"), [0])
            config["vision_config"] |= {"depth": 1, **first}
        model = _filled(_made(family, component, config), device, dtype)
        model.save_pretrained(folder / component)
        if component == "transformer" and base.training_adapters:
            _write_adapters(vault, base, model, family.trunk)
        del model
    scheduler: Any = FlowMatchEulerDiscreteScheduler(1000, **SCHEDULERS[family.name])
    scheduler.save_pretrained(folder / "scheduler")
    included = find_base("miniature-turbo").included
    assert included is not None
    tokenizer = folder / family.tokenizer_folder
    shutil.copytree(included / "tokenizer", tokenizer, dirs_exist_ok=True)
    index = {"_class_name": family.classes.pipeline}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def random_model(
    family: type[Family], component: str, device: torch.device, changes: Mapping[str, Any]
) -> Any:
    """A tiny model of the published class, with changes to its (text) config."""
    config = _config(family, component, tiny=True)
    config.get("text_config", config).update(changes)
    return _filled(_made(family, component, config), device, torch.float32)


def write_images(file: Path, edge: int, count: int = 12) -> Path:
    """A dataset of images in three aspect ratios, with captions of several lengths."""
    sizes = [(edge, edge), (edge * 9 // 8, edge * 7 // 8), (edge * 7 // 8, edge * 9 // 8)]
    with zipfile.ZipFile(file, "w") as archive:
        for number in range(count):
            width, height = sizes[number % len(sizes)]
            image, content = Image.effect_noise((width, height), 40 + number), io.BytesIO()
            image.convert("RGB").save(content, "JPEG", quality=90)
            archive.writestr(f"{number:02d}.jpg", content.getvalue())
            caption = "a photo of TOK" + " in the snow" * (number % 4 * 6)
            archive.writestr(f"{number:02d}.txt", caption)
    return file


def _config(family: type[Family], component: str, tiny: bool) -> dict[str, Any]:
    published = family.published[component]
    changed = TINY[family.name][component] if tiny else {}
    return json.loads(json.dumps({**published, **changed}))  # a copy, with lists for tuples


def _made(family: type[Family], component: str, config: Mapping[str, Any]) -> Any:
    """A model of the config without values."""
    model_class = family.model_class(component)
    with init_empty_weights():
        if component == "text_encoder":
            return model_class(model_class.config_class.from_dict(dict(config)))
        return model_class.from_config(dict(config))


@torch.no_grad()
def _filled(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The model with random weights that keep the size of what they act on; norms are ones."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            values = torch.empty(parameter.shape, device=device, dtype=dtype)
            if isinstance(module, nn.Embedding):
                values.normal_(std=0.02)
            elif parameter.ndim > 1:
                values.normal_(std=1 / math.sqrt(parameter[0].numel()))
            else:
                values.fill_(1.0 if name in ("weight", "gamma") else 0.0)
            setattr(module, name, nn.Parameter(values, requires_grad=False))
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.eval().to(device)


def _write_adapters(vault: Path, base: Base, transformer: nn.Module, trunk: str) -> None:
    """Random training adapters of rank 4 under the published names."""
    layers = {
        name: each
        for name, each in transformer.named_modules()
        if isinstance(each, nn.Linear) and name.startswith(f"{trunk}.")
    }
    tensors = {}
    for name, layer in layers.items():
        down = torch.randn(4, layer.in_features) / 8
        up = torch.randn(layer.out_features, 4) / 1024
        tensors[f"diffusion_model.{name}.lora_A.weight"] = down.to(torch.bfloat16)
        tensors[f"diffusion_model.{name}.lora_B.weight"] = up.to(torch.bfloat16)
    for adapter in base.training_adapters.values():
        folder = vault / adapter.hub_id
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / adapter.name)
