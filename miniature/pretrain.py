"""Stage 2: trains text encoder and transformer by flow matching on captioned scenes.

To be fast enough for a CPU:
- the text encoder is first trained to encode the attributes (a minute),
- Muon (Jordan et al. 2024) for the blocks' matrices, AdamW for the rest,
- stratified sigmas: one from each of B equal quantiles,
- a threefold loss around objects until the learning rate's cooldown,
- compiled blocks, bfloat16 products, cached latents.

B batch, C channels, H rows, W columns of latents, L caption tokens, D text width.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm, trange

from miniature.batched import batched_forward
from miniature.checkpoint import Checkpoint
from miniature.device import DEVICE, bfloat16_products
from miniature.drawing import render
from miniature.images import to_tensor
from miniature.models import TextEncoder, Transformer, Vae, build_text_encoder, build_transformer
from miniature.muon import Muon
from miniature.parallel import average_gradients, gather_rows, rank, rows
from miniature.sampling import encode_ids, tokenize
from miniature.tokenizer import build_tokenizer
from miniature.vae import encode
from miniature.world import RADIUS, Scene, attributes, caption, sample_scene


@dataclass(frozen=True)
class PretrainSettings:
    steps: int = 4000
    cooldown: float = 0.35  # last share of the steps, with a linear decay to zero
    warmup: int = 100  # steps
    batch: int = 64
    scenes: int = 32_000  # distinct images
    muon_rate: float = 4e-3
    adam_rate: float = 1.5e-3
    text_steps: int = 150  # of the text encoder only
    caption_dropout: float = 0.1
    sigma_shift: float = 2.0  # of the logit-normal sigmas
    thing_weight: float = 3.0  # of the loss around objects, until the cooldown
    long_every: int = 24  # one batch in so many has captions of 33 to 64 tokens
    ema: float = 0.998
    seed: int = 0


def sample_sigmas(count: int, shift: float, generator: torch.Generator) -> Tensor:
    """Stratified sigmas [B]: logit-normal, shifted towards noise."""
    slices = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    normal = torch.special.ndtri(slices.clamp(1e-4, 1 - 1e-4))
    sigma = torch.sigmoid(normal)[torch.randperm(count, generator=generator)]
    return shift * sigma / (1 + (shift - 1) * sigma)


def thing_mask(scenes: list[Scene], side: int = 16) -> Tensor:
    """1 near an object and 0 elsewhere, [B, 1, side, side]."""
    centres = (torch.arange(side) + 0.5) * 64 / side
    mask = torch.zeros(len(scenes), 1, side, side)
    for row, scene in enumerate(scenes):
        for thing in scene.things:
            distance = ((centres[None] - thing.x) ** 2 + (centres[:, None] - thing.y) ** 2).sqrt()
            mask[row, 0] += (distance < 1.25 * RADIUS[thing.size] + 2).float()
    return mask.clamp(max=1)


@torch.no_grad()
def latent_cache(vae: Vae, count: int, path: Path) -> Tensor:
    """float16 latents [count, C, H, W] of the first training scenes, cached at `path`."""
    if path.exists():
        kept: Tensor = torch.load(path, weights_only=True)
        if len(kept) == count:
            return kept
    chunks = []
    numbers = range(count)[rows(count)]
    for first in trange(0, len(numbers), 50, desc="latents", disable=rank() > 0):
        pixels = to_tensor([render(sample_scene(i)) for i in numbers[first : first + 50]])
        with bfloat16_products():
            chunks.append(encode(vae, pixels.to(DEVICE)).half().cpu())
    cache = gather_rows(torch.cat(chunks))
    if rank() == 0:
        torch.save(cache, path)
    return cache


class AttributeProbe(nn.Module):
    """Predicts every attribute from caption features; only used in the warm-up."""

    def __init__(self, width: int, values: dict[str, list[str]]) -> None:
        super().__init__()
        self.values = values
        self.query = nn.Parameter(torch.randn(len(values), width) * width**-0.5)
        self.heads = nn.ModuleList(nn.Linear(width, len(v)) for v in values.values())

    def forward(self, text_BLD: Tensor, mask_BL: Tensor) -> list[Tensor]:
        score = (text_BLD @ self.query.T).masked_fill(~mask_BL[..., None], -1e4)
        pooled_BAD = score.softmax(dim=1).transpose(1, 2) @ text_BLD
        return [head(pooled_BAD[:, i]) for i, head in enumerate(self.heads)]


def warm_text_encoder(text_encoder: TextEncoder, settings: PretrainSettings) -> None:
    """Trains the text encoder so that a probe can predict a scene's attributes."""
    tokenizer = build_tokenizer()
    shown = [attributes(sample_scene(i)) for i in range(2000)]
    values = {key: sorted({a[key] for a in shown if key in a})
              for key in sorted({k for a in shown for k in a})}  # fmt: skip
    probe = AttributeProbe(text_encoder.config.hidden_size, values).to(DEVICE)
    parameters = [*text_encoder.parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
    progress = trange(settings.text_steps, desc="text", disable=rank() > 0)
    for step in progress:
        scenes = [sample_scene(128 * step + i) for i in range(128)[rows(128)]]
        prompts = [caption(s, random.Random(f"text {s.seed}")) for s in scenes]
        ids_BL, mask_BL = tokenize(tokenizer, prompts, 32)
        text = encode_ids(text_encoder, ids_BL.to(DEVICE), mask_BL.to(DEVICE))
        loss = torch.zeros((), device=DEVICE)
        for key, logits in zip(values, probe(text.text_BLD, text.mask_BL), strict=True):
            targets = [values[key].index(a[key]) if key in a else -100
                       for a in map(attributes, scenes)]  # fmt: skip
            loss = loss + F.cross_entropy(logits, torch.tensor(targets, device=DEVICE))
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, 2 * (1 - step / settings.text_steps))
        loss.backward()
        average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.set_postfix(loss=f"{float(loss) / len(values):.3f}")


BLOCK_MATRICES = (".attention.to_", ".feed_forward.", ".attn.to_", ".img_mlp.")


def build_optimizers(
    transformer: Transformer, text_encoder: TextEncoder | None,
    muon_rate: float, adam_rate: float,
) -> list[torch.optim.Optimizer]:  # fmt: skip
    """Muon for the blocks' attention and feed-forward matrices, AdamW for all others."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in transformer.named_parameters():
        inner = any(part in name for part in BLOCK_MATRICES)
        (matrices if inner else rest).append(parameter)
    if text_encoder is not None:
        rest += list(text_encoder.parameters())
    return [
        Muon(matrices, lr=muon_rate),
        torch.optim.AdamW(rest, lr=adam_rate, weight_decay=0.01, betas=(0.9, 0.98)),
    ]  # fmt: skip


class Ema:
    """EMA weights of modules, in float32, by parameter name."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.modules = modules
        self.weights = {k: p.detach().clone() for k, p in self._named()}
        self.count = 0

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for prefix, module in self.modules.items():
            for name, parameter in module.named_parameters():
                yield f"{prefix}.{name}", parameter

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Updates the EMA weights; with a lower decay in the first steps."""
        self.count += 1
        keep = min(decay, (1 + self.count) / (10 + self.count))
        kept = list(self.weights.values())
        torch._foreach_lerp_(kept, [p.detach() for _, p in self._named()], 1 - keep)

    @torch.no_grad()
    def swap(self) -> None:
        """Swaps the EMA weights and the current ones; a second call undoes it."""
        for key, parameter in self._named():
            now = parameter.detach().clone()
            parameter.copy_(self.weights[key])
            self.weights[key].copy_(now)


def schedule(step: int, settings: PretrainSettings) -> float:
    """Learning-rate factor: warmup, constant, linear cooldown to zero."""
    cool = (settings.steps - step) / (settings.cooldown * settings.steps)
    return max(0.0, min(1.0, (step + 1) / settings.warmup, cool))


def fit(
    modules: dict[str, nn.Module],
    work: Path,
    settings: PretrainSettings,
    loss_of: Callable[[int, float], tuple[Tensor, Tensor]],
    warm: Callable[[], None],
    preview: Callable[[int], None] | None = None,
    preview_every: int = 500,
    start: tuple[nn.Module, nn.Module] | None = None,
) -> None:
    """Trains `modules` (transformer and text encoder), which have the EMA weights afterwards.

    `loss_of` returns a step's loss, which is minimized, and the plain one, from the step's number
    and the factor of the learning rate. Resumes from `work/base.pt`; otherwise starts from the
    weights of `start`, or runs `warm` first.
    """
    transformer, text_encoder = modules.values()
    optimizers = build_optimizers(transformer, text_encoder, settings.muon_rate, settings.adam_rate)
    checkpoint = Checkpoint(work / "base.pt")
    first = 0
    state = checkpoint.load()
    if state is None and start is None:
        warm()
    elif state is None and start is not None:
        for module, begun in zip(modules.values(), start, strict=True):
            module.load_state_dict(begun.state_dict())
    ema = Ema(modules)
    if state is not None:
        for name, module in modules.items():
            module.load_state_dict(state[name])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        ema.weights, ema.count, first = state["ema"], state["ema_count"], state["step"]

    def save(step: int) -> None:
        checkpoint.save(
            {name: module.state_dict() for name, module in modules.items()}
            | {"optimizers": [o.state_dict() for o in optimizers], "ema": ema.weights,
               "ema_count": ema.count, "step": step}
        )  # fmt: skip

    parameters = [p for m in modules.values() for p in m.parameters()]
    smooth = 0.0
    progress = tqdm(range(first, settings.steps), initial=first, total=settings.steps, desc="base",
                    disable=rank() > 0)  # fmt: skip
    for step in progress:
        factor = schedule(step, settings)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        loss, plain = loss_of(step, factor)
        loss.backward()
        average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ema.update(settings.ema)

        smooth = float(loss) if step == first else 0.98 * smooth + 0.02 * float(loss)
        progress.set_postfix(loss=f"{smooth:.4f}", plain=f"{float(plain):.4f}")
        if rank() == 0 and checkpoint.due():
            save(step + 1)
        if rank() == 0 and preview and (step + 1) % preview_every == 0:
            ema.swap()
            preview(step + 1)
            ema.swap()
    if rank() == 0 and first < settings.steps:
        save(settings.steps)
    ema.swap()
    for module in modules.values():
        module.eval().requires_grad_(False)


def train_base(
    vae: Vae,
    work: Path,
    settings: PretrainSettings | None = None,
    preview: Callable[[Transformer, TextEncoder, int], None] | None = None,
    start: tuple[Transformer, TextEncoder] | None = None,
) -> tuple[Transformer, TextEncoder]:
    """The EMA weights of transformer and text encoder, float32; see `fit`."""
    settings = settings or PretrainSettings()
    tokenizer = build_tokenizer()
    latents = latent_cache(vae, settings.scenes, work / "latents.pt")
    scenes = [sample_scene(i) for i in range(settings.scenes)]

    torch.manual_seed(settings.seed)
    transformer, text_encoder = build_transformer().to(DEVICE), build_text_encoder().to(DEVICE)
    compiled = torch.compile(batched_forward, dynamic=False)
    mine = rows(settings.batch)

    def loss_of(step: int, factor: float) -> tuple[Tensor, Tensor]:
        # Scenes, captions and noise depend only on the seed and the step's number.
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        rng = random.Random(f"{settings.seed} {step}")
        picks = torch.randint(settings.scenes, (settings.batch,), generator=generator)
        batch = [scenes[i] for i in picks.tolist()]
        long = step % settings.long_every == settings.long_every - 1
        prompts = [_prompt(scene, rng, long, settings.caption_dropout) for scene in batch]
        noise = torch.randn((settings.batch, *latents.shape[1:]), generator=generator)
        sigma_B = sample_sigmas(settings.batch, settings.sigma_shift, generator)
        ids_BL, mask_BL = tokenize(tokenizer, prompts[mine], 64 if long else 32)
        clean, noise, sigma_B, ids_BL, mask_BL = (
            part.to(DEVICE)
            for part in (latents[picks[mine]].float(), noise[mine], sigma_B[mine], ids_BL, mask_BL)
        )
        sigma_B111 = sigma_B[:, None, None, None]

        with bfloat16_products():
            text = encode_ids(text_encoder, ids_BL, mask_BL)
            noised = (1 - sigma_B111) * clean + sigma_B111 * noise
            run = batched_forward if long else compiled
            out = run(transformer, noised, 1 - sigma_B, text.text_BLD, mask_BL)
        error = (out.float() - (clean - noise)).square()
        return weighted(error, batch[mine], settings, factor), error.detach().mean()

    show = None if preview is None else partial(preview, transformer, text_encoder)
    warm = partial(warm_text_encoder, text_encoder, settings)
    modules = {"transformer": transformer, "text_encoder": text_encoder}
    fit(modules, work, settings, loss_of, warm, show, start=start)
    return transformer, text_encoder


def weighted(
    error_BCHW: Tensor, scenes: list[Scene], settings: PretrainSettings, factor: float
) -> Tensor:
    """The mean error with more weight around objects, until the cooldown."""
    mask = thing_mask(scenes, error_BCHW.shape[-1]).to(error_BCHW.device)
    weight = 1 + (settings.thing_weight - 1) * factor * mask
    return (error_BCHW * weight / weight.mean()).mean()


def _prompt(scene: Scene, rng: random.Random, long: bool, dropout: float) -> str:
    """A caption or an empty one; a long one repeats it in other words, up to 64 tokens."""
    if not long:
        return "" if rng.random() < dropout else caption(scene, rng)
    return ", ".join(caption(scene, rng) for _ in range(2 if len(scene.things) == 2 else 3))
