"""An LRU cache of text features, so that repeated prompts are not encoded again."""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor

from families.family import Family
from families.references import References
from families.tokens import split_words

BUDGET = 256 << 20  # bytes, on the family's device; a long prompt of Qwen-Image takes 7 MB


class TextCache:
    """Text features within a budget of bytes, with LRU eviction. Not thread-safe."""

    def __init__(self, budget: int = BUDGET) -> None:
        self.budget = budget
        self._features: OrderedDict[tuple, Tensor] = OrderedDict()
        self._bytes = 0

    def encode(
        self,
        family: Family,
        prompt: str,
        vectors: Mapping[str, Tensor],
        references: References | None = None,
    ) -> Tensor:
        """text_LD of the prompt; `vectors` as for `Family.encode_prompts`.

        The key is base, dtype, quantization, text, the vectors of the new tokens in it, and the
        reference images.
        """
        present = sorted(set(split_words(prompt, vectors)) & set(vectors))
        tokens = tuple((token, digest(vectors[token])) for token in present)
        base, stored = family.base, family.storage.quantize_text
        images = references.digest if references else ""
        key = (base.hub_id, base.folder, family.dtype, stored, prompt, tokens, images)
        found = self._features.get(key)
        if found is not None:
            self._features.move_to_end(key)
            return found
        if references is None:
            (text_LD,) = family.encode_prompts([prompt], vectors)
        else:
            text_LD = family.encode_edit(prompt, references, vectors)
        self._features[key] = text_LD = text_LD.clone()  # not a view into a padded batch
        self._bytes += text_LD.nbytes
        while self._bytes > self.budget and len(self._features) > 1:
            _, oldest = self._features.popitem(last=False)
            self._bytes -= oldest.nbytes
        return text_LD


def digest(tensor: Tensor) -> str:
    """SHA-256 of the values as float32, in hexadecimal."""
    values = tensor.detach().float().cpu().contiguous().numpy()
    return hashlib.sha256(values.tobytes()).hexdigest()
