"""Jobs of ai-toolkit are read with every key accounted for, and mean here what they mean there."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.ai_toolkit import Translation, translate
from trainer.config import read_config
from trainer.dataset import read_dataset
from trainer.settings import Settings, SettingsError
from trainer.trigger import name_trigger, with_trigger

# As a user of theirs would have it, after their examples for these models.
QWEN_IMAGE = """
job: extension
config:
  name: red_fox_qwen
  process:
    - type: sd_trainer
      training_folder: output
      device: cuda:0
      trigger_word: r3dfox
      performance_log_every: 500
      network: {type: lora, linear: 16, linear_alpha: 16}
      save: {dtype: float16, save_every: 250, max_step_saves_to_keep: 3, push_to_hub: false}
      datasets:
        - folder_path: /data/red_fox
          caption_ext: txt
          caption_dropout_rate: 0.05
          shuffle_tokens: false
          cache_latents_to_disk: true
          resolution: [512, 768, 1024]
      train:
        batch_size: 1
        cache_text_embeddings: true
        steps: 2000
        gradient_accumulation: 2
        train_unet: true
        train_text_encoder: false
        gradient_checkpointing: true
        noise_scheduler: flowmatch
        optimizer: adafactor
        lr: 1e-4
        dtype: bf16
      model:
        name_or_path: Qwen/Qwen-Image
        arch: qwen_image
        quantize: true
        qtype: uint3|ostris/accuracy_recovery_adapters/qwen_image_torchao_uint3.safetensors
        quantize_te: true
        qtype_te: qfloat8
        low_vram: true
      sample:
        sampler: flowmatch
        sample_every: 250
        width: 1024
        height: 768
        prompts:
          - "[trigger] asleep in the snow"
          - a horse at a night club --seed 7 --w 512
        neg: ""
        seed: 42
        walk_seed: true
        guidance_scale: 3
        sample_steps: 25
meta: {name: "[name]", version: "1.0"}
"""
Z_IMAGE_TURBO = """
job: extension
config:
  name: grandma
  process:
    - type: diffusion_trainer
      training_folder: output
      sqlite_db_path: ./aitk_db.db
      device: cuda
      trigger_word: null
      network:
        type: lora
        linear: 32
        linear_alpha: 32
        conv: 16
        conv_alpha: 16
        lokr_full_rank: true
        lokr_factor: -1
        network_kwargs: {ignore_if_contains: []}
      save: {dtype: bf16, save_every: 250, max_step_saves_to_keep: 4, save_format: diffusers}
      datasets:
        - folder_path: /data/grandma
          mask_path: null
          mask_min_value: 0.1
          default_caption: ""
          caption_ext: txt
          caption_dropout_rate: 0.05
          cache_latents_to_disk: false
          is_reg: false
          network_weight: 1
          resolution: [1024]
          controls: []
          shrink_video_to_frames: true
          num_frames: 1
          num_repeats: 1
          flip_x: false
      train:
        batch_size: 1
        bypass_guidance_embedding: false
        steps: 3000
        gradient_accumulation: 1
        train_unet: true
        train_text_encoder: false
        gradient_checkpointing: true
        noise_scheduler: flowmatch
        optimizer: adamw
        timestep_type: weighted
        content_or_style: balanced
        optimizer_params: {weight_decay: 0.0001}
        unload_text_encoder: false
        cache_text_embeddings: false
        lr: 0.0001
        ema_config: {use_ema: true, ema_decay: 0.99}
        skip_first_sample: false
        disable_sampling: false
        dtype: bf16
        diff_output_preservation: false
        diff_output_preservation_multiplier: 1
        diff_output_preservation_class: person
        switch_boundary_every: 1
        loss_type: mse
      logging: {log_every: 1, use_ui_logger: true}
      model:
        name_or_path: Tongyi-MAI/Z-Image-Turbo
        quantize: true
        qtype: qfloat8
        quantize_te: true
        qtype_te: qfloat8
        arch: zimage:turbo
        low_vram: false
        model_kwargs: {}
        layer_offloading: false
        layer_offloading_text_encoder_percent: 1
        layer_offloading_transformer_percent: 1
        assistant_lora_path: >-
          ostris/zimage_turbo_training_adapter/zimage_turbo_training_adapter_v2.safetensors
      sample:
        sampler: flowmatch
        sample_every: 250
        width: 1024
        height: 1024
        samples:
          - prompt: an old woman in a garden
          - prompt: an old woman playing chess
            seed: 3
        neg: ""
        seed: 42
        walk_seed: true
        guidance_scale: 1
        sample_steps: 8
        num_frames: 1
        fps: 1
meta: {name: "[name]", version: "1.0"}
"""

Change = Callable[..., dict[str, Any]]


def job(text: str = Z_IMAGE_TURBO, **changes: Any) -> dict[str, Any]:
    """A job with keys of its process changed; a dot is written as two underscores."""
    content = yaml.safe_load(text)
    process = content["config"]["process"][0]
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        place = process[section] if section else process
        (place[0] if isinstance(place, list) else place)[name] = value
    return content


def read(tmp_path: Path, text: str, **overrides: Any) -> Settings:
    (tmp_path / "job.yaml").write_text(text)
    return read_config(tmp_path / "job.yaml", **overrides)


def test_a_job_for_qwen_image_becomes_the_same_training(tmp_path: Path) -> None:
    settings = read(tmp_path, QWEN_IMAGE)
    assert settings.base.name == "qwen-image"
    assert settings.training_mode == "baseline" and settings.trigger_word == "r3dfox"
    assert (settings.dataset, settings.output_dir) == (
        Path("/data/red_fox"),
        Path("output/red_fox_qwen"),
    )
    assert settings.resolutions == (512, 768, 1024)
    assert (settings.rank, settings.steps, settings.learning_rate) == (16, 2000, 1e-4)
    assert (settings.batch_size, settings.gradient_accumulation) == (1, 2)
    assert (settings.caption_dropout, settings.checkpoint_every) == (0.05, 250)
    assert (settings.optimizer, settings.weight_decay) == ("adafactor", 0.0)
    assert (settings.quantize, settings.low_memory) == ("nf4", True)
    assert (settings.timestep_sampling, settings.training_shift) == ("sigmoid", 1.0)
    assert settings.sample_prompts == ("r3dfox asleep in the snow", "a horse at a night club")
    assert settings.sample_every == 250
    assert settings.sample_options == {
        **{"width": 1024, "height": 768, "seed": 42, "negative_prompt": ""},
        **{"guidance_scale": 3, "num_inference_steps": 25},
    }


def test_a_job_for_z_image_turbo_keeps_its_training_adapter(tmp_path: Path) -> None:
    settings = read(tmp_path, Z_IMAGE_TURBO)
    assert (settings.base.name, settings.turbo_adapter) == ("z-image-turbo", "v2")
    assert (settings.rank, settings.steps, settings.ema_decay) == (32, 3000, 0.99)
    assert (settings.quantize, settings.low_memory) == ("fp8", None)
    assert (settings.timestep_sampling, settings.weight_decay) == ("uniform", 1e-4)
    assert len(settings.sample_prompts) == 2
    assert settings.sample_options["guidance_scale"] == 1


@pytest.mark.parametrize("text", [QWEN_IMAGE, Z_IMAGE_TURBO])
def test_every_key_of_a_job_is_named_in_the_log(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        read(tmp_path, text)

    def keys(section: dict[str, Any]) -> list[str]:
        found = []
        for key, value in section.items():
            value = value[0] if key == "datasets" else value
            found += keys(value) if isinstance(value, dict) and value else [key]
        return found

    process = yaml.safe_load(text)["config"]["process"][0]
    assert [key for key in keys(process) if key not in caplog.text] == []


def test_what_differs_is_said_to_differ() -> None:
    near = "\n".join(translate(job()).near)
    assert "weighted becomes timestep_sampling uniform" in near
    assert "walk_seed" in near and "number 2: drawn as the others, without seed" in near
    near = "\n".join(translate(job(QWEN_IMAGE)).near)
    assert "uint3|ostris" in near and "quantize nf4" in near
    assert "'a horse at a night club': drawn without --seed 7 --w 512" in near


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"network__type": "lokr"}, "network.type: lokr (only lora is known here)"),
        ({"network__dropout": 0.1}, "network.dropout: 0.1"),
        ({"train__optimizer": "automagic"}, "train.optimizer: automagic (known here: adamw"),
        ({"train__loss_type": "wavelet"}, "train.loss_type: wavelet (only mse"),
        ({"train__content_or_style": "style"}, "train.content_or_style: style"),
        ({"train__diff_output_preservation": True}, "train.diff_output_preservation: True"),
        ({"train__timestep_type": "lognorm_blend"}, "train.timestep_type: lognorm_blend"),
        ({"train__lr_scheduler": "polynomial"}, "train.lr_scheduler: polynomial"),
        ({"train__train_text_encoder": True}, "train.train_text_encoder: True"),
        ({"train__something_new": "yes"}, "train.something_new: yes"),
        ({"train__optimizer_params": {"betas": [0.9, 0.99]}}, "train.optimizer_params.betas"),
        ({"datasets__is_reg": True}, "datasets.is_reg: True"),
        ({"datasets__flip_x": True}, "datasets.flip_x: True"),
        ({"datasets__caption_ext": "json"}, "datasets.caption_ext: json"),
        ({"slider": {"guidance_strength": 3}}, "slider.guidance_strength: 3"),
    ],
)
def test_a_key_that_would_change_the_result_is_refused_by_its_name(
    change: dict[str, Any], name: str
) -> None:
    assert any(line.startswith(name) for line in translate(job(**change)).refused)


def test_all_refused_keys_are_told_at_once_with_the_way_out(tmp_path: Path) -> None:
    content = job(network__type="lokr", train__optimizer="lion", datasets__flip_x=True)
    with pytest.raises(SettingsError) as refusal:
        read(tmp_path, yaml.safe_dump(content))
    said = str(refusal.value)
    for key in ("network.type: lokr", "train.optimizer: lion", "datasets.flip_x: True"):
        assert key in said
    assert "remove them to train without" in said and "job.yaml" in said


def test_a_job_without_any_optional_key_has_their_defaults() -> None:
    content = {
        "job": "extension",
        "config": {
            "name": "bare",
            "process": [
                {
                    "type": "sd_trainer",
                    "network": {"type": "lora", "linear": 8},
                    "datasets": [{"folder_path": "/data"}],
                    "train": {"lr": "1e-4"},
                    "model": {"name_or_path": "Tongyi-MAI/Z-Image", "arch": "zimage"},
                }
            ],
        },
    }
    found: Translation = translate(content)
    assert found.refused == [] and found.near == []
    values = found.settings
    assert (values["steps"], values["resolution"], values["batch_size"]) == (1000, 512, 1)
    assert (values["caption_dropout"], values["quantize"]) == (0.0, "none")
    assert (values["weight_decay"], values["lr_warmup_steps"]) == (0.01, 0)
    assert values["learning_rate"] == 1e-4 and values["output_dir"] == "output/bare"


@pytest.mark.parametrize(
    ("arch", "name", "base"),
    [
        ("zimage", "Tongyi-MAI/Z-Image", "z-image"),
        ("zimage:turbo", "Tongyi-MAI/Z-Image-Turbo", "z-image-turbo"),
        ("zimage:deturbo", "ostris/Z-Image-De-Turbo", "z-image-de-turbo"),
        ("qwen_image", "Qwen/Qwen-Image-2512", "qwen-image-2512"),
    ],
)
def test_the_base_is_found_by_its_hub_id(arch: str, name: str, base: str) -> None:
    content = job(model__arch=arch, model__name_or_path=name, model__assistant_lora_path=None)
    assert f"base_model {base}" in "\n".join(translate(content).translated)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model__arch": "flux"}, "model.arch is 'flux'; known here: zimage, qwen_image"),
        ({"model__arch": "qwen_image"}, "model.arch is qwen_image, but name_or_path is z-image"),
        ({"model__name_or_path": "some/model"}, "model.name_or_path: base_model 'some/model'"),
        ({"datasets": [{"folder_path": "/a"}, {"folder_path": "/b"}]}, "into one"),
    ],
)
def test_a_job_that_cannot_be_one_training_here_says_why(
    change: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(SettingsError, match=complaint):
        translate(job(**change))


def test_a_turbo_job_without_its_adapter_gets_the_models_own() -> None:
    found = translate(job(model__assistant_lora_path=None))
    assert "turbo_adapter" not in found.settings
    assert any("own turbo adapter" in line for line in found.near)


def test_wandb_and_the_hub_are_taken_over() -> None:
    found = translate(
        job(
            logging__use_wandb=True,
            logging__project_name="foxes",
            save__push_to_hub=True,
            save__hf_repo_id="me/fox",
        )
    )
    assert found.settings["trackers"] == ("wandb",) and found.refused == []
    assert (found.settings["wandb_project"], found.settings["hf_repo_id"]) == ("foxes", "me/fox")


def test_what_is_given_beside_the_job_replaces_it(tmp_path: Path) -> None:
    settings = read(tmp_path, Z_IMAGE_TURBO, dataset="imgs.zip", output_dir="here")
    assert (settings.dataset, settings.output_dir) == (Path("imgs.zip"), Path("here"))


@pytest.mark.parametrize(
    ("caption", "word", "becomes"),
    [
        ("[trigger] in the snow", "r3dfox", "r3dfox in the snow"),
        ("a fox in the snow", "r3dfox", "r3dfox a fox in the snow"),
        ("a photo of TOK, asleep", "r3dfox", "a photo of r3dfox, asleep"),
        ("r3dfox asleep", "r3dfox", "r3dfox asleep"),
        ("a foxglove in a pot", "fox", "fox a foxglove in a pot"),
        ("a woman on a beach", "man", "man a woman on a beach"),
        ("the fox's den", "fox", "the fox's den"),
        ("a red foxglove", "red fox", "red fox a red foxglove"),
        ("", "r3dfox", "r3dfox"),
        ("[trigger] in the snow", "", "in the snow"),
    ],
)
def test_the_trigger_word_stands_where_the_caption_says_or_before_it(
    caption: str, word: str, becomes: str
) -> None:
    assert with_trigger(caption, word) == becomes


def test_the_trigger_word_reaches_the_captions_of_a_dataset(photos: Path) -> None:
    examples = name_trigger(read_dataset(photos, "[trigger] by night"), "r3dfox")
    captions = {each.name: each.caption for each in examples}
    assert captions["chelsea.png"] == "a photo of r3dfox, a tabby cat"
    assert captions["rocket.jpg"] == "r3dfox by night"
    assert name_trigger(examples, None) == examples
