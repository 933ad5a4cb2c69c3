"""Stage 1: trains the autoencoder of either miniature, 64 x 64 pixels to latents and back.

Without a KL term, which blurs colors at this size. Instead, noise is added to the latents, with a
small penalty on their size, so that the decoder tolerates small errors of the transformer.

B batch, C channels, H rows, W columns.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage21
from torch import Tensor
from tqdm import trange

from miniature.checkpoint import Checkpoint
from miniature.device import DEVICE, bfloat16_products
from miniature.drawing import collage, grid, render
from miniature.images import to_images, to_tensor
from miniature.models import PIXELS, Vae, build_vae
from miniature.muon import Muon
from miniature.parallel import average_gradients, rank, rows
from miniature.world import sample_scene, subject_scene


@dataclass(frozen=True)
class VaeSettings:
    steps: int = 2000
    batch: int = 16
    learning_rate: float = 2e-3
    latent_noise: float = 0.1  # standard deviation; that of the latents is near 1
    latent_pull: float = 1e-3  # weight of the latents' mean square
    collage_share: float = 0.25  # of the batch: images unlike the dataset
    edges: float = 0.0  # weight of the squared error of differences between neighboring pixels
    muon_rate: float = 0.0  # of Muon for the convolutions; 0: AdamW for all parameters
    pixels: int = PIXELS
    compiled: bool = False
    seed: int = 0


# AutoencoderKL takes RGB images. AutoencoderKLQwenImage21 takes RGBA videos of one frame; its own
# `encode` and `decode` fill caches that images don't need.


def _takes_alpha(vae: Vae) -> bool:
    return isinstance(vae, AutoencoderKLQwenImage21)


def raw_encode(vae: Vae, pixels_BCHW: Tensor) -> Tensor:
    """Latents of RGB pixels, as the network returns them."""
    if not _takes_alpha(vae):
        latents_BCHW: Tensor = vae.encode(pixels_BCHW).latent_dist.mode()
        return latents_BCHW
    opaque = F.pad(pixels_BCHW, (0, 0, 0, 0, 0, 1), value=1.0).unsqueeze(2)
    return vae.quant_conv(vae.encoder(opaque)).chunk(2, dim=1)[0].squeeze(2)


def raw_decode(vae: Vae, latents_BCHW: Tensor) -> Tensor:
    """RGB pixels of latents as `raw_encode` returns them."""
    if not _takes_alpha(vae):
        pixels_BCHW: Tensor = vae.decode(latents_BCHW).sample
        return pixels_BCHW
    values = vae.post_quant_conv(latents_BCHW.unsqueeze(2))
    return vae.decoder(values, first_chunk=True).squeeze(2)[:, :3]


def _shift_and_scale(vae: Vae) -> tuple[Tensor | float, Tensor | float]:
    """What normalizes the latents, from the VAE's config: minus shift, times scale."""
    config = vae.config
    if not _takes_alpha(vae):
        return config.shift_factor, config.scaling_factor
    mean, std = torch.tensor([config.latents_mean, config.latents_std], device=vae.device)
    return mean[:, None, None], 1 / std[:, None, None]


def encode(vae: Vae, pixels_BCHW: Tensor) -> Tensor:
    """Encodes pixels in [-1, 1] to the transformer's latents, in the VAE's dtype."""
    shift, scale = _shift_and_scale(vae)
    return (raw_encode(vae, pixels_BCHW.to(vae.dtype)) - shift) * scale


def decode(vae: Vae, latents_BCHW: Tensor) -> Tensor:
    """Decodes the transformer's latents to pixels, nominally in [-1, 1]."""
    shift, scale = _shift_and_scale(vae)
    return raw_decode(vae, latents_BCHW.to(vae.dtype) / scale + shift)


def _batch(step: int, settings: VaeSettings) -> Tensor:
    numbers = range(step * settings.batch, (step + 1) * settings.batch)[rows(settings.batch)]
    collages = round(len(numbers) * settings.collage_share)
    return to_tensor(
        [collage(i, settings.pixels) for i in numbers[:collages]]
        + [render(sample_scene(i), settings.pixels) for i in numbers[collages:]]
    )


def psnr(vae: Vae, pixels_BCHW: Tensor) -> float:
    """Mean peak signal-to-noise ratio of the round trip in dB, of pixels rounded to 8 bits."""
    with torch.no_grad():
        chunks = pixels_BCHW.to(vae.device).split(32)
        round_trip = torch.cat([decode(vae, encode(vae, x)) for x in chunks])
    round_trip = ((round_trip.float().cpu().clamp(-1, 1) + 1) * 127.5).round() / 255
    error_B = ((pixels_BCHW + 1) / 2 - round_trip).square().mean(dim=(1, 2, 3))
    return float((-10 * error_B.log10()).mean())


def held_out_pixels(count: int = 200, pixels: int = PIXELS) -> Tensor:
    """Rendered scenes of the `eval` split."""
    return to_tensor([render(sample_scene(i, "eval"), pixels) for i in range(count)])


def train_vae(
    work: Path,
    settings: VaeSettings | None = None,
    build: Callable[[], Vae] = build_vae,
    start: Vae | None = None,
) -> Vae:
    """A trained float32 VAE with the latents' statistics in its config.

    Resumes from `work/vae.pt` if it exists; otherwise starts from `start`, or random weights.
    """
    settings = settings or VaeSettings()
    torch.manual_seed(settings.seed)
    vae = build().to(DEVICE)
    if start is not None:
        vae.load_state_dict(start.state_dict())
    convolutions = [p for p in vae.parameters() if settings.muon_rate and p.shape[2:] == (3, 3)]
    others = [p for p in vae.parameters() if all(p is not each for each in convolutions)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=settings.learning_rate, weight_decay=1e-4, betas=(0.9, 0.98))
    ]
    if convolutions:
        optimizers.append(Muon(convolutions, lr=settings.muon_rate))
    checkpoint = Checkpoint(work / "vae.pt")
    first = 0
    if state := checkpoint.load():
        vae.load_state_dict(state["vae"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        first = state["step"]

    def save(step: int) -> None:
        checkpoint.save({"vae": vae.state_dict(), "step": step,
                         "optimizers": [each.state_dict() for each in optimizers]})  # fmt: skip

    run = torch.compile(_round_trip, dynamic=False) if settings.compiled else _round_trip
    torch.manual_seed(settings.seed + 1 + rank())
    progress = trange(first, settings.steps, initial=first, total=settings.steps, desc="vae",
                      disable=rank() > 0)  # fmt: skip
    for step in progress:
        for group in (group for each in optimizers for group in each.param_groups):
            rate = group.setdefault("initial_lr", group["lr"])
            group["lr"] = rate * one_cycle(step / settings.steps)
        pixels_BCHW = _batch(step, settings).to(DEVICE)
        latents_BCHW, error = run(vae, pixels_BCHW, settings.latent_noise)
        loss = (
            error.abs().mean()
            + error.square().mean()
            + settings.latent_pull * latents_BCHW.square().mean()
        )
        if settings.edges:
            # The absolute error alone leaves stripes and dots out, which few of the pixels are.
            loss = loss + settings.edges * sum(
                error.diff(dim=axis).square().mean() for axis in (2, 3)
            )
        loss.backward()
        average_gradients(vae.parameters())
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            deviation = latents_BCHW.detach().std()
            progress.set_postfix(loss=f"{loss.item():.4f}", std=f"{deviation:.2f}")
        if rank() == 0 and checkpoint.due():
            save(step + 1)
    if rank() == 0 and first < settings.steps:
        save(settings.steps)
    vae.eval().requires_grad_(False)
    _normalize(vae, settings.pixels)
    return vae


def _round_trip(vae: Vae, pixels_BCHW: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """The latents, and the error of the pixels that are decoded from them with noise."""
    with bfloat16_products():
        latents_BCHW = raw_encode(vae, pixels_BCHW).float()
        noisy = latents_BCHW + noise * torch.randn_like(latents_BCHW)
        return latents_BCHW, raw_decode(vae, noisy).float() - pixels_BCHW


def one_cycle(fraction: float) -> float:
    """Learning-rate factor: 5 % linear warmup, then cosine decay to zero."""
    if fraction < 0.05:
        return 0.02 + 0.98 * fraction / 0.05
    return 0.5 * (1 + math.cos(math.pi * (fraction - 0.05) / 0.95))


@torch.no_grad()
def _normalize(vae: Vae, pixels: int) -> None:
    """Writes the latents' statistics, from 1,000 scenes or as many pixels, into the config."""
    latents = []
    for first in range(0, 1000 * PIXELS**2 // pixels**2, 50):
        scenes = [sample_scene(i) for i in range(first, first + 50)]
        pixels_BCHW = to_tensor([render(scene, pixels) for scene in scenes])
        latents.append(raw_encode(vae, pixels_BCHW.to(vae.device)))
    stack = torch.cat(latents)
    if _takes_alpha(vae):
        every = stack.transpose(0, 1).flatten(1)
        mean, std = ([round(x, 4) for x in each.tolist()] for each in (every.mean(1), every.std(1)))
        vae.register_to_config(latents_mean=mean, latents_std=std)
        return
    vae.register_to_config(
        shift_factor=round(float(stack.mean()), 4), scaling_factor=round(1 / float(stack.std()), 4)
    )


def preview(vae: Vae, path: Path, pixels: int = PIXELS) -> None:
    """Writes pairs of images, each with its reconstruction below: scenes, then subjects."""
    scenes = [sample_scene(i, "eval") for i in range(8)]
    scenes += [subject_scene(s, 0, word="") for s in ("bee", "mushroom", "robot", "fish")]
    pixels_BCHW = to_tensor([render(scene, pixels) for scene in scenes]).to(vae.device)
    with torch.no_grad():
        shown = torch.cat([pixels_BCHW, decode(vae, encode(vae, pixels_BCHW)).float()])
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(to_images(shown), columns=len(scenes)).save(path)
