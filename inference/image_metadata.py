"""Prompt and settings in image files.

`parameters` is text in the format of A1111, which Civitai and other tools read; `zeroprior` is JSON
with every value. PNG files have both as text chunks. JPEG and WebP files have them in EXIF:
`parameters` as UserComment, as those tools write it, and the JSON as ImageDescription.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from families.base import Base
from inference.request import ResolvedRequest

log = logging.getLogger(__name__)

TEXT, JSON = "parameters", "zeroprior"
_JPEG_MOST = 65_527  # bytes of EXIF: a segment's length has 16 bits
_UNICODE = b"UNICODE\0"  # EXIF 2.3, 4.6.5: the character code of a UserComment


@dataclass(frozen=True)
class RequestedWeights:
    """One LoRA of a request."""

    applied: bool  # False: at scale 0, or the prompt does not contain its token (`apply_lora`)
    scale: float
    lora_sha256: str | None  # of the LoRA's safetensors file
    placeholder: str | None
    placeholder_sha256: str | None  # of its float32 vectors
    # Those of further subjects, by token; not in the file if there are none.
    other_placeholders: Mapping[str, str] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """The entry as JSON types."""
        facts = dict(vars(self))
        if not self.other_placeholders:
            del facts["other_placeholders"]
        return facts


def image_texts(
    resolved: ResolvedRequest, seed: int, base: Base, weights: Sequence[RequestedWeights]
) -> dict[str, str]:
    """The two texts for the image of `seed`."""
    facts: dict[str, Any] = {
        "prompt": resolved.prompt,
        "negative_prompt": resolved.negative_prompt,
        "seed": seed,
        "steps": resolved.steps,
        "guidance_scale": resolved.guidance_scale,
        "go_fast": resolved.go_fast,
        "width": resolved.width,
        "height": resolved.height,
        "base_model": base.hub_id,
        "weights": [each.plain() for each in weights],
    }
    if resolved.shift is not None:
        facts["shift"] = resolved.shift
    if resolved.prompt_strength is not None:
        facts["prompt_strength"] = resolved.prompt_strength
    if resolved.references:
        facts["reference_images"] = resolved.references
    if resolved.masked:
        facts["masked"] = True
    return {TEXT: _a1111_text(facts, base), JSON: json.dumps(facts)}


def _a1111_text(facts: Mapping[str, Any], base: Base) -> str:
    """Prompt, negative prompt, and a line of settings, in the format of A1111."""
    settings = {
        "Steps": facts["steps"],
        "Sampler": "Euler",
        "CFG scale": f"{facts['guidance_scale']:g}",
        "Seed": facts["seed"],
        "Size": f"{facts['width']}x{facts['height']}",
        "Model": base.name,
    }
    if "shift" in facts:
        settings["Shift"] = f"{facts['shift']:g}"
    if "prompt_strength" in facts:
        settings["Denoising strength"] = f"{facts['prompt_strength']:g}"
    hashes = [
        f"{each['placeholder'] or 'lora'}: {each['lora_sha256'][:12]}"
        for each in facts["weights"]
        if each["applied"] and each["lora_sha256"]
    ]
    if hashes:
        settings["Lora hashes"] = f'"{", ".join(hashes)}"'
    lines = [facts["prompt"]]
    if facts["negative_prompt"]:
        lines.append(f"Negative prompt: {facts['negative_prompt']}")
    lines.append(", ".join(f"{name}: {value}" for name, value in settings.items()))
    return "\n".join(lines)


def options(texts: Mapping[str, str], file_format: str) -> dict[str, Any]:
    """Arguments of Pillow's `save` that write the texts into the file."""
    if not texts:
        return {}
    if file_format == "png":
        chunks = PngInfo()
        for name, text in texts.items():
            chunks.add_text(name, text)
        return {"pnginfo": chunks}
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = JSON
    exif[ExifTags.Base.ImageDescription] = texts[JSON]
    comment = _UNICODE + texts[TEXT].encode("utf-16-be")
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    if file_format == "jpg" and len(exif.tobytes()) > _JPEG_MOST:
        log.warning("metadata not written: too long for a JPEG file; use output_format png")
        return {}
    return {"exif": exif}


def read(image: Image.Image) -> dict[str, str]:
    """The texts of an opened image file, as written by `options`; empty if it has none."""
    if image.format == "PNG":
        return {name: image.info[name] for name in (TEXT, JSON) if name in image.info}
    exif = image.getexif()
    comment = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
    if not comment.startswith(_UNICODE):
        return {}
    text = comment.removeprefix(_UNICODE).decode("utf-16-be")
    return {TEXT: text, JSON: exif[ExifTags.Base.ImageDescription]}
