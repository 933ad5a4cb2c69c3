"""The rules of ai-toolkit: keys of its jobs that depend on each other."""

import re
from pathlib import Path
from typing import Any

from trainer.settings.choices import OPTIMIZERS
from trainer.settings.jobs.rules import (
    UNLIMITED,
    base_named,
    base_of,
    control_folders,
    family_named,
    learning_rate,
    lokr,
    no_turbo_adapter,
    optimizer,
    precision,
    turbo_adapter,
)
from trainer.settings.jobs.translation import UNCLIPPED, Rule, Translation

PRODIGY_LEAST = 0.1  # ai-toolkit's prodigy replaces a lower learning rate by 1
WARMUP = 1000  # default steps of constant_with_warmup

# Name: ours, default weight decay, and the difference.
OPTIMIZERS_THERE: dict[str, tuple[str, float, str | None]] = {
    "adamw": ("adamw", 0.01, None),
    "adamw8bit": ("adamw8bit", 0.01, None),
    "adafactor": ("adafactor", 0.0, None),
    "prodigy": ("prodigy", 0.0, None),
    "prodigyopt": ("prodigy", 0.0, None),
    "prodigy8bit": ("prodigy", 0.0, "its state is not of 8 bits"),
}
TIMESTEPS = {  # theirs: ours, and the difference
    "sigmoid": "sigmoid",
    "linear": "uniform",
    "weighted": ("uniform", "the same timesteps, without their loss weights"),
    "shift": "shift",
}
QUANTIZATIONS = {"qfloat8": "fp8", "float8": "fp8", "fp8": "fp8", "int8": "int8", "qint8": "int8"}


def base(found: Translation) -> None:
    architecture = str(found.get("model.arch", "")).partition(":")[0]
    family, _ = family_named(found, "model.arch", architecture)
    base_named(found, "model.name_or_path", str(found.get("model.name_or_path", "")), family)
    found.same("model.arch", str(found.get("model.arch")))
    if not any(key.startswith("network.") for key in found.keys):
        found.refuse(
            "network", "then ai-toolkit trains the whole model; use a network of type lora"
        )
    folder = Path(str(found.keys.get("training_folder", "output"))) / str(found.keys["config.name"])
    found.same("training_folder, config.name", output_dir=str(folder))


def network(found: Translation) -> None:
    """The form of the LoRA and its size. lokr_full_rank: both factors of LoKr are whole."""
    rank_key = "network.rank" if "network.rank" in found.keys else "network.linear"
    kind, rank = found.get("network.type", "lora"), found.get(rank_key)
    full, factor = "network.lokr_full_rank", "network.lokr_factor"
    if kind == "lokr":
        whole = found.get(full, False)
        size = UNLIMITED if whole or rank is None else rank
        lokr(found, rank_key, size, factor, found.get(factor, -1))
        found.same(full, str(whole))
    else:
        if rank is not None:
            found.same(rank_key, rank=rank)
        for key in {full, factor} & found.keys.keys():
            found.no_effect(key, "only with lokr")
    if kind not in ("lora", "lokr"):
        found.refuse("network.type", f"{kind} (supported: lora, lokr)")
    elif "network.type" in found.keys:
        found.same("network.type", kind)


def sample_prompts(found: Translation) -> None:
    prompts = found.get("sample.prompts") or []
    given = [prompts] if isinstance(prompts, str) else [each for each in prompts if each]
    for place, sample in enumerate(found.get("sample.samples") or [], start=1):
        row = sample if isinstance(sample, dict) else {"prompt": sample}
        given.append(row.get("prompt", ""))
        own = {key for key, value in row.items() if value is not None} - {"prompt"}
        if controls := sorted(key for key in own if key.startswith("ctrl_img")):
            text = f"number {place} begins with control images of the dataset, not with its "
            found.differs("sample.samples", f"{text}{', '.join(controls)}")
        if rest := sorted(own - {*controls}):
            found.differs(
                "sample.samples", f"number {place} is generated without its {', '.join(rest)}"
            )
    word = str(found.keys.get("trigger_word") or "")
    read = []
    for prompt in given:
        text, *flags = str(prompt).split(" --")
        if flags:
            found.differs("sample.prompts", f"{text!r} is generated without --{' --'.join(flags)}")
        read.append(" ".join(text.replace("[trigger]", word).split()))
    texts = tuple(each for each in read if each)
    if found.get("train.disable_sampling"):
        found.same("train.disable_sampling", "no sample_prompts")
        texts = ()
    elif texts:
        found.same("sample.prompts, sample.samples", f"{len(texts)} sample_prompts")
    found.settings["sample_prompts"] = texts
    if found.get("sample.guidance_scale") is not None:  # off is below 1 there, and 1 here
        found.sample["guidance_scale"] = scale = max(1, found.get("sample.guidance_scale"))
        found.same("sample.guidance_scale", f"guidance_scale {scale}")
    if found.get("sample.seed") == -1:
        found.no_effect("sample.seed", "any seed")
    if "sample.walk_seed" in found.keys:
        report = found.differs if found.get("sample.walk_seed") else found.same
        report("sample.walk_seed", "every sample has the same seed")


def controls(found: Translation) -> None:
    """The folders of control images, in order, and their size."""
    path, named = "datasets.control_path", [f"datasets.control_path_{k}" for k in (1, 2, 3)]
    given = found.keys.get(path) or []
    folders = [given] if isinstance(given, str) else list(given)
    folders += [found.keys.get(key) for key in named]
    control_folders(
        found, ", ".join(each for each in (path, *named) if found.keys.get(each)), folders
    )
    if any(folders) and base_of(found).most_references:
        key = "model.model_kwargs.match_target_res"
        if found.get(key):
            found.differs(key, "control images have the size of inference here, about 1 megapixel")
        elif key in found.keys:
            found.same(key, "off, as always here")
        if found.get("datasets.caption_dropout_rate"):
            text = "the empty prompt is encoded with the control images here, without them there"
            found.differs("datasets.caption_dropout_rate", text)


def ema(found: Translation) -> None:
    keys = "train.ema_config.use_ema, train.ema_config.ema_decay"
    if found.get("train.ema_config.use_ema"):
        found.same(keys, ema_decay=found.get("train.ema_config.ema_decay", 0.999))
    elif any(key in found.keys for key in keys.split(", ")):
        found.no_effect(keys, "switched off")


def quantize(found: Translation) -> None:
    kind = str(found.get("model.qtype", "qfloat8"))
    if not found.get("model.quantize"):
        if {"model.quantize", "model.qtype"} & found.keys.keys():
            found.same("model.quantize, model.qtype", "off", quantize="none")
        return
    found.same("model.quantize", "on")
    name, bar, _ = kind.partition("|")
    # The others are named by their bits: uint3, convrot8, convrotint6, nvfp4, bitnet (1.58).
    bits = re.search(r"\d+$", name)
    if name in QUANTIZATIONS:
        ours = QUANTIZATIONS[name]
    elif "float8" in name or "fp8" in name:  # float8_e4m3fn
        ours = "fp8"
    elif "bitnet" in name or (bits is not None and int(bits[0]) <= 5):
        ours = "nf4"
    elif bits is not None and int(bits[0]) <= 8:
        ours = "int8"
    else:
        found.refuse("model.qtype", f"{kind} (supported: {', '.join(QUANTIZATIONS)}, or N bits)")
        return
    found.settings["quantize"] = ours
    if name in QUANTIZATIONS and not bar:
        found.same("model.qtype", f"{kind} becomes quantize {ours}")
        return
    what = " (rotated)" if "convrot" in name else " with a recovery adapter" if bar else ""
    found.differs("model.qtype", f"{kind}{what} becomes quantize {ours}")


def memory(found: Translation) -> None:
    for key in ("model.low_vram", "model.layer_offloading", "model.auto_memory"):
        if found.get(key):
            # There, low_vram alone decides only where the model is loaded.
            text = "without it training is faster" if key == "model.low_vram" else ""
            found.same(key, text, low_memory=True)
        elif key in found.keys:
            found.no_effect(key, "the free memory decides")


def lora_targets(found: Translation) -> None:
    """Converts parts of layers' names to our patterns, also only within the blocks."""
    prefix = "network.network_kwargs."
    only, without = (found.get(prefix + key) for key in ("only_if_contains", "ignore_if_contains"))
    family, names = family_named(
        found, "model.arch", str(found.get("model.arch")).partition(":")[0]
    )

    def patterns(parts: Any) -> list[str]:
        chosen = []
        for part in [parts] if isinstance(parts, str) else list(parts):
            # "$$" is the separator in their names during training.
            part = str(part).replace("$$", ".").removeprefix("transformer.")
            group = part.strip(".")
            inside = "" if part.startswith(f"{family.trunk}.") else f"{family.trunk}.*"
            chosen.append(group if group in names.groups else f"{inside}{part}*")
        return chosen

    chosen = patterns(only) if only else []
    left = [f"!{each}" for each in patterns(without)] if without else []
    targets = ",".join([*(chosen or [names.lora_targets]), *left])
    found.same(f"{prefix}only_if_contains, {prefix}ignore_if_contains", lora_targets=targets)
    if prefix.strip(".") in found.keys:
        found.no_effect(prefix.strip("."), "empty")


def rate(found: Translation, key: str, default: float, ours: str) -> None:
    """The learning rate of our optimizer; prodigy gets 1 in place of a low one."""
    given = found.get(key, default)
    low = isinstance(given, int | float) and given < PRODIGY_LEAST
    if OPTIMIZERS[ours].finds_rate and low:
        found.differs(key, f"{given:g} becomes 1.0, as in ai-toolkit", learning_rate=1.0)
    else:
        learning_rate(found, key, default)


def learning(found: Translation) -> None:
    """Number type, optimizer, learning rate and clipping."""
    precision(found, "train.dtype", "float32")
    decay = "train.optimizer_params.weight_decay"
    ours = optimizer(found, "train.optimizer", "adamw", OPTIMIZERS_THERE, decay, found.get(decay))
    key = "train.unet_lr" if "train.unet_lr" in found.keys else "train.lr"
    rate(found, key, 1e-6, ours)
    if key == "train.unet_lr" and "train.lr" in found.keys:
        found.no_effect("train.lr", "unet_lr is given")
    norm = found.get("train.max_grad_norm", 1.0)
    if ours == "adafactor":
        text = "ai-toolkit does not clip with adafactor"
        found.differs("train.max_grad_norm", text, max_grad_norm=UNCLIPPED)
    else:
        found.same("train.max_grad_norm", max_grad_norm=float(norm) or UNCLIPPED)


def lr_scheduler(found: Translation) -> None:
    given = found.get("train.lr_scheduler", "constant")
    params = "train.lr_scheduler_params"
    warmup = found.get(f"{params}.num_warmup_steps")
    if given == "linear":
        found.refuse(
            "train.lr_scheduler",
            "linear (in ai-toolkit the rate rises from a third to the whole, here it falls to 0; "
            "constant is more similar)",
        )
    else:
        names = {"constant": "constant", "cosine": "cosine", "constant_with_warmup": "constant"}
        found.choose("train.lr_scheduler", "lr_scheduler", "constant", names)
    if given == "constant_with_warmup":
        steps = WARMUP if warmup is None else warmup
        found.same(f"{params}.num_warmup_steps", lr_warmup_steps=steps)
    elif warmup is not None:
        found.refuse(f"{params}.num_warmup_steps", f"{warmup} (only with constant_with_warmup)")
    if params in found.keys:
        found.no_effect(params, "empty")


def accumulation(found: Translation) -> None:
    """The older key of ai-toolkit, which clears gradients in every step: only one batch counts."""
    key = "train.gradient_accumulation_steps"
    every, steps = found.get(key, 1), found.get("train.steps", 1000)
    if key not in found.keys:
        return
    if not isinstance(every, int) or every < 1:
        found.refuse(key, f"{every}")
    elif every == 1:
        found.same(key, "1, as always here")
    elif isinstance(steps, int):
        found.same("train.steps", str(steps))
        found.differs(
            key,
            f"{every}: ai-toolkit updates every {every} steps with only the last batch, so "
            f"{max(1, steps // every)} updates; for {every} batches per update set "
            "gradient_accumulation",
            steps=max(1, steps // every),
        )


def timesteps(found: Translation) -> None:
    """timestep_type, and linear_timesteps, which has priority."""
    if found.get("train.linear_timesteps"):
        found.same("train.linear_timesteps", timestep_sampling="uniform")
        if "train.timestep_type" in found.keys:
            found.no_effect("train.timestep_type", "while linear_timesteps is on")
    else:
        found.choose("train.timestep_type", "timestep_sampling", "sigmoid", TIMESTEPS)


def adapter(found: Translation) -> None:
    key = "model.assistant_lora_path"
    if path := found.get(key):
        turbo_adapter(found, key, path)
    else:
        no_turbo_adapter(found, key)


def masks(found: Translation) -> None:
    """The transparency of images, or a folder of masks. `alpha_mask` has priority there."""
    folder, least, inverted = (
        found.get(f"datasets.{key}") for key in ("mask_path", "mask_min_value", "invert_mask")
    )
    if found.get("datasets.alpha_mask"):
        text = "what is transparent is over white, and has a tenth of its usual weight"
        least = f"mask_min_value {least or 0:g}"
        found.differs("datasets.alpha_mask", f"{text}, in ai-toolkit {least}", masks="alpha")
        if "datasets.mask_path" in found.keys:
            found.no_effect("datasets.mask_path", "while alpha_mask is on")
        if "datasets.mask_min_value" in found.keys:
            found.no_effect("datasets.mask_min_value", "see alpha_mask")
        if inverted:
            found.refuse("datasets.invert_mask", "True (what is opaque is trained on)")
        return
    if folder:
        text = "put it into the dataset's folder as masks, remove the key, and give --masks auto"
        found.refuse("datasets.mask_path", f"{folder} ({text})")
    for key in ("datasets.mask_min_value", "datasets.invert_mask"):
        if key in found.keys:
            found.no_effect(key, "without masks")


def crops_and_flips(found: Translation) -> None:
    if found.get("datasets.random_crop"):
        text = "three crops: at the center and at both ends; there, one by chance"
        found.differs("datasets.random_crop", text, crop_jitter=1.0)
    if found.get("datasets.flip_y"):
        text = "True (images upside down; remove it, or add such images to the dataset)"
        found.refuse("datasets.flip_y", text)


def wandb(found: Translation) -> None:
    if found.get("logging.use_wandb"):
        found.same("logging.use_wandb", trackers=("wandb",))


RULES: tuple[Rule, ...] = (
    *(base, network, controls, sample_prompts, ema, quantize, memory, adapter, timesteps),
    *(lora_targets, learning, lr_scheduler, accumulation, masks, crops_and_flips, wandb),
)
