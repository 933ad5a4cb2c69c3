"""The engine: one base in memory, the weights that lie over it, one request at a time."""

import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from os import PathLike
from pathlib import Path

import torch
from PIL import Image

from adapters.archive import Archive, Check
from adapters.cache import AdapterCache
from adapters.formats import Delta, Layout, LoraMismatch, is_zero
from adapters.merging import LoraMerger
from families.base import Base
from families.family import Family
from families.loading import default_device, default_dtype, load_family
from families.no_gpu import NoGpu, how_to_run_anyway, why_too_slow
from families.out_of_memory import without_locals
from families.registry import UnknownBase, default_base, family_of, find_base
from families.repository import transformer_source
from families.tokens import ids_wanted
from families.without_weights import transformer_without_weights
from inference import acceleration
from inference.fetch import Sources, named, of_input
from inference.generation import describe, generate
from inference.image_metadata import making
from inference.images import (
    fresh_folder,
    read_image,
    save_images,
    writable_folder,
)
from inference.input_fields import check_length
from inference.inputs import IMAGES, SECRET_LENGTH, GenerationInputs
from inference.prompts import check_length as check_text_length
from inference.prompts import place_subject, prompts_of
from inference.request import Request, check_size, check_work, settle
from inference.secret import GivenSecret, revealed
from inference.text_cache import TextCache
from inference.weights import (
    Weights,
    check_words,
    choose_base,
    few_step_lora,
    vectors_of,
    warn_of_no_effect,
    warn_of_other_base,
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
        cpu: bool | None = None,
    ) -> None:
        """`cpu` is whether a large model may run without a GPU; None warns of it."""
        self.cpu = cpu
        self.device = device or default_device()
        self.dtype = dtype or default_dtype(self.device)
        self.sources = sources or Sources()
        self._lock = threading.Lock()
        self._family: Family | None = None
        self._over: tuple[LoraMerger, Layout] | None = None  # of the family's transformer
        self._auto: Base | None = None
        self._adapters = AdapterCache()
        self._texts = TextCache()
        self._default: Archive | None = None  # for requests that bring none
        self._layouts: dict[tuple[str, Path | None], Layout] = {}  # of models not in memory

    def warm_up(self, default_weights: Source | None = None) -> None:
        """Loads the default base, every part of it, and has it ready for the usual sizes.

        `default_weights` are laid over the base wherever a request brings none of its own; they
        name the default base, too. Unlike those of a request they may be any file.
        """
        if default_weights:
            self._default = self._read_named(default_weights, None, any_file=True)
        with self._lock:
            weights = self._wanted(None, None, 1.0, 1.0)
            family = self._load(choose_base("auto", weights, self._automatic))
            _ = family.prompts, family.text_encoder, family.transformer, family.vae

    @without_locals
    def predict(
        self,
        inputs: GenerationInputs,
        report: Callable[[str, float], None] | None = None,
        *,
        hf_api_token: GivenSecret = None,
        any_file: bool = False,
        output_dir: Source | None = IMAGES,
    ) -> list[Path]:
        """Generates the images of a request and returns their files.

        `any_file` says whether the strings come from a person who may read every file of this
        machine; otherwise they name only files that `inference.fetch.sources.allowed_file` allows.
        The files are `image-0.webp`, … in `output_dir`, where nothing is overwritten and nothing is
        ever removed. None, on a server: a temporary folder, which later requests remove after an
        hour. `report` receives the metric `seconds_per_picture`.
        """
        base_model, extra_lora = inputs.base_model, inputs.extra_lora
        if base_model != "auto" and not any_file:
            find_base(base_model)  # a folder is a name of files, too
        token = revealed(hf_api_token)
        check_length("hf_api_token", token or "", SECRET_LENGTH)
        if token and not (token.isascii() and token.isprintable() and " " not in token):
            raise ValueError("hf_api_token contains characters that no token has; copy it again")
        image = None
        if inputs.image:
            with of_input("image"):
                image = read_image(self.sources.file(inputs.image, None, any_file))
        asked = Request.of(inputs, image)
        folder = None if output_dir is None else writable_folder(output_dir)
        start = time.perf_counter()
        main = "replicate_weights" if inputs.replicate_weights else "lora_weights"
        given = {main: inputs.replicate_weights or inputs.lora_weights, "extra_lora": extra_lora}
        alone = not all(given.values())

        def read(name: str) -> Archive | None:
            source, extra = given[name], name == "extra_lora"
            if not source:
                return None
            with of_input(name):
                return self._read_named(
                    *(source, token, any_file),
                    lambda planned: self._check(planned, base_model, extra, alone),
                )

        first, second = read(main), read("extra_lora")
        try:
            images = self.generate(asked, first, base_model, second, from_request=not any_file)
        except (LoraMismatch, UnknownBase):
            for archive in filter(None, (first, second)):
                self._adapters.drop(archive)
            raise
        if report is not None:
            report("seconds_per_picture", (time.perf_counter() - start) / len(images))
        with fresh_folder() if folder is None else nullcontext(folder) as place:
            return save_images(
                images,
                place,
                inputs.output_format,
                inputs.output_quality,
                inputs.output_metadata,
            )

    def read(
        self, weights: Source, check: Check | None = None, config: Path | None = None
    ) -> Archive:
        """The checked archive of a weights file; those read lately are kept.

        `check` and `config` are those of `read_archive`. Raises `BrokenArchive` with the reason.
        """
        return named(self._adapters.get(weights, check, config), weights)

    def _read_named(
        self, source: Source, token: str | None, any_file: bool, check: Check | None = None
    ) -> Archive:
        """The archive of a source, which may be known by the source's name."""
        file = self.sources.file(source, token, any_file)
        return named(self.read(file, check, self.sources.config(source, token)), source)

    def generate(
        self,
        request: Request,
        archive: Archive | None = None,
        base_model: str = "auto",
        extra: Archive | None = None,
        from_request: bool = False,
    ) -> list[Image.Image]:
        """Pictures of the request, with the archives laid over its base for this request.

        With `from_request` all of its images together have a limit, too. What made a picture is in
        its `info` (`inference.image_metadata`). Raises `LoraMismatch`, `UnknownBase` or
        `MissingModel` with the reason, before any weight is touched.
        """
        extra_scale = 1.0 if request.extra_lora_scale is None else request.extra_lora_scale
        weights = self._wanted(archive, extra, request.lora_scale, extra_scale)
        with self._lock, torch.inference_mode():
            base = choose_base(base_model, weights, self._automatic)
            warn_of_other_base(base, weights)
            check_size(request, base)
            few_steps = few_step_lora(weights, base)
            if from_request:
                check_work(request, base, few_steps)
            family = self._load(base)
            vectors = vectors_of(weights, family)
            request = place_subject(request, list(vectors))
            resolved = settle(request, base, family.resolution_multiple, few_steps)
            for each in weights:
                warn_of_untrained_placeholder(each)
            check_words(resolved.prompt, list(vectors))
            check_text_length(family, prompts_of(resolved), vectors)
            self._lay(weights, family)
            log.info("%s", describe(resolved, base))
            if ids_wanted():
                log.info("%s", family.tokenize(resolved.prompt, vectors).explain())
            images = acceleration.with_fallback(
                family.transformer,
                lambda: generate(family, resolved, vectors, request.image, self._texts),
            )
        applied = [each.applied() for each in weights]
        for image, seed in zip(images, resolved.seeds, strict=True):
            image.info.update(making(resolved, seed, base, applied))
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

    def _automatic(self) -> Base:
        """What `auto` means, decided once: what is loaded then takes of the free memory."""
        if self._auto is None:
            self._auto = default_base("generation")
        return self._auto

    def _check(self, planned: Archive, base_model: str, extra: bool, alone: bool) -> None:
        """Refuses weights that don't fit their model, by their header, before they are read.

        Of two LoRAs, the other one may decide which model it is: then only one that names its
        model, or comes with `base_model`, is checked.
        """
        first, second = (None, planned) if extra else (planned, None)
        weights = self._wanted(first, second, 1.0, 1.0)
        if alone or planned.base_model or base_model != "auto":
            base = choose_base(base_model, weights if alone else weights[-1:], self._automatic)
            self._layout_of(base).fit(planned.deltas, weights[-1].name)

    def _layout_of(self, base: Base) -> Layout:
        """The layers of a base, from the model in memory or else from its configuration."""
        family, over = self._family, self._over
        if over is not None and family is not None and family.base == base:
            return over[1]
        key = base.name, base.folder
        if key not in self._layouts:
            names = family_of(base).original_names
            self._layouts[key] = Layout.of(transformer_without_weights(base), base.name, names)
        return self._layouts[key]

    def _load(self, base: Base) -> Family:
        """The base's family; another base leaves memory first."""
        if self._family is None or self._family.base != base:
            if slow := why_too_slow(base, self.device):
                if self.cpu is False:
                    raise NoGpu(how_to_run_anyway(slow))
                log.warning("%s", slow)
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

    def _prepared(self, family: Family) -> tuple[LoraMerger, Layout]:
        """What lays LoRAs over the family's transformer, and what finds its layers."""
        if self._over is None:
            transformer, base = family.transformer, family.base
            layout = Layout.of(transformer, base.name, family.original_names)
            self._over = LoraMerger(transformer, checkpoint=transformer_source(base)), layout
        return self._over

    def _lay(self, weights: Sequence[Weights], family: Family) -> None:
        """Brings the transformer to base + scales * LoRAs; what is there already costs nothing."""
        if self._over is None and not weights:
            return
        merger, layout = self._prepared(family)
        loras = [
            (self._adapters.fit(each.archive, layout, each.name), each.scale) for each in weights
        ]
        merger.apply(loras)
        alone = sum(each.scale != 0 for each in weights) == 1
        for each, (deltas, scale) in zip(weights, loras, strict=True):
            if scale == 0:
                continue
            total = len(deltas)
            log.info("LoRA: applied %d of %d modules at scale %g", total, total, scale)
            find_zero = functools.partial(_zero_layers, deltas)
            zero = self._adapters.noted(each.archive, "zero", find_zero)
            lost: list[str] = []
            if alone and len(zero) < total:
                key = layout.base_name, self.dtype, scale
                find_lost = functools.partial(merger.lost, deltas, scale)
                lost = self._adapters.noted(each.archive, key, find_lost)
            warn_of_no_effect(each, total, zero, lost)


def _zero_layers(deltas: Mapping[str, Delta]) -> list[str]:
    return [name for name, delta in deltas.items() if is_zero(delta)]
