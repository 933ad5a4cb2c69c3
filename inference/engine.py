"""The engine: keeps one base model in memory and generates one request at a time, with LoRAs."""

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
from adapters.trained_model import read_trained_model
from families.base import Base
from families.family import Family
from families.loading import default_device, default_dtype, load_family
from families.no_gpu import NoGpu, how_to_run_anyway, why_too_slow
from families.out_of_memory import without_locals
from families.registry import UnknownBase, default_base, family_of, find_base, find_base_or_folder
from families.repository import transformer_source
from families.tokens import ids_wanted
from families.without_weights import transformer_without_weights
from inference import acceleration
from inference.fetch import Sources, named, of_input
from inference.generation import Watch, describe, generate
from inference.image_metadata import image_texts
from inference.images import fresh_folder, read_image, save_images, writable_folder
from inference.inputs import IMAGES, GenerationInputs
from inference.prompts import check_length as check_text_length
from inference.prompts import place_subject, prompts_of
from inference.request import Request, check_images, check_references, check_work, resolve
from inference.residence import choose_storage
from inference.secret import GivenSecret, hub_token
from inference.text_cache import TextCache
from inference.weights import (
    Weights,
    check_tokens,
    choose_base,
    few_step_lora,
    select,
    vectors_of,
    warn_of_no_effect,
    warn_of_other_base,
    warn_of_untrained_placeholder,
    with_own_tokens,
)

log = logging.getLogger(__name__)

Source = str | PathLike[str]


class Engine:
    """Generates the images of requests. Thread-safe; requests run one after another."""

    def __init__(
        self,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        sources: Sources | None = None,
        cpu: bool | None = None,
        only: Base | None = None,
        adapters: AdapterCache | None = None,
    ) -> None:
        """`cpu`: whether a large model may run without a GPU; None: with a warning.

        `only`: the base; requests for another one are refused. None: any.
        """
        self.cpu, self._only = cpu, only
        self._choose = functools.partial(choose_base, default=self._automatic, only=only)
        self.device = device or default_device()
        self.dtype = dtype or default_dtype(self.device)
        self.sources = sources or Sources()
        self._lock = threading.Lock()
        self._family: Family | None = None
        self._merging: tuple[LoraMerger, Layout] | None = None  # of the family's transformer
        self._auto: Base | None = None
        self._adapters = adapters or AdapterCache()
        self._texts = TextCache()
        self._default: Archive | None = None  # for requests without weights
        self._layouts: dict[tuple[str, Path | None], Layout] = {}  # of models not in memory

    def warm_up(self, default_weights: Source | None = None) -> None:
        """Loads the default base and compiles it for the usual sizes.

        `default_weights` are used for requests without weights; they also determine the default
        base. Unlike weights in a request they may be any file.
        """
        if default_weights:
            self._default = self._read_named(default_weights, None, any_file=True)
        with self._lock:
            weights = self._wanted(None, None, 1.0, 1.0)
            family = self._load(self._choose("auto", weights))
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
        watch: Watch | None = None,
    ) -> list[Path]:
        """Generates the images of a request and returns their files.

        `any_file`: whether the paths in the inputs may name any file of this machine; otherwise
        only files that `inference.fetch.sources.allowed_file` allows (untrusted users). The files
        are `image-0.webp`, … in `output_dir`, where nothing is overwritten or removed. None, on a
        server: a temporary folder, which later requests remove after an hour. `report` receives
        the metric `seconds_per_image`. `watch` is called after each step; an exception in it ends
        the request.
        """
        base_model, extra_lora = inputs.base_model, inputs.extra_lora
        if base_model != "auto":
            find = find_base_or_folder if any_file else find_base  # folders are paths too
            check_references(len(inputs.reference_images), find(base_model))
        token = hub_token(hf_api_token)

        def read_input(name: str, source: Source) -> Image.Image:
            with of_input(name):
                return read_image(self.sources.file(source, None, any_file), name)

        asked = Request.of(inputs, read_input)
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
            images = self.generate(
                asked, first, base_model, second, from_request=not any_file, watch=watch
            )
        except (LoraMismatch, UnknownBase):
            for archive in filter(None, (first, second)):
                self._adapters.drop(archive)
            raise
        if report is not None:
            report("seconds_per_image", (time.perf_counter() - start) / len(images))
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
        """The checked archive of a weights file, cached in memory.

        `check` and `config` as in `read_archive`. Raises `BrokenArchive` with the reason.
        """
        return named(self._adapters.get(weights, check, config), weights)

    def forget(self, sha256: str) -> None:
        """Removes the archive of a weights file with this content from memory."""
        self._adapters.forget(sha256)

    def _read_named(
        self, source: Source, token: str | None, any_file: bool, check: Check | None = None
    ) -> Archive:
        """The archive of a source, with the source's name among its names."""
        file = self.sources.file(source, token, any_file)
        if file.is_dir():  # the result of a full training
            return read_trained_model(file)
        return named(self.read(file, check, self.sources.config(source, token)), source)

    def generate(
        self,
        request: Request,
        archive: Archive | None = None,
        base_model: str = "auto",
        extra: Archive | None = None,
        from_request: bool = False,
        watch: Watch | None = None,
    ) -> list[Image.Image]:
        """Generates the images of a request, with the LoRAs of the archives that its `apply_lora`
        and prompts ask for.

        With `from_request`, the compute of all its images together is limited too. Prompt and
        settings are in each image's `info` (`inference.image_metadata`). Raises `LoraMismatch`,
        `UnknownBase` or `MissingModel` with the reason, before any weight is changed.
        """
        extra_scale = 1.0 if request.extra_lora_scale is None else request.extra_lora_scale
        weights = self._wanted(archive, extra, request.lora_scale, extra_scale)
        with self._lock, torch.inference_mode():
            base = self._choose(base_model, weights)
            warn_of_other_base(base, weights)
            weights = with_own_tokens(weights, base)
            check_images(request, base)
            few_steps = few_step_lora(weights, base)
            if from_request:
                check_work(request, base, few_steps)
            tokens = [each.tokens for each in weights]
            request = place_subject(request, tokens)
            family = self._load(base)
            vectors = vectors_of(weights, family)
            resolved = resolve(request, base, family.resolution_multiple, few_steps)
            for each in weights:
                warn_of_untrained_placeholder(each)
            weights = select(weights, prompts_of(resolved).values(), request.apply_lora)
            check_tokens(resolved.prompt, list(vectors))
            check_text_length(family, prompts_of(resolved), vectors)
            self._apply(weights, family)
            log.info("%s", describe(resolved, base))
            if ids_wanted():
                log.info("%s", family.tokenize(resolved.prompt, vectors).explain())
            images = acceleration.with_fallback(
                family.transformer,
                lambda: generate(
                    family,
                    resolved,
                    vectors,
                    request.image,
                    self._texts,
                    request.mask,
                    request.reference_images,
                    watch=watch,
                ),
            )
        described = [each.described() for each in weights]
        for image, seed in zip(images, resolved.seeds, strict=True):
            image.info.update(image_texts(resolved, seed, base, described))
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
        """The base for `auto`, chosen once: a loaded model would reduce the free memory."""
        if self._auto is None:
            self._auto = self._only or default_base("generation")
        return self._auto

    def _check(self, planned: Archive, base_model: str, extra: bool, alone: bool) -> None:
        """Raises `LoraMismatch` for weights that don't fit their model, before they are read.

        With two LoRAs, the other one may determine the model: then only a LoRA that names its
        model, or comes with `base_model`, is checked.
        """
        first, second = (None, planned) if extra else (planned, None)
        weights = self._wanted(first, second, 1.0, 1.0)
        if alone or planned.base_model or base_model != "auto":
            base = self._choose(base_model, weights if alone else weights[-1:])
            self._layout_of(base).fit(planned.deltas, weights[-1].name)

    def _layout_of(self, base: Base) -> Layout:
        """The layers of a base, from the model in memory or else from its config."""
        family, merging = self._family, self._merging
        if merging is not None and family is not None and family.base == base:
            return merging[1]
        key = base.name, base.folder
        if key not in self._layouts:
            names = family_of(base).original_names
            self._layouts[key] = Layout.of(transformer_without_weights(base), base.name, names)
        return self._layouts[key]

    def _load(self, base: Base) -> Family:
        """The base's family; unloads another base first."""
        if self._family is None or self._family.base != base:
            if slow := why_too_slow(base, self.device):
                if self.cpu is False:
                    raise NoGpu(how_to_run_anyway(slow))
                log.warning("%s", slow)
            family = load_family(base, self.device, self.dtype)  # weights are loaded on first use
            # Unset before it is released: a cancellation may be raised between any two lines.
            old, self._merging, self._family = self._family, None, None
            if old is not None:
                log.info("unloading %s; loading %s", old.base.name, base.name)
                old.release("transformer", "text_encoder", "vae")
            family.set_storage(choose_storage(base, self.device))  # by what is free now
            self._family = family
            if not family.storage.offload and acceleration.wanted(self.device):
                self._prepared(family)  # adds slots, so before compilation
                acceleration.accelerate(family)
        return self._family

    def _prepared(self, family: Family) -> tuple[LoraMerger, Layout]:
        """Merger and layout of the family's transformer."""
        if self._merging is None:
            transformer, base = family.transformer, family.base
            layout = Layout.of(transformer, base.name, family.original_names)
            self._merging = LoraMerger(transformer, checkpoint=transformer_source(base)), layout
        return self._merging

    def _apply(self, weights: Sequence[Weights], family: Family) -> None:
        """Sets the transformer to base + scales * LoRAs; merges only what has changed.

        LoRAs that are not applied must fit too, so that an error does not depend on the prompt.
        """
        weights = [each for each in weights if each.archive.model is None]
        if self._merging is None and not weights:
            return
        merger, layout = self._prepared(family)
        loras = [
            (self._adapters.fit(each.archive, layout, each.name), each.applied_scale)
            for each in weights
        ]
        merger.apply(loras)
        alone = sum(each.applied_scale != 0 for each in weights) == 1
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
