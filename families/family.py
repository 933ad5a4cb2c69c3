"""What every family of base models offers, and the parts that are the same for all of them.

Tensor names carry their shape: B images, C latent channels, H and W latent rows and columns,
L text tokens, D text features, P pixels' height and width.

Conventions: sigma in [0, 1] is the noise level, x_sigma = (1 - sigma) x0 + sigma noise, and
velocity is noise - x0 in float32. Latents are normalised as the family's pipeline expects them.
Guidance is the usual scale, where 1 is off.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_log

from families.bases import Base
from families.repository import MissingModel, component_folder, transformer_source
from families.tokens import PromptTokenizer, TokenizedPrompt


class Family(ABC):
    """A base model whose heavy parts are loaded when they are first used and can be released.

    `transformer` and `text_encoder` run in `dtype`; `vae` runs in float32, since pictures are
    encoded once and decoding is a small share of drawing. Nothing here is ever trained: every
    parameter is frozen.
    """

    transformer_class: ClassVar[Any]
    vae_class: ClassVar[Any]
    text_encoder_class: ClassVar[Any]
    max_text_tokens: ClassVar[int] = 512  # the pipelines' own limit
    empty_prompt: ClassVar[str] = ""  # what no caption and no negative prompt stand for

    def __init__(self, base: Base, device: torch.device, dtype: torch.dtype) -> None:
        self.base, self.device, self.dtype = base, device, dtype
        self.vae_config = self.vae_class.load_config(component_folder(base, "vae"))
        self.transformer_config = self.transformer_class.load_config(self._transformer_config())
        scheduler = component_folder(base, "scheduler")
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(scheduler)

    # The heavy parts.

    @cached_property
    def transformer(self) -> Any:
        """The denoising transformer, frozen, in `dtype`."""
        source = transformer_source(self.base)
        if source.is_file():
            model = _from_one_file(
                self.transformer_class, source, self._transformer_config(), self.dtype
            )
        else:
            model = _whole(self.transformer_class, source, self.dtype)
        return _frozen(model, self.device)

    @cached_property
    def vae(self) -> Any:
        """The autoencoder, frozen, in float32."""
        model = _whole(self.vae_class, component_folder(self.base, "vae"), torch.float32)
        return _frozen(model, self.device)

    @cached_property
    def text_encoder(self) -> Any:
        """The language model without its vocabulary head, frozen, in `dtype`.

        Called with `inputs_embeds`, its `last_hidden_state` is what the transformer reads.
        """
        model = _whole(
            self.text_encoder_class, component_folder(self.base, "text_encoder"), self.dtype
        )
        return _frozen(self._reading_part(model), self.device)

    def release(self, *names: str) -> None:
        """Drops loaded parts (`transformer`, `vae`, `text_encoder`) from memory."""
        for name in names:
            self.__dict__.pop(name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _transformer_config(self) -> Any:
        """The folder with the transformer's config.json; a lone checkpoint borrows one."""
        source = transformer_source(self.base)
        return source if source.is_dir() else component_folder(self.base, "transformer")

    # Text.

    @cached_property
    def prompts(self) -> PromptTokenizer:
        """The tokenizer inside the family's chat template."""
        tokenizer = AutoTokenizer.from_pretrained(component_folder(self.base, "tokenizer"))
        return PromptTokenizer(tokenizer, self._template(tokenizer))

    @cached_property
    def text_width(self) -> int:
        """Features of one embedding row of the text encoder."""
        config = AutoConfig.from_pretrained(component_folder(self.base, "text_encoder"))
        return config.get_text_config().hidden_size

    def tokenize(self, prompt: str, vectors: Mapping[str, Tensor] | None = None) -> TokenizedPrompt:
        """Ids of the prompt inside the template, cut at the pipeline's limit."""
        counts = {word: len(rows) for word, rows in (vectors or {}).items()}
        return self.prompts.tokenize(prompt, counts)

    def encode_prompts(
        self, prompts: Sequence[str], vectors: Mapping[str, Tensor] | None = None
    ) -> list[Tensor]:
        """Text features, one text_LD per prompt, unpadded, in `dtype`.

        `vectors` maps a new word to its embedding rows [vectors, D]; they are put in through
        `inputs_embeds`, and gradients reach them. The language models are causal, so prompts of
        unequal length share a batch with their padding on the right and need no mask.
        """
        vectors = vectors or {}
        embed = self.text_encoder.get_input_embeddings()
        tokenized = [self.tokenize(prompt, vectors) for prompt in prompts]
        limits = [min(len(each.ids), self._text_limit(each)) for each in tokenized]

        ids_BL = torch.zeros(len(prompts), max(limits), dtype=torch.long)
        rows, columns, values = [], [], []
        for row, (each, limit) in enumerate(zip(tokenized, limits, strict=True)):
            ids_BL[row, :limit] = torch.tensor(each.ids[:limit])
            for column, word, index in each.new:
                if column < limit:
                    ids_BL[row, column] = 0  # its row is overwritten below
                    rows.append(row)
                    columns.append(column)
                    values.append(vectors[word][index])

        embeds_BLD = embed(ids_BL.to(self.device))
        if values:
            at = (torch.tensor(rows, device=self.device), torch.tensor(columns, device=self.device))
            new = torch.stack(values).to(embeds_BLD)
            embeds_BLD = embeds_BLD.index_put(at, new)
        hidden_BLD = self.text_encoder(inputs_embeds=embeds_BLD, use_cache=False).last_hidden_state
        return [
            hidden_LD[self._first_feature(each) : limit]
            for hidden_LD, each, limit in zip(hidden_BLD, tokenized, limits, strict=True)
        ]

    def _text_limit(self, prompt: TokenizedPrompt) -> int:
        """Ids kept of a prompt; as the pipelines do, features are cut at `max_text_tokens`."""
        return self.max_text_tokens + self._first_feature(prompt)

    # Pictures and latents.

    @property
    def resolution_multiple(self) -> int:
        """Width and height in pixels are multiples of this."""
        return self.vae_factor * self.patch_size

    def latent_size(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of the latents of a picture."""
        return height // self.vae_factor, width // self.vae_factor

    def initial_noise(self, seeds: Sequence[int], width: int, height: int) -> Tensor:
        """latents_BCHW float32 at sigma 1, one picture per seed.

        Drawn on the CPU in the type the stock pipeline draws it in, so that a seed gives the
        stock pipeline's picture on every device.
        """
        shape = (self.latent_channels, *self.latent_size(width, height))
        noise = [
            torch.randn(
                shape, generator=torch.Generator().manual_seed(seed), dtype=self._noise_dtype
            )
            for seed in seeds
        ]
        return torch.stack(noise).to(self.device, torch.float32)

    def sigmas(self, steps: int, width: int, height: int) -> Tensor:
        """steps + 1 noise levels from 1 to 0: the pipeline's grid under the base's scheduler."""
        if steps == 1:
            return torch.tensor([1.0, 0.0])  # a terminal shift would divide by zero
        config = self.scheduler.config
        rows, columns = self.latent_size(width, height)
        tokens = rows * columns // self.patch_size**2
        base_tokens = config.get("base_image_seq_len", 256)
        max_tokens = config.get("max_image_seq_len", 4096)
        base_shift, max_shift = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        slope = (max_shift - base_shift) / (max_tokens - base_tokens)
        mu = base_shift + slope * (tokens - base_tokens)
        grid = torch.linspace(1.0, 1 / steps, steps).tolist()
        self.scheduler.set_timesteps(sigmas=grid, mu=mu)
        return self.scheduler.sigmas

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance of two velocities (Ho and Salimans 2022, arXiv 2207.12598)."""
        return unconditional + scale * (conditional - unconditional)

    # What each family knows.

    vae_factor: int  # pixels per latent row
    patch_size: int  # latent rows per transformer token
    latent_channels: int
    _noise_dtype: torch.dtype

    @abstractmethod
    def _template(self, tokenizer: Any) -> str:
        """The chat template with `{}` for the prompt."""

    @abstractmethod
    def _reading_part(self, model: Any) -> nn.Module:
        """The part of the loaded language model whose last hidden state is read."""

    @abstractmethod
    def _first_feature(self, prompt: TokenizedPrompt) -> int:
        """Template tokens that are dropped from the front of the features."""

    @abstractmethod
    def encode_images(self, pixels_B3PP: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the normalised latents, each BCHW float32.

        Pixels are in [-1, 1]; their sides are multiples of `resolution_multiple`.
        """

    @abstractmethod
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Pixels B3PP float32, nominally in [-1, 1]."""

    @abstractmethod
    def velocity(self, latents_BCHW: Tensor, sigma_B: Tensor, text: Sequence[Tensor]) -> Tensor:
        """The transformer's noise - x0 for noisy latents, BCHW float32; `text` as encoded."""

    @abstractmethod
    def lora_targets(self) -> list[str]:
        """Names of the transformer's linear layers that a LoRA adapts by default."""


def _whole(model_class: Any, folder: Any, dtype: torch.dtype) -> nn.Module:
    """Loads a model and refuses one whose files lack a weight.

    Raises `MissingModel` naming the missing weights; libraries would fill them with noise.
    """
    level = transformers_log.get_verbosity()
    transformers_log.set_verbosity_error()  # its report names weights that we leave out on purpose
    try:
        model, report = model_class.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    finally:
        transformers_log.set_verbosity(level)
    _refuse_missing(report["missing_keys"], folder, type(model))
    return model


def _from_one_file(model_class: Any, file: Path, config: Path, dtype: torch.dtype) -> nn.Module:
    """Loads a lone checkpoint in the original key layout and refuses one that lacks a weight.

    Raises `MissingModel` naming the missing weights; the library would stop at the first without
    its name.
    """
    single_file: Any = SINGLE_FILE_LOADABLE_CLASSES[model_class.__name__]
    convert = single_file["checkpoint_mapping_fn"]
    with torch.device("meta"):
        expected = set(model_class.from_config(model_class.load_config(config)).state_dict())
    with torch.device("meta"), safe_open(file, "pt") as opened:
        found = {key: torch.empty(opened.get_slice(key).get_shape()) for key in opened.keys()}
    _refuse_missing(expected - set(convert(checkpoint=found)), file, model_class)
    return model_class.from_single_file(str(file), config=str(config), dtype=dtype)


def _refuse_missing(names: Iterable[str], source: Path, model_class: Any) -> None:
    missing = sorted(names)
    if missing:
        shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise MissingModel(
            f"{source}: {len(missing)} weights of {model_class.__name__} are not in its files "
            f"({shown}); fetch the model again"
        )


def _frozen(model: nn.Module, device: torch.device) -> nn.Module:
    return model.to(device).eval().requires_grad_(False)
