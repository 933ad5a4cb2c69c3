"""Measures the second miniature with the judge: `python -m miniature.qwen.evaluate`.

The judge and all figures see images of 64 pixels.

Text-to-image as in `miniature.evaluate`. Edits of the `eval` split: an edit is right if every
attribute of the result is as asked or, where nothing was asked, as in the reference. `near` is the
median PSNR in dB to the rendering of the result, that of the reference in brackets.
"""

import argparse
import json
from pathlib import Path

import torch
from PIL import Image

from miniature.drawing import grid, render
from miniature.edits import KINDS, Edit, sample_edit
from miniature.evaluate import COLUMNS, frechet_distance, nearness, sharpness
from miniature.images import to_images, to_tensor
from miniature.judge import accuracy, load_judge
from miniature.qwen.models import PIXELS
from miniature.qwen.sampling import QwenBase, generate
from miniature.vae import decode, encode, held_out_pixels, psnr
from miniature.weights import WEIGHTS, load_qwen
from miniature.world import attributes, evaluation_prompts, sample_scene

STEPS, GUIDANCE = 25, 2.0  # on the usual scale, where 1 is off
SHOWN = 12


def edited(base: QwenBase, edits: list[Edit], steps: int, guidance: float) -> list[Image.Image]:
    """The results of edits, seeds from 0."""
    return generate(
        base, [e.instruction for e in edits], list(range(len(edits))), steps, guidance,
        [render(e.reference, PIXELS) for e in edits],
    )  # fmt: skip


def right(images: list[Image.Image], truths: list[dict[str, str]]) -> dict[str, float]:
    """The share of right attributes, by attribute and `all`."""
    return {k: r / n for k, (r, n) in accuracy(load_judge(), images, truths).items()}


def edits_right(images: list[Image.Image], edits: list[Edit]) -> dict[str, float]:
    """The share of right edits, by kind and `all`."""
    shares = {"all": right(images, [e.asked for e in edits])["all"]}
    for kind in KINDS:
        rows = [i for i, e in enumerate(edits) if e.kind == kind]
        if rows:
            shares[kind] = right([images[i] for i in rows], [edits[i].asked for i in rows])["all"]
    return shares


def small(images: list[Image.Image]) -> list[Image.Image]:
    """Images at the judge's 64 pixels."""
    return [each.resize((64, 64), Image.Resampling.BOX) for each in images]


def round_trip(base: QwenBase, images: list[Image.Image]) -> list[Image.Image]:
    """Images after encoding and decoding by the VAE."""
    return to_images(torch.cat([decode(base.vae, encode(base.vae, x))
                                for x in to_tensor(images).split(50)]))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--sheet", type=Path, help="file for images: scenes, references, results")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    base, count = load_qwen(options.weights), options.images
    figures: dict[str, object] = {}

    def report(name: str, shares: dict[str, float], more: str = "") -> None:
        figures[name] = shares
        print(f"{name:32}", " ".join(f"{k} {v:.1%}" for k, v in shares.items()), more, flush=True)

    scenes = [sample_scene(i, "eval") for i in range(count)]
    truths, renderings = [attributes(s) for s in scenes], [render(s, PIXELS) for s in scenes]
    decibel = psnr(base.vae, held_out_pixels(200, PIXELS))
    report("renderings through the VAE", _columns(right(round_trip(base, renderings), truths)),
           f"{decibel:.2f} dB")  # fmt: skip
    prompts = evaluation_prompts(count)
    texts, seeds = [p.text for p in prompts], list(range(count))
    sharp, shown = sharpness(small(renderings)), list[Image.Image]()
    for guidance in (GUIDANCE, 1.0):
        images = generate(base, texts, seeds, STEPS, guidance)
        far = frechet_distance(load_judge(), small(images))
        report(f"{STEPS} steps, guidance {guidance:g}",
               _columns(right(images, [p.asked for p in prompts])),
               f"distance {far:.2f} sharp {sharpness(small(images)) / sharp:.0%}")  # fmt: skip
        shown += images[:SHOWN] if not shown else []
    edits = [sample_edit(i, "eval") for i in range(count)]
    references, wanted = ([render(getattr(e, part), PIXELS) for e in edits]
                          for part in ("reference", "target"))  # fmt: skip
    report("edits: the reference, unchanged", edits_right(references, edits))
    report("edits: renderings through the VAE", edits_right(round_trip(base, wanted), edits))
    shown += references[:SHOWN]
    for guidance in (1.0, GUIDANCE):
        images = edited(base, edits, STEPS, guidance)
        near, unchanged = (nearness(small(each), small(wanted)) for each in (images, references))
        report(f"edits: {STEPS} steps, guidance {guidance:g}", edits_right(images, edits),
               f"near {near:.1f} ({unchanged:.1f})")  # fmt: skip
        shown += images[:SHOWN] if len(shown) < 3 * SHOWN else []
    if options.sheet:
        grid(small(shown), columns=SHOWN).save(options.sheet, optimize=True)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def _columns(shares: dict[str, float]) -> dict[str, float]:
    return {key: shares[key] for key in COLUMNS if key in shares}


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
