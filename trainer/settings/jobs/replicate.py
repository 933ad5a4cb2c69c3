"""The input of replicate/qwen-image-lora-trainer, as JSON: {"input": {"dataset": …}}.

Source: its `train.py`, which writes a job of ai-toolkit. All else is fixed there.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from families.registry import FAMILIES, undistilled
from trainer.settings.jobs.ai_toolkit_rules import rate
from trainer.settings.jobs.rules import optimizer
from trainer.settings.jobs.translation import Program, Translation

_OPTIMIZERS = {
    "adamw": ("adamw", 0.01, None),
    "adamw8bit": ("adamw8bit", 0.01, None),
    "adam8bit": ("adamw8bit", 0.0, None),  # without weight decay they are the same
    "prodigy": ("prodigy", 0.0, None),
}
_INPUTS = {"dataset", "steps", "learning_rate", "lora_rank", "default_caption", "batch_size"}
_INPUTS |= {"optimizer", "seed"}


def _input(content: Any) -> Any:
    return content.get("input", content) if isinstance(content, dict) else None


def _is_job(content: Any) -> bool:
    given = _input(content)
    known = isinstance(given, dict) and "dataset" in given and _INPUTS >= given.keys()
    return known and ("input" in content or "lora_rank" in given)


def _keys(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != "input"} | _input(content)


def _rules(found: Translation) -> None:
    family = next(each for each in FAMILIES.values() if found.program in each.job_names)
    found.settings["base_model"] = undistilled(family).name
    steps = found.get("steps", 1000)
    text = f"{steps}: its job updates every second step, so {steps // 2} updates"
    found.differs("steps", text, steps=steps // 2)
    ours = optimizer(found, "optimizer", "adamw", _OPTIMIZERS, "weight_decay")
    rate(found, "learning_rate", 2e-4, ours)
    found.same("seed", seed=found.get("seed") or 42)


PROGRAM = Program(
    name="Replicate",
    source="09386ee (2025-08-20)",
    is_job=_is_job,
    keys_of=_keys,
    defaults={
        "rank": 64,
        "batch_size": 1,
        "default_caption": "A photo of a person named <>",
        "resolution": "512,768,1024",
        "gradient_checkpointing": False,
        "max_grad_norm": 1.0,
    },
    rules=(_rules,),
    settings={
        "dataset": "dataset",
        "lora_rank": "rank",
        "default_caption": "default_caption",
        "batch_size": "batch_size",
    },
    no_effect=("destination", "webhook*", "version", "stream"),
)
