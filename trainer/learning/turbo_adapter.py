"""Finds the training adapter of a run, and merges it into the distilled base."""

import logging
from pathlib import Path
from typing import Any

from adapters.turbo import TurboAdapter
from families.family import Family
from families.few_steps import find_few_step_lora
from families.repository import adapter_path
from families.without_weights import transformer_without_weights
from trainer.settings import Settings

log = logging.getLogger(__name__)


def find_turbo_adapter(settings: Settings) -> TurboAdapter | None:
    """Returns the training adapter, or None, with a warning if the base is distilled.

    Raises `LoraMismatch` for an adapter with layers that the base lacks.
    """
    wanted, base = settings.turbo_adapter, settings.base
    if wanted == "auto" and base.training_adapters:
        wanted = list(base.training_adapters)[-1]
    if wanted in ("auto", "none"):
        if base.distilled:
            why, other = "turbo_adapter is off", base.train_on
            if not base.training_adapters:
                why = "no training adapter for it is known"
            log.warning(
                "%s is distilled to %d steps, and %s: training destroys the distillation, and "
                "%d-step images will become blurry%s",
                *(base.name, base.inference_steps, why, base.inference_steps),
                f". Train on {other.name}: its LoRAs work on {base.name}, too" if other else "",
            )
        return None
    file = base.training_adapters.get(wanted)
    few_steps = None if file else find_few_step_lora([Path(wanted).name])
    if few_steps is not None:
        log.warning(
            "turbo_adapter: %s is %s, which adds a distillation; a training adapter removes one. "
            "Train without it and load it when generating",
            *(Path(wanted).name, few_steps.name),
        )
    adapter = TurboAdapter.read(adapter_path(file) if file else Path(wanted).expanduser())
    adapter.merging(transformer_without_weights(base), base.name)  # refuses another model's
    return adapter


def transformer_with(adapter: TurboAdapter | None, family: Family) -> Any:
    """The family's transformer with the adapter merged, before it is quantized or sharded."""
    base = family.base
    # Changed while it is loaded: weights cannot be changed after they are quantized or split.
    stored = family.storage.quantize != "none" or family.storage.shard
    if adapter is None:
        return family.load_transformer() if stored else family.transformer
    if stored:
        merging = adapter.merging(transformer_without_weights(base), base.name)
        transformer, share = family.load_transformer(merging), merging.share()
    else:
        transformer = family.transformer
        share = adapter.merge(transformer, base.name)
    count = len(adapter.factors)
    log.info("%s: merged %d of %d, |dW|/|W| = %.4g", adapter.name, count, count, share)
    return transformer
