"""The engine: one base in memory, the weights that lie over it, one request at a time."""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from adapters.archive import Archive
from adapters.cache import AdapterCache
from adapters.deltas import Delta, is_zero
from adapters.layout import Layout
from adapters.overlay import Overlay
from families.bases import Base
from families.family import Family
from families.loading import default_device, default_dtype, load_family
from families.repository import transformer_source
from families.tokens import ids_wanted
from inference import acceleration
from inference.drawing import describe, draw
from inference.images import fresh_folder, read_image, save_images
from inference.making import making
from inference.request import Request, settle
from inference.sources import Sources, named
from inference.text_cache import TextCache
from inference.weights import (
    Weights,
    check_words,
    choose_base,
    few_step_lora,
    vectors_of,
    warn_of_no_effect,
    warn_of_untrained_placeholder,
)

log = logging.getLogger(__name__)

Source = str | PathLike[str]


class Engine:
    """Draws requests. Safe to call from any thread; requests are drawn one after another."""

    def __init__(
        self,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        sources: Sources | None = None,
    ) -> None:
        self.device = device or default_device()
        self.dtype = dtype or default_dtype(self.device)
        self.sources = sources or Sources()
        self._lock = threading.Lock()
        self._family: Family | None = None
        self._over: tuple[Overlay, Layout] | None = None  # of the family's transformer
        self._adapters = AdapterCache()
        self._texts = TextCache()
        self._default: Archive | None = None  # for requests that bring none

    def warm_up(self, default_weights: Source | None = None) -> None:
        """Loads the default base, every part of it, and has it ready for the usual sizes.

        `default_weights` are laid over the base wherever a request brings none of its own; they
        name the default base, too. Unlike those of a request they may be any file.
        """
        if default_weights:
            self._default = self._read_named(default_weights, None, None)
        with self._lock:
            family = self._load(choose_base("auto", self._wanted(None, None, 1.0, 1.0)))
            _ = family.prompts, family.text_encoder, family.transformer, family.vae

    def predict(
        self,
        report: Callable[[str, float], None] | None = None,
        *,
        replicate_weights: Source | None = None,
        lora_weights: Source | None = None,
        extra_lora: Source | None = None,
        hf_api_token: Any = None,  # text, or Cog's Secret
        image: Source | None = None,
        base_model: str = "auto",
        output_format: str = "webp",
        output_quality: int = 90,
        output_metadata: bool = True,
        **request: Any,
    ) -> list[Path]:
        """Draws a request given as the Cog face's inputs and returns the picture files.

        A string may come from a stranger: of this machine's files it names only those in the
        working folder. `report` is told the metric `seconds_per_picture`.
        """
        if replicate_weights and lora_weights:
            raise ValueError(
                "replicate_weights and lora_weights both say which LoRA to draw with; give one, "
                "and the other as extra_lora"
            )
        if request.get("extra_lora_scale") is not None and not extra_lora:
            raise ValueError("extra_lora_scale is the strength of extra_lora, which is not given")
        here, token = Path.cwd(), _revealed(hf_api_token)
        if image:
            request["image"] = read_image(self.sources.file(image, None, here))
        asked = Request(**request)
        start = time.perf_counter()
        first, second = (
            self._read_named(source, token, here) if source else None
            for source in (replicate_weights or lora_weights, extra_lora)
        )
        images = self.draw(asked, first, base_model, second)
        if report is not None:
            report("seconds_per_picture", (time.perf_counter() - start) / len(images))
        with fresh_folder() as folder:
            return save_images(images, folder, output_format, output_quality, output_metadata)

    def read(self, weights: Source, config: Path | None = None) -> Archive:
        """The checked archive of a weights file; those read lately are kept.

        `config` is its adapter_config.json where that is not in the same folder. Raises
        `BrokenArchive` with the reason.
        """
        return named(self._adapters.get(weights, config), weights)

    def _read_named(self, source: Source, token: str | None, folder: Path | None) -> Archive:
        """The archive of a source, which may be known by the source's name."""
        file = self.sources.file(source, token, folder)
        return named(self.read(file, self.sources.config(source, token)), source)

    def draw(
        self,
        request: Request,
        archive: Archive | None = None,
        base_model: str = "auto",
        extra: Archive | None = None,
    ) -> list[Image.Image]:
        """Pictures of the request, with the archives laid over its base for this request.

        What made a picture is in its `info` (`inference.making`). Raises `LoraMismatch`,
        `UnknownBase` or `MissingModel` with the reason, before any weight is touched.
        """
        extra_scale = 1.0 if request.extra_lora_scale is None else request.extra_lora_scale
        weights = self._wanted(archive, extra, request.lora_scale, extra_scale)
        with self._lock, torch.inference_mode():
            base = choose_base(base_model, weights)
            family = self._load(base)
            few_steps = few_step_lora(weights, base)
            drawing = settle(request, base, family.resolution_multiple, few_steps)
            vectors = vectors_of(weights, family)
            for each in weights:
                warn_of_untrained_placeholder(each)
            check_words(drawing.prompt, list(vectors))
            self._lay(weights, family)
            log.info("%s", describe(drawing, base))
            if ids_wanted():
                log.info("%s", family.tokenize(drawing.prompt, vectors).explain())
            images = draw(family, drawing, vectors, request.image, self._texts)
        laid = [each.laid() for each in weights]
        for image, seed in zip(images, drawing.seeds, strict=True):
            image.info.update(making(drawing, seed, base, laid))
        return images

    def _wanted(
        self, archive: Archive | None, extra: Archive | None, scale: float, extra_scale: float
    ) -> list[Weights]:
        wanted = []
        if archive := archive or self._default:
            wanted.append(Weights(archive, scale, "weights"))
        if extra is not None:
            wanted.append(Weights(extra, extra_scale, "weights in extra_lora"))
        return wanted

    def _load(self, base: Base) -> Family:
        """The base's family; another base leaves memory first."""
        if self._family is None or self._family.base != base:
            family = load_family(base, self.device, self.dtype)  # its weights come later
            # Forgotten before it is released: a cancellation may come between any two lines.
            old, self._over, self._family = self._family, None, None
            if old is not None:
                log.info("%s leaves memory; loading %s", old.base.name, base.name)
                old.release("transformer", "text_encoder", "vae")
            self._family = family
            if acceleration.wanted(self.device):
                self._prepared(family)  # what it puts into the transformer is compiled, too
                acceleration.accelerate(family)
        return self._family

    def _prepared(self, family: Family) -> tuple[Overlay, Layout]:
        """What lays LoRAs over the family's transformer, and what finds its layers."""
        if self._over is None:
            transformer, base = family.transformer, family.base
            layout = Layout.of(transformer, base.name, family.original_names)
            self._over = Overlay(transformer, checkpoint=transformer_source(base)), layout
        return self._over

    def _lay(self, weights: Sequence[Weights], family: Family) -> None:
        """Brings the transformer to base + scales * LoRAs; what is there already costs nothing."""
        if self._over is None and not weights:
            return
        overlay, layout = self._prepared(family)
        loras = [
            (self._adapters.fit(each.archive, layout, each.name), each.scale) for each in weights
        ]
        overlay.apply(loras)
        alone = sum(each.scale != 0 for each in weights) == 1
        for each, (deltas, scale) in zip(weights, loras, strict=True):
            if scale == 0:
                continue
            total = len(deltas)
            log.info("LoRA: applied %d of %d modules at scale %g", total, total, scale)
            find_zero = partial(_zero_layers, deltas)
            zero = self._adapters.noted(each.archive, "zero", find_zero)
            lost: list[str] = []
            if alone and len(zero) < total:
                key = layout.base_name, self.dtype, scale
                find_lost = partial(overlay.lost, deltas, scale)
                lost = self._adapters.noted(each.archive, key, find_lost)
            warn_of_no_effect(each, total, zero, lost)


def _zero_layers(deltas: Mapping[str, Delta]) -> list[str]:
    return [name for name, delta in deltas.items() if is_zero(delta)]


def _revealed(secret: Any) -> str | None:
    """The text of a Cog `Secret`, which hides it from every log; older runtimes give the text."""
    text = secret.get_secret_value() if hasattr(secret, "get_secret_value") else secret
    return text.strip() or None if text else None
