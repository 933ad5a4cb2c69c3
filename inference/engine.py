"""The engine: one base in memory, the weights that lie over it, one request at a time."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from adapters.archive import Archive, content_hash, read_archive
from adapters.factors import LoraMismatch, check_fits
from adapters.overlay import Overlay
from families.bases import Base, UnknownBase, default_base, find_base
from families.family import Family
from families.loading import default_device, default_dtype, load_family
from families.tokens import ids_wanted, split_words
from inference.images import fresh_folder, save_images, to_images
from inference.request import Drawing, Request, settle
from inference.sampling import sample

log = logging.getLogger(__name__)


class Engine:
    """Draws requests. Safe to call from any thread; requests are drawn one after another."""

    def __init__(
        self, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self.device = device or default_device()
        self.dtype = dtype or default_dtype(self.device)
        self._lock = threading.Lock()
        self._family: Family | None = None
        self._overlay: Overlay | None = None
        self._laid: tuple[Archive | None, float] = (None, 0.0)  # over the base now, at its scale
        self._last_read: tuple[str, Archive] | None = None  # with its content hash

    def warm_up(self) -> None:
        """Loads the default base, every part of it."""
        with self._lock:
            family = self._load(default_base())
            _ = family.prompts, family.text_encoder, family.transformer, family.vae

    def predict(
        self,
        report: Callable[[str, float], None] | None = None,
        *,
        replicate_weights: str | PathLike[str] | None = None,
        base_model: str = "auto",
        output_format: str = "webp",
        output_quality: int = 90,
        **request: Any,
    ) -> list[Path]:
        """Draws a request given as the Cog face's inputs and returns the picture files.

        `report` is told the metric `seconds_per_picture`.
        """
        asked = Request(**request)
        start = time.perf_counter()
        archive = self.read(replicate_weights) if replicate_weights else None
        images = self.draw(asked, archive, base_model)
        if report is not None:
            report("seconds_per_picture", (time.perf_counter() - start) / len(images))
        return save_images(images, fresh_folder(), output_format, output_quality)

    def read(self, weights: str | PathLike[str]) -> Archive:
        """The checked archive of a weights file; the last one is kept, since requests repeat.

        Raises `BrokenArchive` with the reason.
        """
        path = Path(str(weights))
        key = content_hash(path) if path.is_file() else ""
        last = self._last_read  # once: another thread may replace it in between
        if last is None or last[0] != key:
            last = self._last_read = (key, read_archive(path))
        return last[1]

    def draw(
        self, request: Request, archive: Archive | None = None, base_model: str = "auto"
    ) -> list[Image.Image]:
        """Pictures of the request, with the archive laid over its base for this request.

        Raises `LoraMismatch`, `UnknownBase` or `MissingModel` with the reason, before any weight
        is touched.
        """
        with self._lock, torch.inference_mode():
            base = choose_base(base_model, archive)
            family = self._load(base)
            drawing = settle(request, base, family.resolution_multiple)
            vectors = _vectors(archive, family)
            _check_words(drawing.prompt, archive)
            self._lay(archive, request.lora_scale, family)
            log.info("%s", describe(drawing, base))
            if ids_wanted():
                log.info("%s", family.tokenize(drawing.prompt, vectors).explain())
            return draw(family, drawing, vectors)

    def _load(self, base: Base) -> Family:
        """The base's family; another base leaves memory first."""
        if self._family is None or self._family.base != base:
            self._overlay, self._laid = None, (None, 0.0)
            if self._family is not None:
                self._family.release("transformer", "text_encoder", "vae")
            self._family = load_family(base, self.device, self.dtype)
        return self._family

    def _lay(self, archive: Archive | None, scale: float, family: Family) -> None:
        """Brings the transformer to base + scale * LoRA; nothing is done where it is there."""
        wanted = (archive, scale) if archive is not None and scale != 0 else (None, 0.0)
        if wanted[0] is self._laid[0] and wanted[1] == self._laid[1]:
            return
        if self._overlay is None:
            self._overlay = Overlay(family.transformer)
        loras = []
        if wanted[0] is not None:
            check_fits(wanted[0].factors, family.transformer, "weights", family.base.name)
            loras = [(wanted[0].factors, scale)]
        self._laid = (None, 0.0)  # what is true should applying fail, since it restores
        count = self._overlay.apply(loras)
        if wanted[0] is not None:
            total = len(wanted[0].factors)
            log.info("LoRA: merged %d of %d layers at scale %g", count, total, scale)
        self._laid = wanted


def draw(
    family: Family, drawing: Drawing, vectors: dict[str, torch.Tensor] | None = None
) -> list[Image.Image]:
    """The pictures of a settled request on the family as it stands, one after another.

    Each depends on its own seed alone, never on how many are drawn with it.
    """
    text = family.encode_prompts([drawing.prompt], vectors)
    negative = None
    if drawing.guidance_scale > 1:
        negative = family.encode_prompts([drawing.negative_prompt or family.empty_prompt], vectors)
    sigmas = family.sigmas(drawing.steps, drawing.width, drawing.height)
    images = []
    for seed in drawing.seeds:
        noise_BCHW = family.initial_noise([seed], drawing.width, drawing.height)
        latents_BCHW = sample(family, noise_BCHW, sigmas, text, negative, drawing.guidance_scale)
        images += to_images(family.decode(latents_BCHW))
    return images


def describe(drawing: Drawing, base: Base) -> str:
    """One line that repeats the drawing."""
    settings = ", ".join(
        f"{field.name} {getattr(drawing, field.name)!r}"
        for field in fields(drawing)
        if getattr(drawing, field.name) != ""
    )
    return f"{base.name}: {settings}"


def choose_base(base_model: str, archive: Archive | None) -> Base:
    """The base a request is drawn on: as asked, else the weights' own, else the default.

    Raises `LoraMismatch` for weights of another family than the base that was asked for.
    """
    trained_on = None
    if archive is not None and archive.base_model:
        try:
            trained_on = find_base(archive.base_model)
        except UnknownBase as error:
            if base_model == "auto":
                raise UnknownBase(
                    f"the weights were trained on {archive.base_model}, which is not here; "
                    "name the base to draw with in base_model"
                ) from error
    if base_model == "auto":
        return trained_on or default_base()
    base = find_base(base_model)
    if trained_on is not None and trained_on.family != base.family:
        raise LoraMismatch(
            f"the weights were trained on {trained_on.name} and cannot be laid over {base.name}; "
            "leave base_model on auto"
        )
    if trained_on is not None and trained_on.name != base.name:
        log.warning(
            "weights trained on %s are drawn on %s: expect a weaker likeness",
            *(trained_on.name, base.name),
        )
    return base


def _vectors(archive: Archive | None, family: Family) -> dict[str, torch.Tensor]:
    if archive is None or archive.placeholder is None:
        return {}
    placeholder = archive.placeholder
    width = placeholder.vectors.shape[1]
    if width != family.text_width:
        raise LoraMismatch(
            f"the placeholder {placeholder.token} has {width} values, the text encoder of "
            f"{family.base.name} takes {family.text_width}; it was trained on another model"
        )
    return {placeholder.token: placeholder.vectors.to(family.device)}


def _check_words(prompt: str, archive: Archive | None) -> None:
    """Says in the log when prompt and placeholder do not go together."""
    token = archive.placeholder.token if archive is not None and archive.placeholder else None
    if token is not None and token not in split_words(prompt, [token]):
        log.warning("the prompt does not hold %s, the word the weights were trained with", token)
    unknown = [word for word in _bracketed(prompt) if word != token]
    if unknown:
        log.warning(
            "the prompt holds %s, which %s not trained: it is read as plain text",
            *(", ".join(unknown), "was" if len(unknown) == 1 else "were"),
        )


def _bracketed(prompt: str) -> list[str]:
    """Words that look like placeholders: `<zwx>`."""
    return [
        word
        for part in prompt.split()
        for word in [part[part.find("<") : part.find(">") + 1]]
        if len(word) > 2
    ]
