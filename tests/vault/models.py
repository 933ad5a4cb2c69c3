"""Small random models of the real classes, in the Hub's layout, under the published names.

Names, file layouts, schedules and special configuration are those of the published repositories;
widths and depths are not. Sibling repositories share their text encoder, tokenizer and VAE as hard
links, so a test that edits a file must copy the repository first.
"""

import json
import math
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Transformer2DModel,
    QwenImageTransformer2DModel,
    ZImageTransformer2DModel,
)
from diffusers import __version__ as diffusers_version
from safetensors.torch import save_file
from torch import nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from .tokenizers import qwen3_folder, qwen25_folder

Z_IMAGE_TURBO = "Tongyi-MAI/Z-Image-Turbo"
Z_IMAGE = "Tongyi-MAI/Z-Image"
Z_IMAGE_DE_TURBO = "ostris/Z-Image-De-Turbo"
TURBO_ADAPTER = "ostris/zimage_turbo_training_adapter"
QWEN_IMAGE = "Qwen/Qwen-Image"
QWEN_IMAGE_2512 = "Qwen/Qwen-Image-2512"
QWEN_IMAGE_EDIT_2511 = "Qwen/Qwen-Image-Edit-2511"
QWEN_IMAGE_EDIT_2509 = "Qwen/Qwen-Image-Edit-2509"
QWEN_IMAGE_21 = "Qwen/Qwen-Image-2.1"
QWEN_IMAGE_21_TURBO = "Qwen/Qwen-Image-2.1-Turbo"
QWEN3_VL = "Qwen/Qwen3-VL-2B-Instruct"

DE_TURBO_FILE = "z_image_de_turbo_v1_bf16.safetensors"
TEXT_WIDTH = 64  # hidden size of both text encoders
SHARED = ("text_encoder", "tokenizer", "vae")  # what sibling repositories have in common

# diffusers loads its base classes lazily, so a type checker finds no method of its models.
DiffusersModel: TypeAlias = Any


def write_vault(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Writes five bases and the turbo adapter below `folder`, a `$MODEL_VAULT`; returns it.

    The same seed gives the same weights. Each transformer has weights of its own, Turbo's in
    several shards.
    """
    turbo, qwen = folder / Z_IMAGE_TURBO, folder / QWEN_IMAGE
    # Building models draws from torch's global generator, which belongs to the tests.
    with torch.random.fork_rng(devices=[]):
        qwen3_text_encoder(dtype, seed).save_pretrained(turbo / "text_encoder")
        z_image_vae(dtype, seed).save_pretrained(turbo / "vae")
        shutil.copytree(qwen3_folder(), turbo / "tokenizer")
        qwen25_text_encoder(dtype, seed).save_pretrained(qwen / "text_encoder")
        qwen_image_vae(dtype, seed).save_pretrained(qwen / "vae")
        shutil.copytree(qwen25_folder(), qwen / "tokenizer")

        for name, shift in ((Z_IMAGE_TURBO, 3.0), (Z_IMAGE, 6.0)):
            z_image_scheduler(shift).save_pretrained(folder / name / "scheduler")
            _write_index(folder / name, Z_IMAGE_COMPONENTS)
        for name in (QWEN_IMAGE, QWEN_IMAGE_2512):
            qwen_image_scheduler().save_pretrained(folder / name / "scheduler")
            _write_index(folder / name, QWEN_IMAGE_COMPONENTS)

        for name in (Z_IMAGE_TURBO, Z_IMAGE, Z_IMAGE_DE_TURBO):
            shard = "500KB" if name == Z_IMAGE_TURBO else "10GB"
            transformer = z_image_transformer(name, dtype, seed)
            transformer.save_pretrained(folder / name / "transformer", max_shard_size=shard)
        for name in (QWEN_IMAGE, QWEN_IMAGE_2512):
            transformer = qwen_image_transformer(name, dtype, seed)
            transformer.save_pretrained(folder / name / "transformer")
    for part in SHARED:
        _link(turbo / part, folder / Z_IMAGE / part)
        _link(qwen / part, folder / QWEN_IMAGE_2512 / part)
    for number, version in enumerate(("v1", "v2")):
        write_turbo_adapter(folder / TURBO_ADAPTER, version, seed + number)
    return folder


def write_qwen_image_edit(folder: Path, seed: int = 0) -> Path:
    """Writes both editing models below `folder`, a `$MODEL_VAULT`, in float32; returns it."""
    first, other = folder / QWEN_IMAGE_EDIT_2511, folder / QWEN_IMAGE_EDIT_2509
    with torch.random.fork_rng(devices=[]):
        qwen25_text_encoder(torch.float32, seed).save_pretrained(first / "text_encoder")
        qwen_image_vae(torch.float32, seed).save_pretrained(first / "vae")
        shutil.copytree(qwen25_folder(), first / "tokenizer")
        _link(first / "tokenizer", first / "processor")
        Qwen2VLImageProcessorPil().save_pretrained(first / "processor")
        for place, zero_cond_t in ((first, True), (other, False)):
            name = f"{place.parent.name}/{place.name}"
            transformer = qwen_image_transformer(name, torch.float32, seed, zero_cond_t)
            transformer.save_pretrained(place / "transformer")
            qwen_image_scheduler().save_pretrained(place / "scheduler")
            _write_index(
                place,
                QWEN_IMAGE_COMPONENTS
                | {"_class_name": "QwenImageEditPlusPipeline"}
                | {"processor": ["transformers", "Qwen2VLProcessor"]},
            )
    for part in (*SHARED, "processor"):
        _link(first / part, other / part)
    return folder


def write_qwen_image_21(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Writes Qwen-Image-2.1 and its Turbo below `folder`, a `$MODEL_VAULT`; returns it.

    Their tokenizer is in `processor`, and Turbo's schedule in its `model_index.json`. Unlike the
    published ones, their image processor does not enlarge images.
    """
    base, turbo = folder / QWEN_IMAGE_21, folder / QWEN_IMAGE_21_TURBO
    with torch.random.fork_rng(devices=[]):
        qwen3_vl(dtype, seed).save_pretrained(base / "text_encoder")
        qwen_image_21_vae(dtype, seed).save_pretrained(base / "vae")
        shutil.copytree(qwen3_folder(), base / "processor")
        qwen3_image_processor().save_pretrained(base / "processor")
        for place, name in ((base, QWEN_IMAGE_21), (turbo, QWEN_IMAGE_21_TURBO)):
            qwen_image_21_transformer(name, dtype, seed).save_pretrained(place / "transformer")
    qwen_image_scheduler().save_pretrained(base / "scheduler")
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(turbo / "scheduler")
    for part in ("text_encoder", "processor", "vae"):
        _link(base / part, turbo / part)
    _write_index(base, QWEN_IMAGE_21_COMPONENTS)
    _write_index(turbo, QWEN_IMAGE_21_COMPONENTS | {"sample_sigmas": QWEN_IMAGE_21_SIGMAS})
    return folder


def write_turbo_adapter(folder: Path, version: str, seed: int = 0) -> Path:
    """A training adapter for the vault's Turbo in the published format; returns its file.

    All eight linears of every layer, as in the published file, without alpha keys.
    """
    linears = {
        **{f"attention.{name}": (64, 64) for name in ("to_q", "to_k", "to_v", "to_out.0")},
        **{"feed_forward.w1": (170, 64), "feed_forward.w3": (170, 64)},
        **{"feed_forward.w2": (64, 170), "adaLN_modulation.0": (256, 64)},
    }
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(2):
        for name, (rows, columns) in linears.items():
            key = f"diffusion_model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(4, columns, generator=draw) / 8
            tensors[f"{key}.lora_B.weight"] = torch.randn(rows, 4, generator=draw) / 32
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"zimage_turbo_training_adapter_{version}.safetensors"
    save_file({name: value.to(torch.bfloat16) for name, value in tensors.items()}, file)
    return file


def write_de_turbo_single_file(
    folder: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Path:
    """De-Turbo as one file in the original checkpoint's key layout; returns the file.

    `folder` is the repository itself and needs no `transformer/` then. The weights are those that
    `write_vault` gives De-Turbo for the same seed, rounded to `dtype`.
    """
    with torch.random.fork_rng(devices=[]):
        transformer = z_image_transformer(Z_IMAGE_DE_TURBO, dtype, seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(to_original_layout(transformer.state_dict()), folder / DE_TURBO_FILE)
    return folder / DE_TURBO_FILE


def write_qwen_text_encoder_old_layout(
    folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Path:
    """Qwen-Image's text encoder as older transformers wrote it; returns `folder`.

    Keys `model.layers…`, `visual…`, `lm_head.weight`, and a flat `config.json` whose language
    model has no section of its own. `folder` is the `text_encoder` folder. Same weights as
    `write_vault`'s.
    """
    with torch.random.fork_rng(devices=[]):
        encoder = qwen25_text_encoder(dtype, seed)
    renamed = {
        key.replace("model.language_model.", "model.").replace("model.visual.", "visual."): value
        for key, value in encoder.state_dict().items()
    }
    config = encoder.config.to_dict()
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    config |= {key: value for key, value in text.items() if key not in ("model_type", "dtype")}
    config["rope_theta"] = rope["rope_theta"]
    config["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    config["vision_config"]["model_type"] = "qwen2_5_vl"
    config["architectures"] = ["Qwen2_5_VLForConditionalGeneration"]
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    config.pop("dtype", None)
    _write_text_encoder(folder, renamed, config)
    return folder


def write_qwen_text_encoder_new_layout(
    folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Path:
    """Qwen-Image's text encoder under the modules' present names; returns `folder`.

    Keys `model.language_model.layers…`, `model.visual…`, `lm_head.weight`, which
    `save_pretrained` turns back into the old ones. `folder` is the `text_encoder` folder. Same
    weights as `write_vault`'s.
    """
    with torch.random.fork_rng(devices=[]):
        encoder = qwen25_text_encoder(dtype, seed)
    config = encoder.config.to_dict() | {"architectures": ["Qwen2_5_VLForConditionalGeneration"]}
    config["dtype"] = str(dtype).removeprefix("torch.")
    _write_text_encoder(folder, encoder.state_dict(), config)
    return folder


def to_original_layout(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A diffusers Z-Image state dict under the original checkpoint's keys.

    The inverse of diffusers' `convert_z_image_transformer_checkpoint_to_diffusers`, with the
    `norm_final.weight` that original checkpoints carry unused.
    """
    original = {}
    for key, value in state.items():
        if ".attention.to_q." in key:
            parts = [state[key.replace(".to_q.", f".to_{letter}.")] for letter in "qkv"]
            original[key.replace(".to_q.", ".qkv.")] = torch.cat(parts)
        elif ".attention.to_k." not in key and ".attention.to_v." not in key:
            for ours, theirs in (
                ("all_x_embedder.2-1.", "x_embedder."),
                ("all_final_layer.2-1.", "final_layer."),
                (".attention.to_out.0.", ".attention.out."),
                (".attention.norm_q.", ".attention.q_norm."),
                (".attention.norm_k.", ".attention.k_norm."),
            ):
                key = key.replace(ours, theirs)
            original[key] = value.contiguous()
    pad = state["x_pad_token"]
    return original | {"norm_final.weight": torch.ones(pad.shape[-1], dtype=pad.dtype)}


def z_image_transformer(name: str, dtype: torch.dtype, seed: int) -> DiffusersModel:
    """A Z-Image transformer of 2 + 2 blocks; `name` tells siblings' weights apart."""
    model = ZImageTransformer2DModel(
        dim=64,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[8, 12, 12],
        axes_lens=[1536, 512, 512],
    )
    return _randomised(model, f"{name}/transformer", dtype, seed)


def qwen_image_transformer(
    name: str, dtype: torch.dtype, seed: int, zero_cond_t: bool = False
) -> DiffusersModel:
    """A Qwen-Image transformer of 2 blocks; `name` tells siblings' weights apart."""
    model = QwenImageTransformer2DModel(
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(8, 12, 12),
        zero_cond_t=zero_cond_t,
    )
    return _randomised(model, f"{name}/transformer", dtype, seed)


def qwen_image_21_transformer(name: str, dtype: torch.dtype, seed: int) -> DiffusersModel:
    """A Qwen-Image-2.1 transformer of 2 blocks; `name` tells siblings' weights apart."""
    model = QwenImage21Transformer2DModel(
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        context_in_dim=TEXT_WIDTH,
        axes_dims_rope=(8, 12, 12),
    )
    return _randomised(model, f"{name}/transformer", dtype, seed)


def qwen3_text_encoder(dtype: torch.dtype, seed: int) -> Qwen3ForCausalLM:
    """Z-Image's text encoder: 3 layers, Qwen3-4B's 151,936 rows, output tied to input."""
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=TEXT_WIDTH,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        bos_token_id=151643,
        eos_token_id=151645,
    )
    return _randomised(Qwen3ForCausalLM(config), "qwen3", dtype, seed)


def qwen25_text_encoder(dtype: torch.dtype, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen-Image's text encoder: 2 layers, 152,064 rows, an output of its own, a small eye."""
    text = {
        "vocab_size": 152064,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        # time, row and column together are half of the head's 32
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1_000_000.0,
            "mrope_section": [4, 6, 6],
        },
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": TEXT_WIDTH,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return _randomised(Qwen2_5_VLForConditionalGeneration(config), "qwen2.5-vl", dtype, seed)


def write_qwen3_vl(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """A captioner below `folder`, a `$MODEL_VAULT`; returns its own folder."""
    with torch.random.fork_rng(devices=[]):
        qwen3_vl(dtype, seed).save_pretrained(folder / QWEN3_VL)
    shutil.copytree(qwen3_folder(), folder / QWEN3_VL, dirs_exist_ok=True)
    return folder / QWEN3_VL


def qwen3_vl(dtype: torch.dtype, seed: int) -> Qwen3VLForConditionalGeneration:
    """A captioner of 3 + 2 layers, output tied to input, with two deep features of the image."""
    text = {
        "vocab_size": 151936,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5_000_000.0,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": TEXT_WIDTH,
        "deepstack_visual_indexes": [0, 1],
    }
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    return _randomised(Qwen3VLForConditionalGeneration(config), "qwen3-vl", dtype, seed)


def qwen3_image_processor() -> Any:
    """Qwen3-VL's image processor, for images of a few patches too."""
    half = [0.5, 0.5, 0.5]
    size = {"shortest_edge": 32 * 32, "longest_edge": 4096 * 4096}
    return Qwen2VLImageProcessorPil(patch_size=16, image_mean=half, image_std=half, size=size)


def z_image_vae(dtype: torch.dtype, seed: int) -> DiffusersModel:
    """Z-Image's VAE (Flux's constants): a factor of 8 to 16 channels, narrow."""
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        norm_num_groups=4,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return _randomised(model, "z-image-vae", dtype, seed)


def qwen_image_vae(dtype: torch.dtype, seed: int) -> DiffusersModel:
    """Qwen-Image's VAE with its own latent statistics: a factor of 8 to 16 channels, narrow."""
    return _randomised(AutoencoderKLQwenImage(base_dim=8), "qwen-image-vae", dtype, seed)


def qwen_image_21_vae(dtype: torch.dtype, seed: int) -> DiffusersModel:
    """Qwen-Image-2.1's VAE: RGB and alpha, a factor of 16 to 8 channels, narrow."""
    model = AutoencoderKLQwenImage21(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=8,
        dim_mult=[1, 2, 2, 2, 2],
        num_res_blocks=2,
        latents_mean=[0.1 * k for k in range(8)],
        latents_std=[2.0 + 0.1 * k for k in range(8)],
    )
    return _randomised(model, "qwen-image-21-vae", dtype, seed)


def z_image_scheduler(shift: float) -> DiffusersModel:
    """The scheduler of Z-Image as published: one shift for all sizes."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)


def qwen_image_scheduler() -> DiffusersModel:
    """The scheduler of Qwen-Image as published: its shift follows the image's size."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=1.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )


# model_index.json as published: pipeline, then library and class of each component.
Z_IMAGE_COMPONENTS = {
    "_class_name": "ZImagePipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3Model"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "ZImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
QWEN_IMAGE_COMPONENTS = {
    "_class_name": "QwenImagePipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "QwenImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage"],
}
QWEN_IMAGE_21_COMPONENTS = {
    "_class_name": "QwenImage21Pipeline",
    "processor": ["transformers", "Qwen3VLProcessor"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3VLForConditionalGeneration"],
    "transformer": ["diffusers", "QwenImage21Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage21"],
}
QWEN_IMAGE_21_SIGMAS = [
    *(1.0, 0.978453, 0.95418, 0.926626),
    *(0.89508, 0.845148, 0.704534, 0.414568),
]


@torch.no_grad()
def _randomised(model: Any, name: str, dtype: torch.dtype, seed: int) -> Any:
    """The model with every parameter drawn anew, so that nothing in it is zero or switched off.

    Weights keep the size of what they act on (std 1/sqrt(inputs)); norms lie around 1, biases
    around 0, token embeddings at the std of language models. The biases of the modulation are
    large, so that its gates are open and the text reaches the image.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for key, parameter in model.named_parameters():
        parameter.normal_(generator=generator)
        if id(parameter) in embeddings:
            parameter.mul_(0.02)
        elif key.endswith("gamma") or (parameter.ndim == 1 and key.endswith("weight")):
            parameter.mul_(0.1).add_(1)
        elif parameter.ndim == 1:
            parameter.mul_(1.0 if "_mod." in key or "adaLN" in key else 0.1)
        else:
            parameter.div_(math.sqrt(parameter[0].numel()))
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def _write_index(repository: Path, components: dict[str, Any]) -> None:
    repository.mkdir(parents=True, exist_ok=True)
    index = components | {"_diffusers_version": diffusers_version}
    (repository / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True))


def _write_text_encoder(
    folder: Path, state: Mapping[str, torch.Tensor], config: dict[str, Any]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(state), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))


def _link(source: Path, target: Path) -> None:
    """Hard-links a folder's files, or copies them where the file system has no links."""

    def link(file: str, copy: str) -> str:
        try:
            os.link(file, copy)
        except OSError:
            shutil.copy2(file, copy)
        return copy

    shutil.copytree(source, target, copy_function=link)
