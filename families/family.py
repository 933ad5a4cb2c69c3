"""The interface of a base model's family, and the methods that all families share.

Tensor names carry their shape: B images, C latent channels, H and W latent rows and columns,
L text tokens, D text features, P pixels' height and width.

Conventions: sigma in [0, 1] is the noise level, x_sigma = (1 - sigma) x0 + sigma noise, and
velocity is noise - x0 in float32. Latents are normalized as the family's pipeline expects them.
Guidance is the usual scale, where 1 is off.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from families.base import (
    Base,
    CardCode,
    Config,
    FewStepRow,
    JobNames,
    LoraReader,
    ModelClasses,
)
from families.editing import Editing
from families.lora_targets import chosen_layers
from families.tokens import PromptTokenizer, TokenizedPrompt

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from families.prefix import Prefix


@dataclass(frozen=True)
class WeightStorage:
    """How the weights of a family's frozen models are stored: quantized, in CPU memory."""

    quantize: str = "none"  # of the transformer: none, int8, fp8, nf4
    quantize_text: str = "none"  # of the text encoder
    offload: bool = False  # the weights of the transformer's blocks are in CPU memory
    shard: bool = False  # the blocks of both are split over the processes (`families.sharding`)


class Family(Editing, ABC):
    """A base model whose heavy parts are loaded when they are first used and can be released.

    `transformer` and `text_encoder` run in `dtype`; `vae` runs in float32, since images are encoded
    once and decoding is a small share of generation. All parameters are frozen.
    """

    # Defined by the file of each family; those without a default are required.

    name: ClassVar[str]  # as in `Base.family` and meta.json
    title: ClassVar[str]  # name in messages
    bases: ClassVar[tuple[Base, ...]]  # an unknown fine-tune gets the first undistilled one's
    auto_on_gpu: ClassVar[Base | None] = None  # what `auto` may choose on a GPU
    auto_without_gpu: ClassVar[Base | None] = None  # and on a CPU; only one family has it
    classes: ClassVar[ModelClasses]
    # Configs of the published models, to plan before anything is downloaded: by component, those
    # fields of its config.json that are not the class's defaults. All bases share them.
    published: ClassVar[Mapping[str, Config]]
    trunk: ClassVar[str]  # the transformer's list of equal blocks, nearly all of its weights
    # Bytes of activations that a compiled block keeps for the backward pass, as a share of those of
    # a plain one (tests/trainer/memory/test_compiled_share.py).
    compiled_share: ClassVar[float] = 1.0
    text_trunk: ClassVar[str] = "layers"  # the same of the text encoder
    tokenizer_folder: ClassVar[str] = "tokenizer"  # in the repository
    # The text encoder is a whole vision-language model, which also writes captions.
    sees_images: ClassVar[bool] = False
    max_text_tokens: ClassVar[int] = 512  # the pipelines' limit
    empty_prompt: ClassVar[str] = ""  # used for an empty caption and an empty negative prompt
    noise_in_dtype: ClassVar[bool] = False  # the pipeline samples noise in `dtype`, not in float32
    # The prefix of tensor names in LoRA files that most programs read (docs/adapters.md).
    lora_prefix: ClassVar[str] = "transformer"
    lora_readers: ClassVar[Mapping[str, LoraReader]] = {}  # by `adapters.formats.PROGRAMS`
    idle_in_last_block: ClassVar[tuple[str, ...]] = ()  # names within the block: see `idle_in`
    layer_names: ClassVar[str] = ""  # a regular expression: names of layers only this family has
    # Layer names of the model's first release that LoRA files still use -> diffusers' names;
    # several for a fused layer, in the order of its rows.
    original_names: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    few_step_loras: ClassVar[tuple[FewStepRow, ...]] = ()
    job_names: ClassVar[Mapping[str, JobNames]] = {}  # by the names of the programs
    card_code: ClassVar[CardCode]

    def __init__(
        self,
        base: Base,
        device: torch.device,
        dtype: torch.dtype,
        storage: WeightStorage | None = None,
    ) -> None:
        from families.components import load_config, load_scheduler

        self.base, self.device, self.dtype = base, device, dtype
        self.set_storage(storage or WeightStorage())
        self.vae_config = load_config(self.model_class("vae"), base, "vae")
        self.transformer_config = load_config(self.model_class("transformer"), base, "transformer")
        self.scheduler = load_scheduler(base)

    @classmethod
    def model_class(cls, component: str) -> Any:
        """The class of `transformer`, `vae` or `text_encoder`."""
        import diffusers
        import transformers

        library = transformers if component == "text_encoder" else diffusers
        return getattr(library, getattr(cls.classes, component))

    # The models.

    def set_storage(self, storage: WeightStorage) -> None:
        """Sets how the weights of models that are loaded from now on are stored.

        Raises `QuantizationUnavailable` for a quantization that cannot run on this machine.
        """
        from families.quantization import check_available

        for quantization in (storage.quantize, storage.quantize_text):
            check_available(quantization, self.device)
        self.storage = storage

    @cached_property
    def transformer(self) -> Any:
        """The denoising transformer, frozen, in `dtype` and stored as `storage` says."""
        return self.load_transformer()

    def load_transformer(self, change: Callable[[str, Tensor], Tensor] | None = None) -> Any:
        """Loads the transformer again and replaces `transformer`.

        `change` gets the name and value of each parameter before it is quantized, and returns the
        value to use: small changes that are merged into quantized weights are lost to rounding.
        """
        from families import components

        model = components.load_transformer(self, change)
        self.__dict__["transformer"] = model
        return model

    @cached_property
    def vae(self) -> Any:
        """The autoencoder, frozen, in float32."""
        from families import components

        return components.load_vae(self)

    @cached_property
    def text_encoder(self) -> Any:
        """The language model without its vocabulary head, frozen, in `dtype` or quantized.

        Called with `inputs_embeds`; its `last_hidden_state` is the transformer's text input.
        """
        from families import components

        return components.load_text_encoder(self)

    def release(self, *names: str) -> None:
        """Frees loaded models (`transformer`, `vae`, `text_encoder` with its vision part)."""
        from families.device import empty_cache

        for name in (*names, *["vision_encoder"] * ("text_encoder" in names)):
            self.__dict__.pop(name, None)
        empty_cache(self.device)

    # Text.

    @cached_property
    def prompts(self) -> PromptTokenizer:
        """The tokenizer inside the family's chat template."""
        from families import components

        tokenizer = components.load_tokenizer(self.base, self.tokenizer_folder)
        return PromptTokenizer(tokenizer, self._template(tokenizer))

    @cached_property
    def text_width(self) -> int:
        """Dimension of the text encoder's embeddings."""
        from families.parameters import text_width

        return text_width(self.base)

    def tokenize(self, prompt: str, vectors: Mapping[str, Tensor] | None = None) -> TokenizedPrompt:
        """Token ids of the prompt inside the template."""
        counts = {token: len(rows) for token, rows in (vectors or {}).items()}
        return self.prompts.tokenize(prompt, counts)

    def encode_prompts(
        self,
        prompts: Sequence[str],
        vectors: Mapping[str, Tensor] | None = None,
        prefix: Prefix | None = None,
    ) -> list[Tensor]:
        """Text features, one text_LD per prompt, unpadded, in `dtype`.

        `vectors` maps each new token to its embeddings [vectors, D]; they are passed through
        `inputs_embeds`, and gradients reach them. `prefix` is the encoded beginning that all
        prompts share; it is not encoded again.
        """
        from families.text_features import encode_prompts

        return encode_prompts(self, prompts, vectors, prefix)

    def new_tokens_read(self, prompt: TokenizedPrompt) -> frozenset[str]:
        """The new tokens in the part of the prompt that is encoded."""
        limit = self.text_limit(prompt)
        return frozenset(token for column, token, _ in prompt.new if column < limit)

    def text_limit(self, prompt: TokenizedPrompt) -> int:
        """Number of ids that are kept: as in the pipelines, at most `max_text_tokens` features."""
        return self.max_text_tokens + self._first_feature(prompt)

    # Images and latents.

    @property
    def resolution_multiple(self) -> int:
        """Width and height in pixels are multiples of this."""
        return self.vae_factor * self.patch_size

    def latent_size(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of the latents of an image."""
        return height // self.vae_factor, width // self.vae_factor

    def initial_noise(self, seeds: Sequence[int], width: int, height: int) -> Tensor:
        """latents_BCHW float32 at sigma 1, one image per seed.

        Sampled on the CPU in the same dtype as in diffusers' pipeline, so that a seed gives the
        pipeline's image on every device.
        """
        import torch

        from families import flow

        shape = (self.latent_channels, *self.latent_size(width, height))
        dtype = self.dtype if self.noise_in_dtype else torch.float32
        return flow.noise(shape, seeds, dtype).to(self.device, torch.float32)

    def sigmas(self, steps: int, width: int, height: int, shift: float | None = None) -> Tensor:
        """steps + 1 sigmas from 1 to 0: the pipeline's schedule, by the base's scheduler.

        A base with a fixed schedule has it at every size; for other numbers of steps than its own
        it is interpolated. With `shift`, the static shift at every size, without a terminal shift.
        """
        from families import flow

        if shift is not None:
            return flow.shifted_sigmas(steps, shift)
        if self.base.sample_sigmas:
            return flow.resampled_sigmas(self.base.sample_sigmas, steps)
        rows, columns = self.latent_size(width, height)
        return flow.scheduled_sigmas(self.scheduler, steps, rows * columns // self.patch_size**2)

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance of two velocities (Ho and Salimans 2022, arXiv 2207.12598)."""
        return unconditional + scale * (conditional - unconditional)

    # Defined by each family.

    vae_factor: int  # pixels per latent row
    patch_size: int  # latent rows per transformer token
    latent_channels: int

    @abstractmethod
    def _template(self, tokenizer: Any) -> str:
        """The chat template with `{}` for the prompt."""

    @abstractmethod
    def _reading_part(self, model: Any) -> nn.Module:
        """The part of the loaded language model whose last hidden state is used."""

    @abstractmethod
    def _first_feature(self, prompt: TokenizedPrompt) -> int:
        """Number of template tokens that are dropped from the start of the features."""

    @abstractmethod
    def encode_images(self, pixels_BCPP: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the normalized latents, each BCHW float32.

        Pixels are in [-1, 1]; their sides are multiples of `resolution_multiple`. C is 3, or with
        `Base.alpha_channel` also 4: straight alpha, where 1 is opaque, as are images without it.
        """

    @abstractmethod
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Pixels B3PP float32, nominally in [-1, 1]; B4PP if the VAE has an alpha channel."""

    @abstractmethod
    def velocity(self, latents_BCHW: Tensor, sigma_B: Tensor, text: Sequence[Tensor]) -> Tensor:
        """The transformer's noise - x0 for noisy latents, BCHW float32; `text` as encoded."""

    # LoRA targets.

    def lora_targets(self, wanted: str = "auto") -> list[str]:
        """Names of the transformer's linear layers that a LoRA adapts, by the setting `wanted`.

        auto: attention and feed-forward of the blocks; attention or feed_forward: only those;
        all: every linear layer of the blocks, modulation included; otherwise names or patterns,
        each the end of a layer's name (`attention.to_q`) or, with `*`, the whole name
        (`layers.2?.attention.*`). Several are separated by commas; `!` before one excludes its
        layers (`all,!attention`). Raises ValueError for one that matches no layer.
        """
        from families.components import linear_layers

        layers = linear_layers(self.model_class("transformer"), self.transformer_config)
        learning = [name for name in layers if name not in self.idle_layers()]
        return chosen_layers(wanted, learning, self.lora_groups(), self.base.name)

    @abstractmethod
    def lora_groups(self) -> dict[str, list[str]]:
        """Names of the trainable linear layers of the blocks: `attention` and `feed_forward`."""

    def idle_layers(self) -> frozenset[str]:
        """Linear layers whose output is not used, so that they get no gradient."""
        return frozenset()

    @classmethod
    def idle_in(cls, blocks: int) -> frozenset[str]:
        """The same of a transformer with this number of blocks."""
        return frozenset(f"{cls.trunk}.{blocks - 1}.{name}" for name in cls.idle_in_last_block)
