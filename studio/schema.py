"""The page's forms: fields from the declarations of the inputs, base models, presets, limits."""

import typing
from collections.abc import Iterable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from families.base import Base
from families.registry import BASES, family_of
from families.repository import is_on_disk
from inference.input_fields import Inputs
from inference.inputs import SharedInputs
from studio import gpu
from studio.new_runs import OFFERED, TRACKERS
from studio.planner import warm
from studio.replies import reply
from trainer.settings import GROUPS, PRESETS, TrainingInputs

# The fields that the page shows before the others.
FIRST = ("base_model", "preset", "steps", "resolution", "sample_prompts", "sample_every")
_TITLES = {
    "data": "Images and captions",
    "model": "Model and LoRA",
    "optimization": "Optimization",
    "memory": "Memory",
    "output": "Checkpoints, previews, validation",
    "tracking": "Tracking",
}
LIMITS = {"image_bytes": 256 << 20, "caption_bytes": 64 << 10, "archive_bytes": 4 << 30}


def fields(inputs: type[Inputs], names: Iterable[str]) -> list[dict[str, Any]]:
    """The fields of a form, from the declaration of the inputs."""
    found = []
    for name in names:
        each, types = inputs.inputs()[name], inputs.types(name)
        choices: list[str] | None = list(each.choices) or None
        if name == "trackers":
            choices = list(TRACKERS)
        if name == "base_model":
            choices = ["auto", *BASES]
        found.append(
            {
                "name": name,
                "group": each.group,
                "type": _type(types, bool(choices), each.separator),
                "description": each.description,
                "unit": each.unit or None,
                "default": inputs.default(name),
                "choices": choices,
                "minimum": each.ge,
                "maximum": each.le,
                "max_length": each.max_length,
                "separator": each.separator or None,
                "required": inputs.model_fields[name].is_required(),
                "optional": type(None) in typing.get_args(inputs.model_fields[name].annotation),
            }
        )
    return found


def _type(types: tuple[type, ...], has_choices: bool, separator: str) -> str:
    if separator:
        return "list"
    if has_choices:
        return "choice"
    if str in types:
        return "text"
    return next(name for kind, name in _KINDS if kind in types)


_KINDS = ((bool, "boolean"), (float, "number"), (int, "integer"), (object, "text"))


def base(each: Base, memory: int | None) -> dict[str, Any]:
    """One base model."""
    return {
        "name": each.name,
        "hub_id": each.hub_id,
        "license": each.license or None,
        "bytes": None if each.download is None else round(each.download * 1e9),
        "distilled": each.distilled,
        "resolution": each.default_resolution,
        "training_resolution": each.training_resolution,
        "steps": each.inference_steps,
        "guidance": each.guidance_scale,
        "references": _references(each),
        "here": is_on_disk(each),
        "fits": None if memory is None else each.training_memory * 1e9 <= memory,
    }


def _references(each: Base) -> dict[str, Any] | None:
    """How a base model takes reference images; None if it takes none."""
    how = family_of(each).reference_format
    if not each.most_references or how is None:
        return None
    return {
        "least": int(each.needs_references),
        "most": each.most_references,
        "resolution": each.reference_resolution,
        "name": how.name,
    }


async def _schema(request: Request) -> Response:
    warm(request.app.state.studio)
    found = gpu.gpu()
    memory = None if found is None else int(found["total"])
    return reply(
        {
            "fields": fields(TrainingInputs, OFFERED),
            "groups": [{"name": name, "title": _TITLES[name]} for name in GROUPS],
            "bases": [base(each, memory) for each in BASES.values()],
            "automatic": gpu.automatic_base().name,
            "presets": [{"name": k, "purpose": each.purpose} for k, each in PRESETS.items()],
            "generation": fields(SharedInputs, SharedInputs.inputs()),
            "limits": LIMITS,
            "first": list(FIRST),
        }
    )


ROUTES = [Route("/api/schema", _schema)]
