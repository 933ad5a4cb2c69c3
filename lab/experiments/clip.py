"""What CLIP and LPIPS see in photographs, where the miniature's judge sees nothing.

B images, D features.
"""

import importlib.util
from collections.abc import Sequence
from functools import cache

import torch
from PIL import Image
from torch import Tensor, nn

from families.loading import default_device
from families.repository import download, model_folder
from miniature.images import to_tensor

HUB_ID = "openai/clip-vit-large-patch14"
SMALLER = 256  # pixels of the shorter side for LPIPS, whose network was trained on small images


class Clip:
    """Features of unit length (Radford et al. 2021): their product is the similarity, -1 to 1.

    Its folder lies in `$MODEL_VAULT` by its Hub id, or comes from the Hub.
    """

    def __init__(self) -> None:
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        models = model_folder()
        folder = models / HUB_ID if models is not None else None
        if folder is None or not folder.is_dir():
            folder = download(HUB_ID, ["*.json", "*.txt", "model.safetensors"])
        self._device = default_device()
        self._model = CLIPModel.from_pretrained(folder, use_safetensors=True).eval()
        self._model.to(self._device)
        self._pixels = CLIPImageProcessorPil.from_pretrained(folder)
        self._tokenizer = CLIPTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Features [B, D] of images."""
        pixels = self._pixels(list(pictures), return_tensors="pt").to(self._device)
        seen = self._model.vision_model(**pixels).pooler_output
        return _unit(self._model.visual_projection(seen))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features [B, D] of texts, cut at 77 tokens."""
        ids = self._tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True)
        read = self._model.text_model(**ids.to(self._device)).pooler_output
        return _unit(self._model.text_projection(read))


def has_lpips() -> bool:
    """Whether the package is installed; its weights come with it and with torchvision."""
    return importlib.util.find_spec("lpips") is not None


def lpips(some: Sequence[Image.Image], others: Sequence[Image.Image]) -> list[float]:
    """Perceptual distance of each image to its partner (Zhang et al. 2018, AlexNet)."""
    network = _network()
    pairs = zip(map(_small, some), map(_small, others), strict=True)
    with torch.no_grad():
        return [float(network(one, other)) for one, other in pairs]


@cache
def _network() -> nn.Module:
    from lpips import LPIPS

    return LPIPS(net="alex", verbose=False).eval().to(default_device())


def _small(picture: Image.Image) -> Tensor:
    share = SMALLER / min(picture.size)
    if share < 1:
        width, height = (round(side * share) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return to_tensor([picture]).to(default_device())


def _unit(features_BD: Tensor) -> Tensor:
    return (features_BD / features_BD.norm(dim=-1, keepdim=True)).float().cpu()
