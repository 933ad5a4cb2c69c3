"""python -m lab.benchmarks.go_fast: what `go_fast` saves and what it costs, on the miniature.

Draws the judge's prompts with guidance in every step, in the first half of them, and in none.
`right` is the share of images that show everything asked for; `near` is the median PSNR to the
fully guided image of the same seed; `passes` counts runs of the transformer for one image, and
the seconds are the processor's.
"""

import argparse
import time

import torch

from families.loading import load_family
from families.registry import BASES
from inference.generation import generate
from inference.request import Request, resolve
from miniature.evaluate import measure, nearness
from miniature.world import evaluation_prompts

WAYS: dict[str, dict] = {
    "guidance in every step": {},
    "go_fast": {"go_fast": True},
    "no guidance": {"guidance_scale": 1.0},
}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200)
    images = parser.parse_args().images
    prompts = [caption.text for caption in evaluation_prompts(images)]

    family = load_family(BASES["miniature"])
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    family.transformer.register_forward_hook(count)
    guided = None
    for name, options in WAYS.items():
        passes, start, pictures = 0, time.process_time(), []
        for seed, prompt in enumerate(prompts):
            request = Request(prompt=prompt, seed=seed, **options)
            pictures += generate(family, resolve(request, family.base, family.resolution_multiple))
        seconds = (time.process_time() - start) / images
        guided = guided or pictures
        near = "" if guided is pictures else f", near {nearness(pictures, guided):.1f} dB"
        print(
            f"{name}: {passes / images:.0f} passes, {seconds:.3f} s, "
            f"right {measure(pictures)['all']:.1%}{near}"
        )


if __name__ == "__main__":
    main()
