"""Trains the second miniature's text encoder and transformer on scenes and on edits, together.

The recipe of `miniature.pretrain`. Half of each batch are captioned scenes, half are edits: the
reference image's clean latents are in the sequence, and the vision tower sees its pixels.

B batch, C channels, H rows, W columns of latents, L caption tokens, D text width.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import trange

from miniature.device import DEVICE, bfloat16_products
from miniature.drawing import render
from miniature.edits import Edit, sample_edit
from miniature.judge import QUESTIONS
from miniature.models import TextEncoder, Transformer, Vae
from miniature.parallel import average_gradients, rank, rows
from miniature.pretrain import AttributeProbe, PretrainSettings, fit, sample_sigmas, weighted
from miniature.qwen.batched import SYSTEM, Text, batched_forward, encode, tokenize
from miniature.qwen.models import PIXELS, build_text_encoder, build_transformer
from miniature.tokenizer import build_tokenizer
from miniature.vae import VaeSettings
from miniature.vae import encode as encode_pixels
from miniature.world import Scene, attributes, caption, sample_scene

VAE = VaeSettings(
    steps=5000,
    batch=6,
    pixels=PIXELS,
    learning_rate=1e-3,
    muon_rate=3e-3,
    latent_noise=0.05,
    collage_share=0.17,
    edges=3.0,
)


@dataclass(frozen=True)
class QwenSettings(PretrainSettings):
    steps: int = 4000
    scenes: int = 8_000
    edits: int = 6_000
    text_steps: int = 200
    edit_caption_dropout: float = 0.05
    ema: float = 0.995


@dataclass(frozen=True)
class Images:
    """Pixels uint8 [N, H, W, 3] and latents float16 [N, C, H, W]: scenes, references, targets."""

    pixels: Tensor
    latents: Tensor

    def shown(self, picks: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1]."""
        return self.pixels[picks].permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def image_cache(vae: Vae, scenes: list[Scene], work: Path) -> Images:
    """The scenes' images, cached in `work`."""
    work.mkdir(parents=True, exist_ok=True)
    files = work / "pixels.npy", work / "latents.pt"
    if rank() == 0 and not files[0].exists():
        every = np.stack(
            [np.asarray(render(scenes[i], PIXELS)) for i in trange(len(scenes), desc="pixels")]
        )
        np.save(files[0], every)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    pixels = torch.from_numpy(np.load(files[0], mmap_mode="r"))
    if len(pixels) != len(scenes):
        raise ValueError(f"{files[0]} has {len(pixels)} images instead of {len(scenes)}; delete it")
    images = Images(pixels, torch.empty(0))
    if rank() == 0 and not files[1].exists():
        chunks = []
        for first in trange(0, len(scenes), 100, desc="latents"):
            with bfloat16_products():
                shown = images.shown(torch.arange(first, min(first + 100, len(scenes))))
                chunks.append(encode_pixels(vae, shown.to(DEVICE)).half().cpu())
        torch.save(torch.cat(chunks), files[1])
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return Images(pixels, torch.load(files[1], weights_only=True))


def warm_text_encoder(
    encoder: TextEncoder,
    read: Callable[[list[str], Tensor | None], Text],
    scenes: list[Scene],
    edits: list[Edit],
    images: Images,
    settings: QwenSettings,
) -> None:
    """Trains the text encoder so that a probe can predict a scene's attributes from its caption,
    and those of an edit's result from reference and instruction.
    """
    probe = AttributeProbe(encoder.config.text_config.hidden_size, QUESTIONS).to(DEVICE)
    parameters = [*encoder.parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
    progress = trange(settings.text_steps, desc="text", disable=rank() > 0)
    for step in progress:
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        rng, half = random.Random(f"text {step}"), settings.batch // 2
        mine = torch.randint(len(scenes), (half,), generator=generator)[rows(half)].tolist()
        changed = torch.randint(len(edits), (half,), generator=generator)[rows(half)]
        loss = torch.zeros((), device=DEVICE)
        for prompts, pixels, truths in (
            ([caption(scenes[i], rng) for i in mine], None, [attributes(scenes[i]) for i in mine]),
            ([edits[i].instruction for i in changed.tolist()],
             images.shown(len(scenes) + changed).to(DEVICE),
             [attributes(edits[i].target) for i in changed.tolist()]),
        ):  # fmt: skip
            with bfloat16_products():
                text = read(prompts, pixels)
            answers = probe(text.text_BLD.float(), text.mask_BL)
            for key, logits in zip(QUESTIONS, answers, strict=True):
                targets = torch.tensor([QUESTIONS[key].index(a[key]) if key in a else -100
                                        for a in truths], device=DEVICE)  # fmt: skip
                if (targets >= 0).any():
                    loss = loss + F.cross_entropy(logits, targets)
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, 2 * (1 - step / settings.text_steps))
        loss.backward()
        average_gradients([p for p in parameters if p.grad is not None])
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.set_postfix(loss=f"{float(loss.detach()) / len(QUESTIONS) / 2:.3f}")


def train_base(
    vae: Vae,
    work: Path,
    settings: QwenSettings | None = None,
    start: tuple[Transformer, TextEncoder] | None = None,
) -> tuple[Transformer, TextEncoder]:
    """The EMA weights of transformer and text encoder, float32; see `miniature.pretrain.fit`."""
    settings = settings or QwenSettings()
    tokenizer = build_tokenizer()
    system_L = torch.tensor(tokenizer(SYSTEM).input_ids, device=DEVICE)
    scenes = [sample_scene(i) for i in range(settings.scenes)]
    edits = [sample_edit(i) for i in range(settings.edits)]
    every = [*scenes, *(e.reference for e in edits), *(e.target for e in edits)]
    images = image_cache(vae, every, work)

    torch.manual_seed(settings.seed)
    transformer, encoder = build_transformer().to(DEVICE), build_text_encoder().to(DEVICE)
    compiled = torch.compile(batched_forward, dynamic=False)
    half = settings.batch // 2
    mine = rows(half)

    def read(prompts: list[str], pixels: Tensor | None) -> Text:
        ids = tokenize(tokenizer, prompts, edits=pixels is not None).to(DEVICE)
        return encode(encoder, system_L, ids, pixels)

    def part_of(
        step: int, factor: float, generator: torch.Generator, editing: bool
    ) -> tuple[Tensor, Tensor]:
        """The losses of the half of a batch that are edits, or captioned scenes."""
        rng = random.Random(f"{settings.seed} {step} {editing}")
        picks = torch.randint(len(edits if editing else scenes), (half,), generator=generator)
        noise = torch.randn((half, *images.latents.shape[1:]), generator=generator)[mine].to(DEVICE)
        sigma_B = sample_sigmas(half, settings.sigma_shift, generator)[mine].to(DEVICE)
        picks = picks[mine]
        pixels = reference = None
        if editing:
            batch = [edits[i] for i in picks.tolist()]
            prompts, dropout = [e.instruction for e in batch], settings.edit_caption_dropout
            # Where something is, and where something was.
            around = [Scene("", (*e.reference.things, *e.target.things), "", 0) for e in batch]
            pixels = images.shown(len(scenes) + picks).to(DEVICE)
            reference = images.latents[len(scenes) + picks].float().to(DEVICE)
            clean = images.latents[len(scenes) + len(edits) + picks].float().to(DEVICE)
        else:
            around = [scenes[i] for i in picks.tolist()]
            prompts, dropout = [caption(s, rng) for s in around], settings.caption_dropout
            clean = images.latents[picks].float().to(DEVICE)
        prompts = ["" if rng.random() < dropout else each for each in prompts]
        sigma_B111 = sigma_B[:, None, None, None]
        with bfloat16_products():
            text = read(prompts, pixels)
            noised = (1 - sigma_B111) * clean + sigma_B111 * noise
            out = compiled(transformer, noised, sigma_B, text.text_BLD, text.length_B, text.place,
                           reference)  # fmt: skip
        error = (out.float() - (noise - clean)).square()
        return weighted(error, around, settings, factor), error.detach().mean()

    def loss_of(step: int, factor: float) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        losses = [part_of(step, factor, generator, editing) for editing in (False, True)]
        loss, plain = (torch.stack(each).mean() for each in zip(*losses, strict=True))
        return loss, plain

    warm = partial(warm_text_encoder, encoder, read, scenes, edits, images, settings)
    modules = {"transformer": transformer, "text_encoder": encoder}
    fit(modules, work, settings, loss_of, warm, start=start)
    return transformer, encoder
