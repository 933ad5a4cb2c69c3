"""What a job of images consists of: every image with its settings, checked before anything runs."""

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from families.base import Base
from families.registry import UnknownBase, find_base
from inference.request import REFERENCES, check_images, wanted_size
from inference.request import Request as Generation
from studio import input_images
from studio.folder import Studio
from studio.gpu import automatic_base
from studio.replies import Problem
from studio.weights import base_model, place_of

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
    given = input_images.named(body)
    if given and body.get("when") == "by_run":
        text = "a run generates from the prompt alone, without reference or start images"
        raise Problem(422, text, "when", "remove the images, or generate without the run")
    if body.get("prompt_strength") is not None:
        plain["prompt_strength"] = body["prompt_strength"]
    files = input_images.files(studio, given)
    opened = input_images.opened(files)
    cells = list(_cells(axes, count))
    if len(cells) > MOST_IMAGES:
        raise Problem(422, f"{len(cells)} images; at most {MOST_IMAGES} are possible", "axes")
    images: list[dict[str, Any]] = []
    for number, (offset, row, column, values) in enumerate(cells, start=1):
        settings = _with(plain | given | {"seed": seed + offset}, values)
        place = {"number": number, "row": row, "column": column, "inputs": files}
        images.append(_image(studio, settings, opened) | place)
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


def _image(studio: Studio, settings: dict[str, Any], opened: Mapping[str, Any]) -> dict[str, Any]:
    """One image: the request of `inference`, and the files. `opened` are its input images.

    Raises `Problem` 422 by field.
    """
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
        "prompt_strength": settings.get("prompt_strength"),
        "lora_scale": scales[0] if scales else None,
        "extra_lora_scale": scales[1] if len(scales) > 1 else None,
    }
    given = {name: value for name, value in inputs.items() if value is not None}
    try:
        request = Generation(**given, **opened)
    except ValueError as error:
        names = {"num_inference_steps": "steps", "guidance_scale": "guidance"}
        names |= {"lora_scale": "weights", "extra_lora_scale": "weights"}
        fields = {*inputs, *input_images.NAMES}
        named = next((word for word in re.findall(r"[a-z_]+", str(error)) if word in fields), "")
        raise Problem(422, str(error), names.get(named, named) or None) from None
    base = _base(studio, settings)
    if base is not None and (opened or base.needs_references):
        try:
            check_images(request, base)
        except ValueError as error:
            field = REFERENCES if "reference" in str(error) else "width"
            raise Problem(422, str(error), field) from None
        if request.width is None:  # from the image; written out, since the page shows the size
            sides = (round(each / base.size_multiple) for each in wanted_size(request, base))
            width, height = (max(1, each) * base.size_multiple for each in sides)
            given |= {"width": width, "height": height}
            settings |= {"width": width, "height": height}
    return {
        "request": given,
        "files": files,
        "base_model": settings["base_model"],
        "seed": settings["seed"],
        "settings": settings,
    }


def _base(studio: Studio, settings: Mapping[str, Any]) -> Base | None:
    """The base model that generates; None if only the generator's process can tell."""
    name = settings["base_model"]
    if name == "auto":
        named = (base_model(studio, str(each["id"])) for each in settings["weights"])
        name = next(filter(None, named), None) or automatic_base().name
    try:
        return find_base(name)
    except UnknownBase:
        return None
