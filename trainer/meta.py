"""What `meta.json` says, so that a run can be understood and repeated."""

import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from adapters.archive import content_hash
from adapters.turbo import TurboAdapter
from trainer.dataset import Example
from trainer.loop import Trained
from trainer.settings import Settings
from trainer.validation import Curves

_LIBRARIES = ("diffusers", "peft", "safetensors", "torch", "transformers")


def describe(
    settings: Settings,
    examples: Sequence[Example],
    trained: Trained,
    zero_prior: dict[str, float] | None,
    adapter: TurboAdapter | None,
    curves: Curves,
) -> dict[str, Any]:
    """The content of `meta.json`, JSON types alone."""
    meta: dict[str, Any] = {
        "base_model": settings.base.hub_id,
        "base_family": settings.base.family,  # a base given as a folder is known by it alone
        "training_mode": settings.training_mode,
        "train_placeholder_token": settings.train_placeholder_token,
        "rank": settings.rank,
        "steps": settings.steps,
        "turbo_adapter": {"name": adapter.name, "sha256": adapter.sha256} if adapter else None,
        "settings": _plain(settings),
        "dataset": {
            "name": settings.dataset.name,
            "sha256": content_hash(settings.dataset) if settings.dataset.is_file() else None,
            "pictures": [
                {"name": each.name, "caption": each.caption, "size": [each.width, each.height]}
                for each in examples
            ],
        },
        "training": {
            "loss_first": _mean(trained.losses[:10]),
            "loss_last": _mean(trained.losses[-10:]),
            "steps_per_second": round(trained.steps_per_second, 4),
            "device": _device_name(),
        },
        "validation": curves.plain(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in _LIBRARIES},
    }
    if zero_prior is not None:
        meta |= {
            "placeholder_token": settings.placeholder_token,
            "placeholder_token_id": zero_prior["placeholder_token_id"],
            "placeholder_init_std": settings.placeholder_init_std,
            "zero_prior": zero_prior,
        }
    return meta


def _plain(settings: Settings) -> dict[str, Any]:
    values = asdict(settings)
    values["base"] = settings.base.name
    if settings.turbo_adapter not in ("auto", "none", *settings.base.training_adapters):
        values["turbo_adapter"] = Path(settings.turbo_adapter).name
    for local in ("dataset", "output_dir"):  # where things lay on one machine
        values.pop(local)
    return {
        name: value.name if isinstance(value, Path) else value for name, value in values.items()
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
