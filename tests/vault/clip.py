"""A small random CLIP of the real classes, in the Hub's layout."""

from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
)

CLIP = "openai/clip-vit-large-patch14"
_LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}


def write_clip(folder: Path) -> None:
    """Writes CLIP below `folder`, a `$MODEL_VAULT`. Its tokenizer knows letters, and no merges."""
    place = folder / CLIP
    letters = "abcdefghijklmnopqrstuvwxyz0123456789<>,.-"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer({word: i for i, word in enumerate(words)}, [], model_max_length=77)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    text = {"vocab_size": len(words), "eos_token_id": end, "intermediate_size": 64}
    vision = {"image_size": 32, "patch_size": 8, "intermediate_size": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(
            CLIPConfig(
                text_config=_LAYERS | text, vision_config=_LAYERS | vision, projection_dim=16
            )
        )
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(place)
