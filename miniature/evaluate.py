"""Measures the included bases with the judge: `python -m miniature.evaluate`.

Prompts are of the `eval` split and name all attributes; an image counts as `all` if every attribute
is right. Each row of the table is one configuration; `--sheet` writes the first images of each in
one row. Three more columns measure quality: `distance` of the images from renderings, `sharp`ness
relative to the renderings, and how `near` each image is, in dB, to that of the first configuration
(the undistilled base at its best) with the same noise.
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
from miniature.images import to_tensor
from miniature.judge import Judge, accuracy, held_out_accuracy, load_judge
from miniature.sampling import generate
from miniature.vae import held_out_pixels, psnr
from miniature.weights import ADAPTER, JUDGE, TURBO, UNDISTILLED, WEIGHTS, load_base, merge_adapter
from miniature.world import evaluation_prompts, sample_scene

GUIDANCE = 1.0  # on the pipeline's scale, where 0 is off; more makes objects larger
SHOWN = 12  # images of each configuration on the sheet
COLUMNS = ("all", "shape", "colour", "texture", "size", "position", "place", "count")


@dataclass(frozen=True)
class Way:
    """One configuration for generating the evaluation prompts."""

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
    # Fewer steps than turbo was distilled for show the effect of the distillation.
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


def generate_with(way: Way, images: int, weights: Path = WEIGHTS) -> list[Image.Image]:
    """Generates `evaluation_prompts(images)` with this configuration, seeds from 0."""
    base = load_base(way.base, weights)
    if way.adapter:
        merge_adapter(base.transformer, weights / ADAPTER)
    prompts = [caption.text for caption in evaluation_prompts(images)]
    return generate(base, prompts, list(range(images)), way.steps, way.guidance)


def measure(images: list[Image.Image], weights: Path = WEIGHTS) -> dict[str, float]:
    """Share of right attributes, by attribute and `all`, in images of the first prompts."""
    asked = [caption.asked for caption in evaluation_prompts(len(images))]
    tally = accuracy(load_judge(weights / JUDGE), images, asked)
    return {key: right / total for key, (right, total) in tally.items()}


@torch.no_grad()
def features(judge: Judge, images: list[Image.Image]) -> Tensor:
    """The judge's last convolution, averaged over the image: float64 [B, 112]."""
    trunk = judge.trunk[:-2]
    return torch.cat([trunk(x).mean(dim=(2, 3)) for x in to_tensor(images).split(100)]).double()


def frechet_distance(judge: Judge, images: list[Image.Image]) -> float:
    """The Frechet distance of images from 1,000 held-out renderings: lower is better.

    As FID (Heusel et al. 2017), on the judge's features.
    """
    real = features(judge, [render(sample_scene(i, "eval")) for i in range(1000)])
    return frechet(features(judge, images), real)


def frechet(drawn: Tensor, real: Tensor) -> float:
    """The Frechet distance of two sets of features [B, D]."""
    a, b = drawn.T.cov(), real.T.cov()
    mixed = torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt().sum()
    return float((drawn.mean(0) - real.mean(0)).square().sum() + a.trace() + b.trace() - 2 * mixed)


def sharpness(images: list[Image.Image]) -> float:
    """The mean square of the Laplacian (four neighbors) of gray values in [-1, 1]."""
    kernel = torch.tensor([[0.0, -1, 0], [-1, 4, -1], [0, -1, 0]])[None, None]
    gray_B1HW = to_tensor(images).mean(dim=1, keepdim=True)
    return float(torch.nn.functional.conv2d(gray_B1HW, kernel).square().mean())


def nearness(images: list[Image.Image], others: list[Image.Image]) -> float:
    """The median PSNR of the pairs of images, in dB."""
    error_B = (to_tensor(images) - to_tensor(others)).square().mean(dim=(1, 2, 3))
    return float((10 * torch.log10(4 / error_B.clamp(min=1e-9))).median())


def available(way: Way, weights: Path) -> bool:
    """Whether the weights of this configuration exist."""
    needed = [weights / way.base / "transformer"]
    if way.adapter:
        needed.append(weights / ADAPTER)
    return all(path.exists() for path in needed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--only", default="", help="configurations whose name contains this")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--sheet", type=Path, help="file for the images")
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
    best = generate_with(BEST, options.images, options.weights)
    rendered = sharpness([render(sample_scene(i, "eval")) for i in range(1000)])
    for way in WAYS:
        if options.only not in way.name:
            continue
        if not available(way, options.weights):
            print(f"{way.name:40}weights not found")
            continue
        started = time.perf_counter()
        images = best if way is BEST else generate_with(way, options.images, options.weights)
        shown += images[:SHOWN]
        shares = measure(images, options.weights)
        far = frechet_distance(load_judge(options.weights / JUDGE), images)
        figures[way.name] = asdict(way) | {
            "images": options.images, "right": shares, "distance": far,
            "sharpness": (sharp := sharpness(images) / rendered),
            "nearness": (near := nearness(images, best)),
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
