"""Measures of images, and of a LoRA's weights.

B batch, C channels, H rows, W columns.
"""

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from adapters.formats.factors import Factors
from lab.experiments.prompts import Prompt
from miniature.drawing import render
from miniature.evaluate import features, frechet
from miniature.images import to_tensor
from miniature.judge import load_judge
from miniature.likeness import likeness
from miniature.world import sample_scene

Scores = dict[str, list[float]]  # one number per image

BLEED = 0.6  # likeness above which an image shows the subject

_LAPLACE = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
_LUMA = torch.tensor([0.299, 0.587, 0.114])  # ITU-R BT.601


def adherence(pictures: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
    """How many attributes each prompt asks for, and how many the judge finds right."""
    seen = load_judge().read(pictures)
    right = [
        sum(view.get(key) == value for key, value in prompt.asked.items())
        for view, prompt in zip(seen, prompts, strict=True)
    ]
    return {"right": [float(n) for n in right], "asked": [float(len(p.asked)) for p in prompts]}


def fully_right(pictures: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[float]:
    """1 where the judge finds all attributes that the prompt asks for, else 0."""
    scores = adherence(pictures, prompts)
    return [float(a == b) for a, b in zip(scores["right"], scores["asked"], strict=True)]


def bleed(pictures: Sequence[Image.Image], prompts: Sequence[Prompt], subject: str) -> list[float]:
    """1 where the image of a prompt without the subject shows it, else 0."""
    return [float(each > BLEED) for each in subject_scores(pictures, prompts, subject)]


def subject_scores(
    pictures: Sequence[Image.Image], prompts: Sequence[Prompt], subject: str
) -> list[float]:
    """Likeness to the subject in the colour that was asked for, 0 to 1."""
    pairs = zip(pictures, prompts, strict=True)
    return [likeness([picture], subject, prompt.colour)[0] for picture, prompt in pairs]


def sharpness(pictures: Sequence[Image.Image]) -> list[float]:
    """Variance of the Laplacian of the luminance, pixels in [-1, 1]."""
    luma_BHW = torch.einsum("bchw,c->bhw", to_tensor(pictures), _LUMA)
    edges_B1HW = F.conv2d(luma_BHW[:, None], _LAPLACE[None, None])
    return edges_B1HW.flatten(1).var(dim=1).tolist()


def tones(pictures: Sequence[Image.Image]) -> Scores:
    """Mean (`brightness`) and standard deviation (`contrast`) of the luminance, in [-1, 1]."""
    luma_BHW = torch.einsum("bchw,c->bhw", to_tensor(pictures), _LUMA)
    return {
        "brightness": luma_BHW.mean(dim=(1, 2)).tolist(),
        "contrast": luma_BHW.flatten(1).std(dim=1).tolist(),
    }


def looks(pictures: Sequence[Image.Image]) -> list[str]:
    """Shape and colour that the judge sees of each image's only or left thing: `star purple`."""
    seen = load_judge().read(pictures)
    return [
        " ".join(view.get(key) or view[f"left.{key}"] for key in ("shape", "colour"))
        for view in seen
    ]


def diversity(pictures: Sequence[Image.Image]) -> float:
    """Mean distance of images of one prompt to each other, in the judge's features.

    It takes the place of LPIPS (Zhang et al. 2018), whose weights are not at hand everywhere and
    were learned on photographs.
    """
    apart = features(load_judge(), list(pictures))
    return float(torch.nn.functional.pdist(apart).mean())


def drift(pictures: Sequence[Image.Image], untouched: Sequence[Image.Image]) -> Scores:
    """How far images are from the untouched base's of the same prompts and seeds.

    `pixels` is the root mean square of the difference, pixels in [-1, 1]; `features` the
    distance in the judge's features.
    """
    difference = to_tensor(pictures) - to_tensor(untouched)
    judge = load_judge()
    apart = features(judge, list(pictures)) - features(judge, list(untouched))
    return {
        "pixels": difference.square().mean(dim=(1, 2, 3)).sqrt().tolist(),
        "features": apart.norm(dim=1).tolist(),
    }


@cache
def _renderings() -> Tensor:
    return features(load_judge(), [render(sample_scene(i, "eval")) for i in range(1000)])


def distance(pictures: Sequence[Image.Image]) -> float:
    """Frechet distance of the judge's features to those of 1,000 held-out renderings.

    It grows as images get fewer: only equal numbers of images can be compared.
    """
    return frechet(features(load_judge(), list(pictures)), _renderings())


def trace_of(factors: Factors, adapter: Factors, layers: dict[str, Tensor]) -> dict[str, float]:
    """What a LoRA's weights have in common with an adapter's, over the layers of both.

    `share` is the part of the adapter that the LoRA contains: its projection on the adapter, as a
    multiple of it. `cosine` is the angle between the two, `size` the LoRA's norm over that of
    the base's `layers`.
    """
    product = lora = other = base = 0.0
    for name in factors.keys() & adapter.keys():
        learned = factors[name][1].float() @ factors[name][0].float()
        given = adapter[name][1].float() @ adapter[name][0].float()
        product += float((learned * given).sum())
        lora, other = lora + float(learned.square().sum()), other + float(given.square().sum())
        base += float(layers[name].float().square().sum())
    return {
        "share": product / other,
        "cosine": product / (lora * other) ** 0.5 if lora else 0.0,
        "size": (lora / base) ** 0.5,
    }
