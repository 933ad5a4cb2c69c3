"""Jobs of ai-toolkit are read with every key accounted for, and mean here what they mean there."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from families.registry import find_base
from trainer.data.dataset import read_dataset
from trainer.data.trigger import name_trigger
from trainer.settings.config import read_config
from trainer.settings.fields import Settings, SettingsError
from trainer.settings.jobs.ai_toolkit import PROGRAM
from trainer.settings.jobs.translation import Translation
from trainer.settings.jobs.translation import translate as translate_job
from trainer.settings.subject_marks import with_trigger

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


def translate(content: dict[str, Any]) -> Translation:
    return translate_job(PROGRAM, content, Path("job.yaml"))


def read(tmp_path: Path, text: str, **overrides: Any) -> Settings:
    (tmp_path / "job.yaml").write_text(text)
    return read_config(tmp_path / "job.yaml", **overrides)


def test_a_job_for_qwen_image_becomes_the_same_training(tmp_path: Path) -> None:
    settings = read(tmp_path, QWEN_IMAGE)
    assert settings.base.name == "qwen-image"
    assert settings.subject is None and settings.trigger_word == "r3dfox"
    assert (settings.dataset, settings.output_dir) == (
        Path("/data/red_fox"),
        Path("output/red_fox_qwen"),
    )
    assert settings.resolutions == (512, 768, 1024)
    assert (settings.rank, settings.steps, settings.learning_rate) == (16, 2000, 1e-4)
    assert (settings.batch_size, settings.gradient_accumulation) == (1, 2)
    assert (settings.caption_dropout, settings.checkpoint_every) == (0.05, 250)
    assert (settings.optimizer, settings.weight_decay) == ("adafactor", 0.0)
    assert settings.max_grad_norm == 1e6  # theirs does not clip with adafactor
    assert (settings.quantize, settings.low_memory) == ("nf4", True)
    assert (settings.lora_targets, settings.gradient_checkpointing) == ("all", True)
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
    assert "walk_seed" in near and "number 2 is generated without its seed" in near
    near = "\n".join(translate(job(QWEN_IMAGE)).near)
    assert "uint3|ostris" in near and "quantize nf4" in near
    assert "'a horse at a night club' is generated without" in near


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"network__type": "locon"}, "network.type: locon (supported: lora, lokr)"),
        ({"network__dropout": 0.1}, "network.dropout: 0.1"),
        ({"train__optimizer": "automagic"}, "train.optimizer: automagic (supported: adamw"),
        (
            {"train__lr_scheduler": "linear"},
            "train.lr_scheduler: linear (in ai-toolkit the rate rises",
        ),
        ({"train__lr_scheduler_params": {"eta_min": 1e-6}}, "train.lr_scheduler_params.eta_min"),
        ({"train__max_denoising_steps": 500}, "train.max_denoising_steps: 500"),
        ({"train__optimizer_params": {"d_coef": 2}}, "train.optimizer_params.d_coef: 2"),
        ({"train__do_guidance_loss": True}, "train.do_guidance_loss: True"),
        ({"datasets__mask_path": "masks"}, "datasets.mask_path: masks (put it into the dataset's"),
        ({"datasets__num_frames": 33}, "datasets.num_frames: 33"),
        ({"model__qtype": "bnb"}, "model.qtype: bnb"),
        ({"train__loss_type": "wavelet"}, "train.loss_type: wavelet (only mse"),
        ({"train__content_or_style": "style"}, "train.content_or_style: style"),
        ({"train__diff_output_preservation": True}, "train.diff_output_preservation: True"),
        ({"train__timestep_type": "lognorm_blend"}, "train.timestep_type: lognorm_blend"),
        ({"train__lr_scheduler": "polynomial"}, "train.lr_scheduler: polynomial"),
        ({"train__train_text_encoder": True}, "train.train_text_encoder: True"),
        ({"train__something_new": "yes"}, "train.something_new: yes"),
        ({"train__optimizer_params": {"betas": [0.9, 0.99]}}, "train.optimizer_params.betas"),
        ({"datasets__is_reg": True}, "datasets.is_reg: True"),
        ({"datasets__flip_y": True}, "datasets.flip_y: True (images upside down; remove it"),
        (
            {"datasets__alpha_mask": True, "datasets__invert_mask": True},
            "datasets.invert_mask: True (what is opaque is trained on)",
        ),
        ({"datasets__caption_ext": "json"}, "datasets.caption_ext: json"),
        ({"slider": {"guidance_strength": 3}}, "slider.guidance_strength: 3"),
        ({"network": None}, "network: then ai-toolkit trains the whole model"),
        ({"datasets__folder_path": ["a", "b"]}, "datasets.folder_path: ['a', 'b'] (not text"),
        ({"trigger_word": 7}, "trigger_word: 7 (not text; write it in quotes)"),
        ({"train__num_train_timesteps": 500}, "train.num_train_timesteps: 500"),
    ],
)
def test_a_key_that_would_change_the_result_is_refused_by_its_name(
    change: dict[str, Any], name: str
) -> None:
    assert any(line.startswith(name) for line in translate(job(**change)).refused)


@pytest.mark.parametrize(
    ("change", "setting", "value"),
    [
        ({"train__steps": 2000.0}, "steps", 2000),
        ({"train__steps": "2000"}, "steps", 2000),
        ({"network__linear": 16.0}, "rank", 16),
        ({"datasets__resolution": [512.0, "768"]}, "resolution", "512,768"),
        ({"datasets__resolution": []}, "resolution", 512),
        ({"model__qtype": "float8_e4m3fn"}, "quantize", "fp8"),
        ({"trigger_word": "007"}, "trigger_word", "007"),
        ({"trigger_word": "Nan"}, "trigger_word", "Nan"),
        ({"trigger_word": "1e5"}, "trigger_word", "1e5"),
        ({"datasets__default_caption": "2024"}, "default_caption", "2024"),
        ({"datasets__folder_path": "0123"}, "dataset", "0123"),
        ({"train__optimizer_params": {"betas": [0.9, 0.999], "eps": "1e-8"}}, "optimizer", "adamw"),
        ({"train__num_train_timesteps": 1000}, "steps", 3000),
        ({"datasets__flip_x": True}, "horizontal_flip", True),
        ({"datasets__alpha_mask": True, "datasets__mask_min_value": 0.1}, "masks", "alpha"),
        ({"datasets__mask_min_value": 0.1, "datasets__alpha_mask": False}, "masks", "off"),
        ({"datasets__random_crop": True}, "crop_jitter", 1.0),
        ({"model__model_kwargs": {"rgba": True}}, "keep_transparency", True),
        ({"sample__samples": [], "sample__prompts": "a fox"}, "sample_prompts", ("a fox",)),
        ({"sample__samples": [], "sample__prompts": [None, "a"]}, "sample_prompts", ("a",)),
    ],
)
def test_a_value_is_read_in_the_type_that_it_has_there(
    change: dict[str, Any], setting: str, value: Any
) -> None:
    found = translate(job(**change))
    assert found.refused == []
    assert found.settings[setting] == value
    assert type(found.settings[setting]) is type(value)


@pytest.mark.parametrize("first", ["linear_timesteps", "timestep_type"])
def test_linear_timesteps_are_stronger_than_the_type_wherever_they_stand(first: str) -> None:
    content = job()
    train = content["config"]["process"][0]["train"]
    train.pop("timestep_type")
    both = {"linear_timesteps": True, "timestep_type": "sigmoid"}
    train |= {first: both[first]} | both
    assert translate(content).settings["timestep_sampling"] == "uniform"
    train["linear_timesteps"] = False
    assert translate(content).settings["timestep_sampling"] == "sigmoid"


def test_all_refused_keys_are_told_at_once_with_the_way_out(tmp_path: Path) -> None:
    content = job(network__type="locon", train__optimizer="lion", datasets__flip_y=True)
    with pytest.raises(SettingsError) as refusal:
        read(tmp_path, yaml.safe_dump(content))
    said = str(refusal.value)
    for key in ("network.type: locon", "train.optimizer: lion", "datasets.flip_y: True"):
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
    assert found.refused == []
    assert found.near == [
        "train.dtype (missing): float32 in ai-toolkit; here the base is bfloat16 on a GPU"
    ]
    values = found.settings
    assert (values["steps"], values["resolution"], values["batch_size"]) == (1000, 512, 1)
    assert (values["caption_dropout"], values["quantize"]) == (0.0, "none")
    assert (values["weight_decay"], values["lr_warmup_steps"]) == (0.01, 0)
    assert values["learning_rate"] == 1e-4 and values["output_dir"] == "output/bare"


def test_a_rate_that_is_left_out_is_theirs_and_is_named() -> None:
    content = job()
    del content["config"]["process"][0]["train"]["lr"]
    found = translate(content)
    assert found.settings["learning_rate"] == 1e-6
    line = "train.lr (missing): 1e-06 in ai-toolkit, which hardly trains; 0.0001 is usual"
    assert any(each.startswith(line) for each in found.near)


@pytest.mark.parametrize(
    ("given", "rate", "named"),
    [(1e-4, 1.0, True), (0.05, 1.0, True), (None, 1.0, True), (0.5, 0.5, False), (1, 1, False)],
)
@pytest.mark.parametrize("name", ["prodigy", "prodigyopt", "Prodigy8bit"])
def test_a_small_rate_of_prodigy_becomes_one_as_theirs_does(
    name: str, given: float | None, rate: float, named: bool, tmp_path: Path
) -> None:
    content = job(train__optimizer=name, train__lr=given)
    if given is None:
        del content["config"]["process"][0]["train"]["lr"]
    settings = read(tmp_path, yaml.safe_dump(content))
    assert (settings.optimizer, settings.learning_rate) == ("prodigy", rate)
    near = "\n".join(translate(content).near)
    assert ("becomes 1.0, as in ai-toolkit" in near) is named
    assert (f"train.optimizer: {name} becomes" in near) is (name == "Prodigy8bit")


@pytest.mark.parametrize(
    ("params", "steps"),
    [({"num_warmup_steps": 60}, 60), ({"num_warmup_steps": "2e1"}, 20), ({}, 1000)],
)
def test_a_constant_rate_with_warm_up_has_their_number_of_steps(
    params: dict[str, Any], steps: int
) -> None:
    found = translate(
        job(train__lr_scheduler="constant_with_warmup", train__lr_scheduler_params=params)
    )
    assert (found.settings["lr_scheduler"], found.settings["lr_warmup_steps"]) == (
        "constant",
        steps,
    )
    assert found.refused == []


@pytest.mark.parametrize(("every", "updates"), [(1, 3000), (2, 1500), (7, 428)])
def test_steps_whose_gradients_are_thrown_away_are_not_counted(every: int, updates: int) -> None:
    found = translate(job(train__gradient_accumulation_steps=every))
    assert found.settings["steps"] == updates and found.refused == []
    assert any("gradient_accumulation_steps" in line for line in found.near) is (every > 1)


@pytest.mark.parametrize(
    ("kind", "ours", "exact"),
    [
        *(("qfloat8", "fp8", True), ("float8", "fp8", True), ("int8", "int8", True)),
        *(("convrot8", "int8", False), ("convrotint6", "int8", False), ("uint7", "int8", False)),
        *(("convrot4", "nf4", False), ("nvfp4", "nf4", False), ("uint4", "nf4", False)),
        *(("uint3|a/b.safetensors", "nf4", False), ("convrotbitnet", "nf4", False)),
    ],
)
def test_their_number_types_become_the_nearest_of_ours(kind: str, ours: str, exact: bool) -> None:
    found = translate(job(model__qtype=kind))
    assert found.settings["quantize"] == ours
    assert any(line.startswith(f"model.qtype: {kind}") for line in found.near) is not exact


@pytest.mark.parametrize(
    ("only", "without", "count"),
    [
        # Of each of the 30 blocks: 4 linears of the attention, 3 feed-forward, 1 of the modulation.
        (None, None, 30 * 8),
        (["feed_forward"], None, 30 * 3),
        (["attention.to_q", "attention.to_k"], None, 30 * 2),
        (["transformer.layers.1."], None, 8),
        (["layers$$1$$"], None, 8),
        (None, ["adaLN"], 30 * 7),
        (["attention"], ["to_out", "layers.2."], 30 * 3 - 3),
        (None, ["text_encoder"], 30 * 8),
    ],
)
def test_parts_of_layers_names_choose_the_layers_that_theirs_choose(
    only: list[str] | None, without: list[str] | None, count: int
) -> None:
    from families.without_weights import family_without_weights

    kwargs = {"only_if_contains": only, "ignore_if_contains": without}
    found = translate(job(network__network_kwargs=kwargs))
    assert found.refused == []
    family = family_without_weights(find_base("z-image"))
    names = family.lora_targets(found.settings["lora_targets"])
    assert len(names) == len(set(names)) == count
    parts = [part.replace("$$", ".").removeprefix("transformer.") for part in only or [""]]
    assert all(any(part in name for part in parts) for name in names)
    assert not any(part in name for name in names for part in without or [])


@pytest.mark.parametrize(
    ("model", "count"), [("Tongyi-MAI/Z-Image-Turbo", 240), ("Qwen/Qwen-Image-2512", 836)]
)
def test_their_layers_are_all_linears_of_the_blocks(model: str, count: int) -> None:
    # Qwen-Image has 840, four of which change nothing: what they make is dropped.
    from families.without_weights import family_without_weights

    architecture = "zimage" if "Z-Image" in model else "qwen_image"
    content = job(model__name_or_path=model, model__arch=architecture)
    targets = translate(content).settings["lora_targets"]
    assert len(family_without_weights(find_base(model)).lora_targets(targets)) == count


def test_keys_of_video_and_of_what_is_off_have_no_effect() -> None:
    found = translate(
        job(
            datasets__do_i2v=True,
            datasets__do_audio=True,
            datasets__fps=24,
            datasets__auto_frame_count=True,
            train__audio_loss_multiplier=1.0,
            train__guidance_loss_target=3.0,
            train__differential_guidance_scale=3.0,
            model__compile_mode="default",
            sample__sample_start_step=100,
        )
    )
    assert found.refused == []
    for name in ("do_i2v", "do_audio", "fps", "auto_frame_count", "guidance_loss_target"):
        assert any(name in line for line in found.without_effect)


def test_guidance_of_the_previews_is_counted_as_theirs() -> None:
    # Their Z-Image subtracts one for the pipeline, which counts from zero, and so do we.
    for guidance, ours in ((4, 4), (1, 1), (0, 1), (3.5, 3.5)):
        assert translate(job(sample__guidance_scale=guidance)).sample["guidance_scale"] == ours


@pytest.mark.parametrize("value", ["sigmoid", "linear", "weighted", "shift"])
def test_every_timestep_type_of_theirs_is_accepted_by_the_settings(
    value: str, tmp_path: Path
) -> None:
    read(tmp_path, yaml.safe_dump(job(train__timestep_type=value)))


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
        (
            {"model__arch": "flux"},
            "model.arch is 'flux'; supported: qwen_image, qwen_image_2, qwen_image_edit_plus, zima",
        ),
        (
            {"model__arch": "qwen_image"},
            "is z-image-turbo, but this is a job for Qwen-Image",
        ),
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
    assert any("training adapter is used" in line for line in found.near)


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


def test_without_a_trigger_word_a_job_has_no_trigger_mark_and_tok_is_text(
    photos: Path, tmp_path: Path
) -> None:
    text = Z_IMAGE_TURBO.replace("trigger_word: null", "trigger_word: ''")
    for job in (Z_IMAGE_TURBO, text):
        settings = read(tmp_path, job)
        assert settings.foreign_captions and settings.trigger_word is None
        assert not settings.train_placeholder_token
    examples = name_trigger(read_dataset(photos, "[trigger] by night"), None, foreign=True)
    captions = {each.name: each.caption for each in examples}
    assert captions["rocket.jpg"] == "by night"
    assert captions["chelsea.png"] == "a photo of TOK, a tabby cat"


def test_lokr_is_translated_with_its_factor_and_rank() -> None:
    network = {"network__type": "lokr", "network__lokr_factor": 8}
    found = translate(job(**network, network__lokr_full_rank=True)).settings
    assert (found["adapter"], found["lokr_factor"], found["rank"]) == ("lokr", 8, None)
    found = translate(job(**network, network__lokr_full_rank=False, network__linear=16)).settings
    assert (found["adapter"], found["rank"]) == ("lokr", 16)
    auto = job(network__type="lokr", network__lokr_factor=-1, network__lokr_full_rank=True)
    assert translate(auto).settings["lokr_factor"] == 256
