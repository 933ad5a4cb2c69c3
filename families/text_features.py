"""Encodes prompts to the text features of a transformer, for every family."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from families.prefix import Prefix
from families.tokens import TokenizedPrompt
from families.transfer import onto

if TYPE_CHECKING:
    from families.family import Family


def encode_prompts(
    family: "Family",
    prompts: Sequence[str],
    vectors: Mapping[str, Tensor] | None = None,
    prefix: Prefix | None = None,
) -> list[Tensor]:
    """As `Family.encode_prompts`: one text_LD per prompt.

    The language models are causal, so prompts of different lengths share a batch with padding on
    the right and need no mask.
    """
    vectors = vectors or {}
    tokenized = [family.tokenize(prompt, vectors) for prompt in prompts]
    limits = [min(len(each.ids), family.text_limit(each)) for each in tokenized]
    embeds_BLD = embed(family, tokenized, limits, vectors, prefix)
    before = prefix.cache(len(prompts)) if prefix is not None else None
    hidden_BLD = family.text_encoder(
        inputs_embeds=embeds_BLD, past_key_values=before, use_cache=prefix is not None
    ).last_hidden_state
    if prefix is not None:
        start_BPD = prefix.hidden_PD.expand(len(prompts), -1, -1)
        hidden_BLD = torch.cat((start_BPD, hidden_BLD), dim=1)
    return [
        hidden_LD[family._first_feature(each) : limit]
        for hidden_LD, each, limit in zip(hidden_BLD, tokenized, limits, strict=True)
    ]


def embed(
    family: "Family",
    tokenized: Sequence[TokenizedPrompt],
    limits: Sequence[int],
    vectors: Mapping[str, Tensor],
    prefix: Prefix | None = None,
) -> Tensor:
    """embeds_BLD of the first `limits` ids of each prompt, padded on the right, with the vectors
    of new tokens in place; without the ids of the prefix."""
    ids_BL = torch.zeros(len(tokenized), max(limits), dtype=torch.long)
    rows, columns, values = [], [], []
    for row, (each, limit) in enumerate(zip(tokenized, limits, strict=True)):
        ids_BL[row, :limit] = torch.tensor(each.ids[:limit])
        for column, token, index in each.new:
            if column < limit:
                ids_BL[row, column] = 0  # its embedding is overwritten below
                rows.append(row)
                columns.append(column)
                values.append(vectors[token][index])

    if prefix is not None:
        assert all(each.ids[: len(prefix.ids)] == prefix.ids for each in tokenized)
        ids_BL = ids_BL[:, len(prefix.ids) :]
        columns = [column - len(prefix.ids) for column in columns]
    embeds_BLD = family.text_encoder.get_input_embeddings()(onto(family.device, ids_BL))
    if values:
        at = onto(family.device, torch.tensor((rows, columns)))
        new = torch.stack(values).to(embeds_BLD)
        embeds_BLD = embeds_BLD.index_put(tuple(at), new)
    return embeds_BLD
