"""Text features of prompts that came before, so that a repeated prompt reads nothing again."""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor

from families.family import Family
from families.tokens import split_words

BUDGET = 256 << 20  # bytes, on the family's device; a long prompt of Qwen-Image takes 7 MB


class TextCache:
    """The least recently used features go first. One thread at a time."""

    def __init__(self, budget: int = BUDGET) -> None:
        self.budget = budget
        self._features: OrderedDict[tuple, Tensor] = OrderedDict()
        self._bytes = 0

    def encode(self, family: Family, prompt: str, vectors: Mapping[str, Tensor]) -> Tensor:
        """text_LD of the prompt; `vectors` as for `Family.encode_prompts`.

        Two prompts are the same if base, type, text, and the rows of the new words in it are.
        """
        present = sorted(set(split_words(prompt, vectors)) & set(vectors))
        words = tuple((word, digest(vectors[word])) for word in present)
        key = (family.base.hub_id, family.base.folder, family.dtype, prompt, words)
        found = self._features.get(key)
        if found is not None:
            self._features.move_to_end(key)
            return found
        (text_LD,) = family.encode_prompts([prompt], vectors)
        self._features[key] = text_LD = text_LD.clone()  # not a view into a padded batch
        self._bytes += text_LD.nbytes
        while self._bytes > self.budget and len(self._features) > 1:
            _, oldest = self._features.popitem(last=False)
            self._bytes -= oldest.nbytes
        return text_LD


def digest(tensor: Tensor) -> str:
    """SHA-256 of the values, as float32, in hexadecimal."""
    values = tensor.detach().float().cpu().contiguous().numpy()
    return hashlib.sha256(values.tobytes()).hexdigest()
