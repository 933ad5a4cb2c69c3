"""What a job of images consists of: every image with its settings, checked before anything runs."""

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from families.registry import UnknownBase, find_base
from inference.request import Request as Generation
from studio.folder import Studio
from studio.replies import Problem
from studio.weights import place_of

MOST_IMAGES = 64  # of one job
AXES = ("scale", "steps", "seed", "guidance", "checkpoint")


def weights_file(studio: Studio, identity: object) -> Path:
    """The file of weights by their id. Raises `Problem` 404."""
    path = place_of(studio, str(identity)).path
    if path.is_symlink() or not path.is_file():
        raise Problem(404, f"there are no weights {str(identity)[:120]}")
    return path


def planned(
    studio: Studio, body: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All images of a job with their settings, checked. Raises `Problem` 400, 404, 422."""
    chosen = body.get("weights") or []
    if not isinstance(chosen, list) or not all(isinstance(each, dict) for each in chosen):
        raise Problem(400, "weights must be a list of id and scale", "weights")
    if len(chosen) > 2:
        raise Problem(422, "at most two LoRAs can be combined", "weights")
    axes = _axes(body.get("axes") or [])
    count = 1 if axes else body.get("count") or 1
    if type(count) is not int or not 1 <= count <= MOST_IMAGES:
        raise Problem(422, f"count must be between 1 and {MOST_IMAGES}", "count")
    seed = body.get("seed")
    seed = secrets.randbelow(2**31) if seed is None else seed
    if type(seed) is not int or not 0 <= seed < 2**63 - MOST_IMAGES:
        raise Problem(422, "seed must be a whole number of at least 0", "seed")
    base = body.get("base_model") or "auto"
    try:
        if base != "auto":
            find_base(str(base))
    except UnknownBase as error:
        raise Problem(422, str(error), "base_model") from None
    plain = {
        "prompt": body.get("prompt"),
        "negative_prompt": body.get("negative_prompt") or "",
        "weights": [{"id": each.get("id"), "scale": each.get("scale", 1.0)} for each in chosen],
        "base_model": base,
        "width": body.get("width"),
        "height": body.get("height"),
        "steps": body.get("steps"),
        "guidance": body.get("guidance"),
    }
    images: list[dict[str, Any]] = []
    for number, cell in enumerate(_cells(axes, count), start=1):
        offset, row, column, values = cell
        settings = _with(plain | {"seed": seed + offset}, values)
        images.append(_image(studio, settings) | {"number": number, "row": row, "column": column})
    if len(images) > MOST_IMAGES:
        raise Problem(422, f"{len(images)} images; at most {MOST_IMAGES} are possible", "axes")
    return images, axes


def _axes(given: Any) -> list[dict[str, Any]]:
    if not isinstance(given, list) or len(given) > 2:
        raise Problem(422, "at most two axes are possible", "axes")
    for each in given:
        known = isinstance(each, dict) and each.get("name") in AXES
        if not known or not isinstance(each.get("values"), list) or not each["values"]:
            raise Problem(422, f"an axis needs values and a name: {', '.join(AXES)}", "axes")
        if len(each["values"]) > MOST_IMAGES:
            raise Problem(422, f"an axis has more than {MOST_IMAGES} values", "axes")
    found = [{"name": each["name"], "values": each["values"]} for each in given]
    if len({each["name"] for each in found}) < len(found):
        raise Problem(422, "both axes have the same name", "axes")
    return found


Cell = tuple[int, int | None, int | None, dict[str, Any]]


def _cells(axes: Sequence[Mapping[str, Any]], count: int) -> Iterator[Cell]:
    """Offset of the seed, row, column, and changed values of each image; rows first."""
    if not axes:
        for offset in range(count):
            yield offset, None, None, {}
        return
    no_axis: dict[str, Any] = {"name": None, "values": [None]}
    across, down = axes[0], axes[1] if len(axes) > 1 else no_axis
    for (row, below), (column, beside) in product(
        enumerate(down["values"]), enumerate(across["values"])
    ):
        values = {across["name"]: beside}
        if down["name"] is not None:
            values[down["name"]] = below
        yield 0, row, column, values


def _with(settings: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the values of a cell."""
    changed = {**settings, "weights": [dict(each) for each in settings["weights"]]}
    for name, value in values.items():
        if name in ("scale", "checkpoint"):
            if not changed["weights"]:
                raise Problem(422, f"the axis {name} needs weights", "axes")
            first = changed["weights"][0]
            if name == "scale":
                first["scale"] = value
            else:
                first["id"] = _checkpoint(str(first["id"]), value)
        else:
            changed[name] = value
    return changed


def _checkpoint(identity: str, value: Any) -> str:
    """The id of the weights of a step, or `final`, of the same run; an id stays as it is."""
    if isinstance(value, str) and "/" in value:
        return value
    run = "/".join(identity.split("/")[:2])
    if value == "final":
        return f"{run}/final"
    try:
        return f"{run}/checkpoint-{int(value):06d}"
    except (ValueError, TypeError, OverflowError):
        text = f"checkpoint: {str(value)[:40]!r} is not a step"
        raise Problem(422, text, "axes", "give steps of checkpoints, or final") from None


def _image(studio: Studio, settings: dict[str, Any]) -> dict[str, Any]:
    """One image: the request of `inference`, and the files. Raises `Problem` 422 by field."""
    files = [str(weights_file(studio, each["id"])) for each in settings["weights"]]
    scales = [each["scale"] for each in settings["weights"]]
    inputs = {
        "prompt": settings["prompt"],
        "negative_prompt": settings["negative_prompt"],
        "seed": settings["seed"],
        "width": settings["width"],
        "height": settings["height"],
        "num_inference_steps": settings["steps"],
        "guidance_scale": settings["guidance"],
        "lora_scale": scales[0] if scales else None,
        "extra_lora_scale": scales[1] if len(scales) > 1 else None,
    }
    given = {name: value for name, value in inputs.items() if value is not None}
    try:
        Generation(**given)
    except ValueError as error:
        names = {"num_inference_steps": "steps", "guidance_scale": "guidance"}
        names |= {"lora_scale": "weights", "extra_lora_scale": "weights"}
        named = next((word for word in re.findall(r"[a-z_]+", str(error)) if word in inputs), "")
        raise Problem(422, str(error), names.get(named, named) or None) from None
    return {
        "request": given,
        "files": files,
        "base_model": settings["base_model"],
        "seed": settings["seed"],
        "settings": settings,
    }
