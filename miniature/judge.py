"""The judge: a classifier of the attributes (`world.attributes`) of an image.

A small convolutional network trained on renderings with the artifacts of generated images: those of
the autoencoder, blur, noise, shifted colors. Its input has 64 x 64 pixels; larger images are
downsampled.

B batch, C channels, H rows, W columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import trange

from miniature.checkpoint import Checkpoint
from miniature.device import DEVICE, bfloat16_products
from miniature.drawing import render
from miniature.images import to_tensor
from miniature.lexicon import COLOURS, PLACES, POSITIONS, SHAPES, SIZES, TEXTURES
from miniature.models import Vae
from miniature.parallel import average_gradients, rank, rows
from miniature.vae import decode, encode
from miniature.weights import JUDGE, WEIGHTS
from miniature.world import attributes, sample_scene

_THING = {"shape": list(SHAPES), "colour": list(COLOURS), "texture": list(TEXTURES),
          "size": list(SIZES)}  # fmt: skip
# The network's outputs: for a single object, keys without a prefix and `position`; else the others.
QUESTIONS: dict[str, list[str]] = {
    "count": ["1", "2"],
    "place": list(PLACES),
    "position": list(POSITIONS),
    **_THING,
    **{f"left.{k}": v for k, v in _THING.items()},
    **{f"right.{k}": v for k, v in _THING.items()},
}


@dataclass(frozen=True)
class JudgeSettings:
    steps: int = 1200
    batch: int = 64
    learning_rate: float = 3e-3
    round_trip: float = 0.5  # share of the batch that was encoded and decoded by the autoencoder
    seed: int = 0


class Judge(nn.Module):
    """Logits for every question, also those that do not apply."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inner = 3
        for outer, stride in ((24, 1), (32, 2), (48, 2), (80, 2), (112, 2)):
            layers += [nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer),
                       nn.SiLU()]  # fmt: skip
            inner = outer
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.1))
        self.heads = nn.Linear(inner * 16, sum(len(v) for v in QUESTIONS.values()))

    def forward(self, pixels_BCHW: Tensor) -> dict[str, Tensor]:
        parts = self.heads(self.trunk(pixels_BCHW)).split([len(v) for v in QUESTIONS.values()], 1)
        return dict(zip(QUESTIONS, parts, strict=True))

    @torch.no_grad()
    def read(self, images: Sequence[Image.Image]) -> list[dict[str, str]]:
        """The attributes of each image, with the keys of `world.attributes`."""
        self.eval()
        small = [p if p.size == (64, 64) else p.resize((64, 64), Image.Resampling.BOX)
                 for p in images]  # fmt: skip
        seen: list[dict[str, str]] = []
        for first in range(0, len(small), 100):
            chunk = small[first : first + 100]
            answers = {k: v.argmax(dim=1).tolist() for k, v in self(to_tensor(chunk)).items()}
            for row in range(len(chunk)):
                every = {key: QUESTIONS[key][answers[key][row]] for key in QUESTIONS}
                seen.append({k: v for k, v in every.items() if _applies(k, every["count"])})
        return seen


def _applies(key: str, count: str) -> bool:
    if key in ("count", "place"):
        return True
    return ("." in key) == (count == "2")


def blemish(pixels_BCHW: Tensor) -> Tensor:
    """Adds random blur, noise, gain and tint per image, similar to artifacts of generation."""
    batch = len(pixels_BCHW)
    blurred = F.avg_pool2d(F.pad(pixels_BCHW, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = torch.rand(batch, 1, 1, 1) * (torch.rand(batch, 1, 1, 1) < 0.6)
    mixed = torch.lerp(pixels_BCHW, blurred, share)
    noise = torch.rand(batch, 1, 1, 1) * 0.16 * torch.randn_like(mixed)
    tint = 0.06 * torch.randn(batch, 3, 1, 1)
    gain = 1 + 0.08 * torch.randn(batch, 1, 1, 1)
    return (gain * mixed + tint + noise).clamp(-1, 1)


def train_judge(
    vae: Vae, work: Path, settings: JudgeSettings | None = None, start: Judge | None = None
) -> Judge:
    """A trained judge.

    Resumes from `work/judge.pt`; otherwise starts from the weights of `start`, or random ones.
    """
    settings = settings or JudgeSettings()
    torch.manual_seed(settings.seed)
    judge = Judge().to(DEVICE)
    if start is not None:
        judge.load_state_dict(start.state_dict())
    optimizer = torch.optim.AdamW(judge.parameters(), lr=settings.learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.1
    )
    checkpoint, first = Checkpoint(work / "judge.pt"), 0
    parts: dict[str, Any] = {"judge": judge, "optimizer": optimizer, "schedule": schedule}
    if state := checkpoint.load():
        for name, part in parts.items():
            part.load_state_dict(state[name])
        first = state["step"]
    torch.manual_seed(settings.seed + 1 + rank())
    progress = trange(first, settings.steps, initial=first, total=settings.steps, desc="judge",
                      disable=rank() > 0)  # fmt: skip
    for step in progress:
        judge.train()
        numbers = range(step * settings.batch, (step + 1) * settings.batch)[rows(settings.batch)]
        # Separate seeds, so that the judge sees no training image of the models.
        scenes = [sample_scene(10_000_000 + i) for i in numbers]
        pixels_BCHW = to_tensor([render(scene) for scene in scenes]).to(DEVICE)
        tripped = round(len(scenes) * settings.round_trip)
        with torch.no_grad(), bfloat16_products():
            pixels_BCHW[:tripped] = decode(vae, encode(vae, pixels_BCHW[:tripped])).float()
        pixels_BCHW = blemish(pixels_BCHW.cpu()).to(DEVICE)
        shown = [attributes(scene) for scene in scenes]
        with bfloat16_products():
            answers = judge(pixels_BCHW)
        loss = torch.zeros((), device=DEVICE)
        for key, logits in answers.items():
            targets = torch.tensor([QUESTIONS[key].index(a[key]) if key in a else -100
                                    for a in shown], device=DEVICE)  # fmt: skip
            if (targets >= 0).any():
                loss = loss + F.cross_entropy(logits.float(), targets)
        loss.backward()
        average_gradients(judge.parameters())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=False)
        if step % 20 == 0:
            progress.set_postfix(loss=f"{float(loss) / len(QUESTIONS):.4f}")
        if rank() == 0 and (checkpoint.due() or step + 1 == settings.steps):
            checkpoint.save({n: p.state_dict() for n, p in parts.items()} | {"step": step + 1})
    return judge.cpu().eval()


def save_judge(judge: Judge, path: Path = WEIGHTS / JUDGE) -> None:
    """Writes bfloat16 weights."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.to(torch.bfloat16) if v.is_floating_point() else v
               for k, v in judge.state_dict().items()}  # fmt: skip
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)


@cache
def load_judge(path: Path = WEIGHTS / JUDGE) -> Judge:
    """The included judge, in float32."""
    judge = Judge()
    judge.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()}
    )
    return judge.eval().requires_grad_(False)


def accuracy(
    judge: Judge, images: Sequence[Image.Image], truths: Sequence[dict[str, str]]
) -> dict[str, tuple[int, int]]:
    """(right, total) by attribute; `all` counts images with all attributes right.

    Attributes of two objects count without their prefix. A wrong count makes the rest wrong.
    """
    tally: dict[str, list[int]] = {}
    for seen, truth in zip(judge.read(images), truths, strict=True):
        hits = {key: seen.get(key) == value for key, value in truth.items()}
        for key, hit in [*hits.items(), ("all", all(hits.values()))]:
            entry = tally.setdefault(key.split(".")[-1], [0, 0])
            entry[0] += hit
            entry[1] += 1
    return {key: (right, asked) for key, (right, asked) in sorted(tally.items())}


def held_out_accuracy(judge: Judge, count: int = 2000) -> dict[str, tuple[int, int]]:
    """`accuracy` on clean renderings of the `eval` split."""
    scenes = [sample_scene(i, "eval") for i in range(count)]
    return accuracy(judge, [render(s) for s in scenes], [attributes(s) for s in scenes])
