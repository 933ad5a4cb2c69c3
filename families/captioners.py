"""The vision-language models that write captions. Imports no PyTorch.

A base model whose text encoder sees images (`Family.sees_images`) uses that one, so nothing more is
downloaded. The others use a small model of `CAPTIONERS`.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from families.base import Base, Config
from families.registry import family_of
from families.repository import (
    component_folder,
    is_in_hub_cache,
    is_on_disk,
    local_model_folder,
    single_model_folder,
)

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Question:
    """A question about images."""

    text: str
    images: Sequence["Image"]  # upright RGB, in the order of the question
    pixels: int  # each image is scaled to at most so many


@dataclass(frozen=True)
class Answer:
    """The answer to a question."""

    text: str
    finished: bool  # ended by the model itself, not by the limit of its length


@dataclass(frozen=True, kw_only=True)
class Captioner:
    """A vision-language model, and where its files are."""

    name: str
    hub_id: str  # ORG/NAME on the Hub, and below $MODEL_VAULT
    revision: str = ""  # commit on the Hub
    download: float | None = None  # GB
    base: Base | None = None  # the model is the text encoder of this base
    folder: Path | None = None  # a folder that the user named
    published: Config = field(default_factory=dict)  # config.json, without the class's defaults

    def model_folder(self) -> Path:
        """The folder of config and weights, downloaded if needed. Raises `MissingModel`."""
        if self.base is not None:
            return component_folder(self.base, "text_encoder")
        return self.folder or single_model_folder(self.hub_id, self.revision)

    def tokenizer_folder(self) -> Path:
        """The folder of the tokenizer, downloaded if needed. Raises `MissingModel`."""
        if self.base is not None:
            return component_folder(self.base, family_of(self.base).tokenizer_folder)
        return self.model_folder()

    def local_folder(self) -> Path | None:
        """The model's folder if it is on this machine outside the Hub's cache."""
        return None if self.base is not None else self.folder or local_model_folder(self.hub_id)

    def is_on_disk(self) -> bool:
        """Whether its files are on this machine, so that nothing has to be downloaded."""
        if self.base is not None:
            return is_on_disk(self.base)
        return self.local_folder() is not None or is_in_hub_cache(self.hub_id, self.revision)

    @property
    def identity(self) -> str:
        """Model and revision, for the log of captions."""
        return f"{self.hub_id}@{self.revision}" if self.revision else self.hub_id


def _qwen3_vl(layers: int, heads: int, width: int, feed_forward: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3_vl",
        "text_config": {
            "vocab_size": 151936,
            "hidden_size": width,
            "intermediate_size": feed_forward,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
        "vision_config": {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "out_hidden_size": width,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        "tie_word_embeddings": True,
    }


# Both are under Apache-2.0 and follow instructions. The larger Qwen2.5-VL-3B is for research only.
ON_GPU = Captioner(
    name="qwen3-vl-4b",
    hub_id="Qwen/Qwen3-VL-4B-Instruct",
    revision="ebb281ec70b05090aa6165b016eac8ec08e71b17",
    download=8.9,
    published=_qwen3_vl(36, 32, 2560, 9728),
)
ON_CPU = Captioner(
    name="qwen3-vl-2b",
    hub_id="Qwen/Qwen3-VL-2B-Instruct",
    revision="89644892e4d85e24eaac8bacfd4f463576704203",
    download=4.3,
    published=_qwen3_vl(28, 16, 2048, 6144),
)
CAPTIONERS: Mapping[str, Captioner] = {each.name: each for each in (ON_GPU, ON_CPU)}


class UnknownCaptioner(ValueError):
    """A name that is neither a known captioner nor a folder with a model."""


def captioner_of(base: Base, gpu: bool) -> Captioner:
    """The captioner that a base model uses by default, on a GPU or without one."""
    if family_of(base).sees_images:
        name = f"the text encoder of {base.name}"
        hub_id = f"{base.hub_id}/text_encoder"
        return Captioner(name=name, hub_id=hub_id, download=base.download, base=base)
    return ON_GPU if gpu else ON_CPU


def find_captioner(name: str) -> Captioner:
    """The captioner that a user names: a short name, a Hub id, or a local folder.

    Raises `UnknownCaptioner`.
    """
    for each in CAPTIONERS.values():
        if name in (each.name, each.hub_id):
            return each
    folder = Path(name).expanduser().absolute()
    if (folder / "config.json").is_file():
        return Captioner(name=folder.name, hub_id=folder.name, folder=folder)
    near = difflib.get_close_matches(name[:100], CAPTIONERS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UnknownCaptioner(
        f"model {name[:100]!r} is neither one of {', '.join(CAPTIONERS)} nor a folder with a "
        f"config.json{hint}"
    )
