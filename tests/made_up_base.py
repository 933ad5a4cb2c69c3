"""A base model that does not exist, in one file: what a new one takes.

Its sizes, template, text features and time are those of no other family. `write` makes a small one
with random weights.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from families.base import Base, CardCode, FewStepRow, JobNames, ModelClasses, Steps
from families.family import Family
from families.tokens import TokenizedPrompt

if TYPE_CHECKING:
    from torch import Tensor, nn

MADE_UP = Base(
    name="made-up",
    hub_id="nobody/Made-Up",
    family="made_up",
    inference_steps=3,
    guidance_scale=2.0,
    default_resolution=32,
    generation_memory=0.1,
    training_memory=0.1,
    training_resolution=32,
    training_steps=Steps(per_image=0, least=2, most=2),
    batch_size=2,
    learning_rate=1e-2,
    training_shift=1.0,
)


class MadeUp(Family):
    """A single-stream transformer that reads the last hidden states of a bare prompt."""

    name = "made_up"
    title = "Made-Up"
    bases = (MADE_UP,)
    classes = ModelClasses(
        pipeline="MadeUpPipeline",
        transformer="ZImageTransformer2DModel",
        vae="AutoencoderKL",
        text_encoder="Qwen3Model",
    )
    published = {
        "transformer": {
            "in_channels": 4,
            "dim": 256,
            "n_layers": 4,
            "n_refiner_layers": 1,
            "n_heads": 8,
            "n_kv_heads": 8,
            "cap_feat_dim": 64,
            "axes_dims": [8, 12, 12],
        },
        "text_encoder": {
            "vocab_size": 1088,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
        },
        "vae": {
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
            "block_out_channels": [8, 8, 8],
            "norm_num_groups": 4,
            "latent_channels": 4,
        },
    }
    trunk = "layers"
    max_text_tokens = 64
    empty_prompt = "nothing"
    layer_names = r"made_up_blocks\.\d+\."
    original_names = {"attention.out": ("attention.to_out.0",)}
    few_step_loras = (FewStepRow("Made-Up-Fast", re.compile("made-up-fast"), steps=2, shift=None),)
    job_names = {"ai-toolkit": JobNames(("made_up",))}
    card_code = CardCode(
        template="    text = prompt",
        features="    return pipeline.text_encoder(inputs_embeds=embeds).last_hidden_state",
        guidance="cfg",
        guidance_off=1,
    )
    vae_factor = 4
    patch_size = 2
    latent_channels = 4

    def _template(self, tokenizer: Any) -> str:
        return "<|im_start|>{}<|im_end|>"

    def _reading_part(self, model: Any) -> nn.Module:
        return model

    def _first_feature(self, prompt: TokenizedPrompt) -> int:
        return prompt.template_length

    def encode_images(self, pixels_B3PP: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(pixels_B3PP.to(self.device).float()).latent_dist
        return posterior.mean, posterior.std

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        return self.vae.decode(latents_BCHW.float(), return_dict=False)[0]

    def velocity(self, latents_BCHW: Tensor, sigma_B: Tensor, text: Sequence[Tensor]) -> Tensor:
        import torch

        frames = list(latents_BCHW.to(self.dtype).unsqueeze(2).unbind())
        velocity = self.transformer(frames, sigma_B, list(text), return_dict=False)[0]
        return torch.stack(velocity).squeeze(2).float()

    def lora_groups(self) -> dict[str, list[str]]:
        layers = range(self.transformer_config["n_layers"])
        return {
            "attention": [
                f"layers.{layer}.attention.{name}"
                for layer in layers
                for name in ("to_q", "to_k", "to_v", "to_out.0")
            ],
            "feed_forward": [f"layers.{layer}.feed_forward.w2" for layer in layers],
        }


def write(folder: Path) -> None:
    """A small one with random weights, in the Hub's layout."""
    import diffusers
    import torch
    from root import ROOT
    from transformers import Qwen3Config, Qwen3Model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = {"dim": 32, "n_layers": 2, "n_heads": 1, "n_kv_heads": 1}
        transformer: Any = diffusers.ZImageTransformer2DModel(
            **(MadeUp.published["transformer"] | small)  # type: ignore[operator]
        )
        vae: Any = diffusers.AutoencoderKL(**MadeUp.published["vae"])
        text_encoder = Qwen3Model(Qwen3Config(**MadeUp.published["text_encoder"]))
        for parameter in transformer.parameters():  # some are empty, or zeros
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    text_encoder.save_pretrained(folder / "text_encoder")
    scheduler.save_pretrained(folder / "scheduler")
    shutil.copytree(
        ROOT / "miniature" / "weights" / "miniature-turbo" / "tokenizer", folder / "tokenizer"
    )
    (folder / "model_index.json").write_text(f'{{"_class_name": "{MadeUp.classes.pipeline}"}}')
