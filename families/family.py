"""What every family of base models offers, and the parts that are the same for all of them.

Tensor names carry their shape: B images, C latent channels, H and W latent rows and columns,
L text tokens, D text features, P pixels' height and width.

Conventions: sigma in [0, 1] is the noise level, x_sigma = (1 - sigma) x0 + sigma noise, and
velocity is noise - x0 in float32. Latents are normalised as the family's pipeline expects them.
Guidance is the usual scale, where 1 is off.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from families.bases import Base
from families.lora_targets import chosen_layers
from families.prefix import Prefix
from families.quantization import (
    PLAIN,
    QUANTIZATIONS,
    Residence,
    check_available,
    quantize_transformer,
    settle_linears,
)
from families.repository import component_folder, transformer_source
from families.tokens import PromptTokenizer, TokenizedPrompt
from families.transfer import onto
from families.weights import from_one_file, whole

log = logging.getLogger(__name__)


class Family(ABC):
    """A base model whose heavy parts are loaded when they are first used and can be released.

    `transformer` and `text_encoder` run in `dtype`; `vae` runs in float32, since pictures are
    encoded once and decoding is a small share of drawing. Nothing here is ever trained: every
    parameter is frozen.
    """

    transformer_class: ClassVar[Any]
    vae_class: ClassVar[Any]
    text_encoder_class: ClassVar[Any]
    trunk: ClassVar[str]  # the transformer's list of equal blocks that is nearly all of it
    text_trunk: ClassVar[str] = "layers"  # the same of the text encoder
    max_text_tokens: ClassVar[int] = 512  # the pipelines' own limit
    empty_prompt: ClassVar[str] = ""  # what no caption and no negative prompt stand for
    # Names of the model's first release that LoRA files still use, and ours in their place;
    # several where its layer held them fused, one below the other.
    original_names: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def __init__(
        self,
        base: Base,
        device: torch.device,
        dtype: torch.dtype,
        residence: Residence = PLAIN,
    ) -> None:
        self.base, self.device, self.dtype = base, device, dtype
        self.reside(residence)
        self.vae_config = self.vae_class.load_config(component_folder(base, "vae"))
        self.transformer_config = self.transformer_class.load_config(self._transformer_config())
        scheduler = component_folder(base, "scheduler")
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(scheduler)

    # The heavy parts.

    def reside(self, residence: Residence) -> None:
        """Says how the parts that are loaded from now on lie in memory.

        Raises `QuantizationUnavailable` for what cannot run here.
        """
        for quantization in (residence.quantize, residence.quantize_text):
            check_available(quantization, self.device)
        self.residence = residence

    @cached_property
    def transformer(self) -> Any:
        """The denoising transformer, frozen, in `dtype` or as `residence` has it."""
        return self.load_transformer()

    def load_transformer(self, change: Callable[[Any], None] | None = None) -> Any:
        """Loads the transformer, which is `transformer` from then on.

        `change` is given it before it is quantised, and may change its weights: what is merged
        into quantised weights is lost to their rounding.
        """
        in_place = self.residence.quantize == "none" and not self.residence.offload
        first = self.device if in_place else torch.device("cpu")  # straight from the files
        source = transformer_source(self.base)
        if source.is_file():
            model = from_one_file(
                self.transformer_class, source, self._transformer_config(), self.dtype
            )
        else:
            model = whole(self.transformer_class, source, self.dtype, device_map={"": first})
        model = _frozen(model, first)
        if change is not None:
            change(model)
        if self.residence.quantize != "none":
            where = torch.device("cpu") if self.residence.offload else self.device
            model = quantize_transformer(model, self.residence.quantize, where, self.dtype)
        if not in_place:
            model = settle_linears(model, self.residence, self.device)
        self.__dict__["transformer"] = model.eval().requires_grad_(False)
        return model

    @cached_property
    def vae(self) -> Any:
        """The autoencoder, frozen, in float32."""
        model = whole(self.vae_class, component_folder(self.base, "vae"), torch.float32)
        return _frozen(model, self.device)

    @cached_property
    def text_encoder(self) -> Any:
        """The language model without its vocabulary head, frozen, in `dtype` or quantised.

        Called with `inputs_embeds`, its `last_hidden_state` is what the transformer reads.
        """
        folder = component_folder(self.base, "text_encoder")
        options: dict[str, Any] = {}
        if self.residence.quantize_text != "none":
            quantization = QUANTIZATIONS[self.residence.quantize_text]
            options["quantization_config"] = quantization.text_encoder_config(self.dtype, [])
            options["device_map"] = {"": self.device}
        model = whole(self.text_encoder_class, folder, self.dtype, **options)
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
        tokenizer = AutoTokenizer.from_pretrained(
            component_folder(self.base, "tokenizer"), trust_remote_code=False
        )
        return PromptTokenizer(tokenizer, self._template(tokenizer))

    @cached_property
    def text_width(self) -> int:
        """Features of one embedding row of the text encoder."""
        config = AutoConfig.from_pretrained(
            component_folder(self.base, "text_encoder"), trust_remote_code=False
        )
        return config.get_text_config().hidden_size

    def tokenize(self, prompt: str, vectors: Mapping[str, Tensor] | None = None) -> TokenizedPrompt:
        """Ids of the prompt inside the template, cut at the pipeline's limit."""
        counts = {word: len(rows) for word, rows in (vectors or {}).items()}
        return self.prompts.tokenize(prompt, counts)

    def encode_prompts(
        self,
        prompts: Sequence[str],
        vectors: Mapping[str, Tensor] | None = None,
        prefix: Prefix | None = None,
    ) -> list[Tensor]:
        """Text features, one text_LD per prompt, unpadded, in `dtype`.

        `vectors` maps a new word to its embedding rows [vectors, D]; they are put in through
        `inputs_embeds`, and gradients reach them. The language models are causal, so prompts of
        unequal length share a batch with their padding on the right and need no mask. All of them
        begin with `prefix`, if it is given, which is not read again.
        """
        vectors = vectors or {}
        embed = self.text_encoder.get_input_embeddings()
        tokenized = [self.tokenize(prompt, vectors) for prompt in prompts]
        limits = [min(len(each.ids), self.text_limit(each)) for each in tokenized]

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

        if prefix is not None:
            assert all(each.ids[: len(prefix.ids)] == prefix.ids for each in tokenized)
            ids_BL = ids_BL[:, len(prefix.ids) :]
            columns = [column - len(prefix.ids) for column in columns]
        embeds_BLD = embed(onto(self.device, ids_BL))
        if values:
            at = onto(self.device, torch.tensor((rows, columns)))
            new = torch.stack(values).to(embeds_BLD)
            embeds_BLD = embeds_BLD.index_put(tuple(at), new)
        before = prefix.cache(len(prompts)) if prefix is not None else None
        hidden_BLD = self.text_encoder(
            inputs_embeds=embeds_BLD, past_key_values=before, use_cache=prefix is not None
        ).last_hidden_state
        if prefix is not None:
            start_BPD = prefix.hidden_PD.expand(len(prompts), -1, -1)
            hidden_BLD = torch.cat((start_BPD, hidden_BLD), dim=1)
        return [
            hidden_LD[self._first_feature(each) : limit]
            for hidden_LD, each, limit in zip(hidden_BLD, tokenized, limits, strict=True)
        ]

    def reads_new(self, prompt: TokenizedPrompt) -> bool:
        """Whether any new word of the prompt lies within what is kept of it."""
        return any(column < self.text_limit(prompt) for column, _, _ in prompt.new)

    def text_limit(self, prompt: TokenizedPrompt) -> int:
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

    def sigmas(self, steps: int, width: int, height: int, shift: float | None = None) -> Tensor:
        """steps + 1 noise levels from 1 to 0: the pipeline's grid under the base's scheduler.

        With `shift` the grid is shifted by that at every size, s -> shift s / (1 + (shift - 1) s)
        (Esser et al. 2024, arXiv 2403.03206, equation 23), without a terminal shift.
        """
        if shift is not None:
            even = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64)
            shifted = shift * even / (1 - even + shift * even)  # finite for any shift above 0
            return torch.cat([shifted, torch.zeros(1)]).float()
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

    # What a LoRA adapts.

    def lora_targets(self, wanted: str = "auto") -> list[str]:
        """Names of the transformer's linear layers that a LoRA adapts, as `wanted` asks.

        auto: attention and feed-forward of the blocks; attention or feed_forward: those alone;
        all: every linear layer of the blocks, modulation included; else names or patterns, each
        the end of a layer's name (`attention.to_q`) or with `*` the whole of it
        (`layers.2?.attention.*`). Several are joined by commas; `!` before one takes its layers
        away again (`all,!attention`). Raises ValueError for one that fits no layer.
        """
        learning = [name for name in self._linear_layers() if name not in self.idle_layers()]
        return chosen_layers(wanted, learning, self.lora_groups(), self.base.name)

    def _linear_layers(self) -> list[str]:
        """Names of all linear layers of the transformer, without its weights."""
        with torch.device("meta"):
            model = self.transformer_class.from_config(self.transformer_config)
        return [name for name, each in model.named_modules() if isinstance(each, nn.Linear)]

    @abstractmethod
    def lora_groups(self) -> dict[str, list[str]]:
        """The linear layers of the blocks that can learn: `attention` and `feed_forward`."""

    def idle_layers(self) -> frozenset[str]:
        """Linear layers whose result is dropped, so that they would never learn."""
        return frozenset()


def _frozen(model: nn.Module, device: torch.device) -> nn.Module:
    return model.to(device).eval().requires_grad_(False)
