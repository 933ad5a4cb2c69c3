"""The processors of diffusers' pipelines without their video part, which needs torchvision.

Text and images become ids and pixels as by Qwen2VLProcessor and Qwen3VLProcessor.
"""

from collections.abc import Sequence
from typing import Any

from transformers import BatchFeature, Qwen2Tokenizer

SLOT = "<|image_pad|>"


class StockProcessor:
    """A tokenizer and an image processor, which text alone does not need."""

    def __init__(self, tokenizer: Qwen2Tokenizer, images: Any = None) -> None:
        self.tokenizer = tokenizer
        self.images = images

    def __call__(self, text: Sequence[str], images: Any = None, **options: Any) -> BatchFeature:
        seen: dict[str, Any] = {}
        if images is not None:
            seen = dict(self.images(images=images, return_tensors="pt"))
            counts = iter((seen["image_grid_thw"].prod(-1) // self.images.merge_size**2).tolist())
            text = [self._with_slots(each, counts) for each in text]
        ids = self.tokenizer(text, **options)
        slot = self.tokenizer.convert_tokens_to_ids(SLOT)
        types = (ids["input_ids"] == slot).int()
        return BatchFeature({**ids, **seen, "mm_token_type_ids": types})

    def _with_slots(self, text: str, counts: Any) -> str:
        before, *rest = text.split(SLOT)
        return before + "".join(SLOT * next(counts) + each for each in rest)

    def apply_chat_template(self, messages: list[Any], **_: Any) -> list[list[int]]:
        [turn] = messages
        text = turn["content"][0]["text"]
        return [self.tokenizer(f"<|im_start|>{turn['role']}\n{text}<|im_end|>\n").input_ids]
