"""Measures the shipped bases with the judge: `python -m miniature.evaluate`.

Prompts are of the `eval` split and ask for everything; a picture counts under `all` when every
attribute asked for is right. Each row of the table is one way of drawing; `--sheet` shows each
way's first pictures in a row of their own. Three more columns say what the attributes do not see:
`distance` of the pictures from renderings, `sharp`ness as a share of the renderings', and how
`near` each picture is to the one that the first way (the undistilled base at its best) draws from
the same noise, in dB.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from miniature.drawing import grid, render
from miniature.judge import Judge, accuracy, held_out_accuracy, load_judge
from miniature.pictures import to_tensor
from miniature.sampling import draw
from miniature.vae import held_out_pixels, psnr
from miniature.weights import ADAPTER, JUDGE, TURBO, UNDISTILLED, WEIGHTS, load_base, merge_adapter
from miniature.world import evaluation_prompts, sample_scene

GUIDANCE = 1.0  # in the pipeline's scale, where 0 is off; more makes things grow
SHOWN = 12  # pictures of each way on the sheet
COLUMNS = ("all", "shape", "colour", "texture", "size", "position", "place", "count")


@dataclass(frozen=True)
class Way:
    """One way of drawing the evaluation prompts."""

    name: str
    base: str
    steps: int
    guidance: float
    adapter: bool = False


BEST = Way("miniature, 25 steps, guidance", UNDISTILLED, 25, GUIDANCE)
WAYS = (
    BEST,
    Way("miniature, 8 steps, no guidance", UNDISTILLED, 8, 0.0),
    Way("turbo, 8 steps, no guidance", TURBO, 8, 0.0),
    Way("turbo + adapter, 8 steps, no guidance", TURBO, 8, 0.0, adapter=True),
    Way("turbo + adapter, 30 steps, guidance", TURBO, 30, GUIDANCE, adapter=True),
    # Fewer steps than turbo was made for show what its distillation is worth.
    *(
        Way(f"{label}, {steps} steps, no guidance", base, steps, 0.0, adapter)
        for steps in (4, 2)
        for label, base, adapter in (
            ("miniature", UNDISTILLED, False),
            ("turbo", TURBO, False),
            ("turbo + adapter", TURBO, True),
        )
    ),
)


def draw_way(way: Way, images: int, weights: Path = WEIGHTS) -> list[Image.Image]:
    """The pictures of `evaluation_prompts(images)` drawn this way, seeds 0 and up."""
    base = load_base(way.base, weights)
    if way.adapter:
        merge_adapter(base.transformer, weights / ADAPTER)
    prompts = [caption.text for caption in evaluation_prompts(images)]
    return draw(base, prompts, list(range(images)), way.steps, way.guidance)


def measure(pictures: list[Image.Image], weights: Path = WEIGHTS) -> dict[str, float]:
    """Share right per attribute and under `all`, of pictures of the first evaluation prompts."""
    asked = [caption.asked for caption in evaluation_prompts(len(pictures))]
    tally = accuracy(load_judge(weights / JUDGE), pictures, asked)
    return {key: right / total for key, (right, total) in tally.items()}


@torch.no_grad()
def features(judge: Judge, pictures: list[Image.Image]) -> Tensor:
    """The judge's last convolution, averaged over the picture: float64 [B, 112]."""
    trunk = judge.trunk[:-2]
    return torch.cat([trunk(x).mean(dim=(2, 3)) for x in to_tensor(pictures).split(100)]).double()


def frechet_distance(judge: Judge, pictures: list[Image.Image]) -> float:
    """How far pictures are from 1,000 held-out renderings, blemishes included: lower is better.

    The Frechet distance of Heusel et al. 2017 (FID), on the judge's features.
    """
    real = features(judge, [render(sample_scene(i, "eval")) for i in range(1000)])
    return frechet(features(judge, pictures), real)


def frechet(drawn: Tensor, real: Tensor) -> float:
    """The Frechet distance of two sets of features [B, D]."""
    a, b = drawn.T.cov(), real.T.cov()
    mixed = torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt().sum()
    return float((drawn.mean(0) - real.mean(0)).square().sum() + a.trace() + b.trace() - 2 * mixed)


def sharpness(pictures: list[Image.Image]) -> float:
    """The mean square of the grey values' Laplacian (four neighbours), grey values in [-1, 1]."""
    kernel = torch.tensor([[0.0, -1, 0], [-1, 4, -1], [0, -1, 0]])[None, None]
    grey_B1HW = to_tensor(pictures).mean(dim=1, keepdim=True)
    return float(torch.nn.functional.conv2d(grey_B1HW, kernel).square().mean())


def nearness(pictures: list[Image.Image], others: list[Image.Image]) -> float:
    """The median over the pairs of pictures of their PSNR, in dB."""
    error_B = (to_tensor(pictures) - to_tensor(others)).square().mean(dim=(1, 2, 3))
    return float((10 * torch.log10(4 / error_B.clamp(min=1e-9))).median())


def available(way: Way, weights: Path) -> bool:
    """Whether the weights this way needs are there."""
    needed = [weights / way.base / "transformer"]
    if way.adapter:
        needed.append(weights / ADAPTER)
    return all(path.exists() for path in needed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--only", default="", help="ways whose name contains this")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--sheet", type=Path, help="file for the pictures")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()

    figures: dict[str, object] = {}
    shown: list[Image.Image] = []
    if not options.only:
        judge = load_judge(options.weights / JUDGE)
        shares = {k: r / n for k, (r, n) in held_out_accuracy(judge).items()}
        figures["judge on 2,000 held-out renderings"] = shares
        print("judge     ", " ".join(f"{k} {v:.2%}" for k, v in shares.items()))
        decibel = psnr(load_base(TURBO, options.weights).vae, held_out_pixels(200))
        figures["vae psnr"] = decibel
        print(f"vae        {decibel:.2f} dB on 200 held-out scenes")
    print(f"{'':40}" + " ".join(f"{c:>8}" for c in (*COLUMNS, "distance", "sharp", "near")))
    best = draw_way(BEST, options.images, options.weights)
    rendered = sharpness([render(sample_scene(i, "eval")) for i in range(1000)])
    for way in WAYS:
        if options.only not in way.name:
            continue
        if not available(way, options.weights):
            print(f"{way.name:40}weights are not there")
            continue
        started = time.perf_counter()
        pictures = best if way is BEST else draw_way(way, options.images, options.weights)
        shown += pictures[:SHOWN]
        shares = measure(pictures, options.weights)
        far = frechet_distance(load_judge(options.weights / JUDGE), pictures)
        figures[way.name] = asdict(way) | {
            "images": options.images, "right": shares, "distance": far,
            "sharpness": (sharp := sharpness(pictures) / rendered),
            "nearness": (near := nearness(pictures, best)),
        }  # fmt: skip
        row = " ".join(f"{shares.get(c, float('nan')):8.1%}" for c in COLUMNS)
        seconds = time.perf_counter() - started
        print(
            f"{way.name:40}{row} {far:8.2f} {sharp:8.0%} {near:8.1f}   {seconds:.0f} s", flush=True
        )
    if options.sheet and shown:
        grid(shown, columns=min(SHOWN, options.images)).save(options.sheet, optimize=True)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
