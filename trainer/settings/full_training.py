"""What does not go together with `training: full`, each with the reason and what to do."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from trainer.settings.choices import OPTIMIZERS

if TYPE_CHECKING:
    from trainer.settings.fields import Settings


def conflicts_with_full(settings: "Settings") -> Iterator[str]:
    """One line for each setting that conflicts with a full training."""
    base = settings.base
    for name, why in _conflicts(settings):
        yield f"training is full, but {name}, {why}"
    if settings.turbo_adapter != "none" and (
        settings.turbo_adapter != "auto" or base.training_adapters
    ):
        yield (
            f"training is full, but {base.name} would be trained with a training adapter "
            f"(turbo_adapter {settings.turbo_adapter[:80]}), which cannot be taken out of the "
            "weights again without rounding them; train an undistilled base model, or set "
            "turbo_adapter to none, which destroys the distillation"
        )


def _conflicts(settings: "Settings") -> Iterator[tuple[str, str]]:
    """A setting with its value, and why it cannot be."""
    if settings.given.rank is not None:
        yield f"rank is {settings.rank}", "and only a LoRA has one; remove it"
    if settings.adapter != "lora":
        yield f"adapter is {settings.adapter}", "and there is no LoRA; remove it"
    if settings.quantize not in ("auto", "none"):
        yield (
            f"quantize is {settings.quantize}",
            "and quantized weights cannot be trained; set it to none",
        )
    if settings.low_memory:
        yield (
            "low_memory is on",
            "and weights that are trained cannot be offloaded; set it to false",
        )
    if settings.ema_decay > 0:
        preset = f" (of preset {settings.preset})" * (settings.given.ema_decay is None)
        yield (
            f"ema_decay is {settings.ema_decay:g}{preset}",
            "which needs another copy of all weights; set it to 0",
        )
    if settings.gradient_accumulation > 1:
        yield (
            f"gradient_accumulation is {settings.gradient_accumulation}",
            "and each gradient is applied and freed in the backward pass; raise batch_size instead",
        )
    if OPTIMIZERS[settings.optimizer].finds_rate:
        yield (
            f"optimizer is {settings.optimizer}",
            "which needs all gradients at once; use adafactor, adamw8bit or adamw",
        )
    if settings.sample_options.get("lora_scale", 1) != 1:
        yield "sample.lora_scale is set", "and there is no LoRA; remove it"
    if settings.hf_repo_id:
        yield (
            f"hf_repo_id is {settings.hf_repo_id}",
            "and only a LoRA is uploaded with a model card; remove it, and upload the folder model "
            "with `hf upload`",
        )
