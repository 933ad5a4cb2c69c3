"""Encodes the common beginning of many prompts once.

A causal model's states of a token depend only on the tokens before it. So the keys and values of a
common beginning (system prompt, template, the same first words) can be computed once and reused for
every prompt.
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
    """A language model's states for `ids`, without a gradient."""

    ids: tuple[int, ...]
    hidden_PD: Tensor  # last hidden states
    layers: tuple[tuple[Tensor, Tensor], ...]  # keys and values of each, [1, heads, P, head]

    def cache(self, batch: int) -> DynamicCache:
        """Keys and values for `batch` prompts, as a new cache that may grow."""
        return DynamicCache(
            tuple(each.expand(batch, -1, -1, -1) for each in layer) for layer in self.layers
        )


def common_ids(prompts: Sequence[TokenizedPrompt]) -> tuple[int, ...]:
    """The ids that all prompts begin with, up to the first new token; never a whole prompt."""
    known = [each.ids[: min((at for at, *_ in each.new), default=None)] for each in prompts]
    shortest = min(len(each.ids) for each in prompts) - 1
    return tuple(commonprefix(known))[:shortest]


@torch.no_grad()
def read_prefix(text_encoder: Any, ids: Sequence[int]) -> Prefix:
    """Encodes the tokens that prompts will begin with, at least one."""
    embed = text_encoder.get_input_embeddings()
    embeds_1PD = embed(torch.tensor([list(ids)], device=embed.weight.device))
    cache: Any = DynamicCache()
    called = text_encoder(inputs_embeds=embeds_1PD, past_key_values=cache, use_cache=True)
    layers = tuple((layer.keys, layer.values) for layer in cache.layers)
    return Prefix(tuple(ids), called.last_hidden_state[0], layers)
