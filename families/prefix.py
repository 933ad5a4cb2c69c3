"""The tokens that many prompts begin with, read by the language model once.

A causal model's states of a token depend on those before it alone. So what it makes of a common
beginning (system prompt, template, the same first words) can be kept, as keys and values of every
layer, and read by what comes after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from families.tokens import TokenizedPrompt


@dataclass(frozen=True)
class Prefix:
    """What a language model made of `ids`, without a gradient."""

    ids: tuple[int, ...]
    hidden_PD: Tensor  # last hidden states
    layers: tuple[tuple[Tensor, Tensor], ...]  # keys and values of each, [1, heads, P, head]

    def cache(self, batch: int) -> DynamicCache:
        """Keys and values for so many prompts, in a cache of their own that may grow."""
        return DynamicCache(
            tuple(each.expand(batch, -1, -1, -1) for each in layer) for layer in self.layers
        )


def common_ids(prompts: Sequence[TokenizedPrompt]) -> tuple[int, ...]:
    """The ids that all prompts begin with, up to the first new word; each keeps one for itself."""
    known = [each.ids[: min((at for at, *_ in each.new), default=None)] for each in prompts]
    shortest = min(len(each.ids) for each in prompts) - 1
    return tuple(commonprefix(known))[:shortest]


@torch.no_grad()
def read_prefix(text_encoder: Any, ids: Sequence[int]) -> Prefix:
    """What a language model makes of tokens that prompts will begin with, at least one."""
    embed = text_encoder.get_input_embeddings()
    embeds_1PD = embed(torch.tensor([list(ids)], device=embed.weight.device))
    cache: Any = DynamicCache()
    called = text_encoder(inputs_embeds=embeds_1PD, past_key_values=cache, use_cache=True)
    layers = tuple((layer.keys, layer.values) for layer in cache.layers)
    return Prefix(tuple(ids), called.last_hidden_state[0], layers)
