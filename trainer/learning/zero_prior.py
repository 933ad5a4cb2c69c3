"""Checks the placeholder token: it starts near zero, and the text encoder is not changed."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adapters.placeholder import Placeholder
from families.family import Family
from families.sharding import local

log = logging.getLogger(__name__)


class ZeroPriorBroken(RuntimeError):
    """A failed check of the placeholder token."""


class ZeroPriorProof:
    """Compares text encoder and placeholder tokens with their state before training."""

    def __init__(self, family: Family, placeholders: Sequence[Placeholder]) -> None:
        self.family, self.placeholders = family, placeholders
        known = family.prompts.known
        self.token_ids = range(known, known + len(placeholders))  # ids of added tokens
        self.norms_start = [each.norm() for each in placeholders]
        self._start = [each.detached().vectors for each in placeholders]
        self._before = fingerprint(family.text_encoder)

    def results(self, row_norms: Sequence[Sequence[float]]) -> list[dict[str, float]]:
        """The results of each token for the log and `meta.json`, after training.

        `row_norms` are the norms of each token's gradient in the steps with it. Raises
        `ZeroPriorBroken` if all were zero, or if the text encoder, including its embedding matrix,
        is not bit-identical.
        """
        after = fingerprint(self.family.text_encoder)
        changed = [name for name, value in after.items() if self._before[name] != value]
        if changed:
            raise ZeroPriorBroken(
                f"the text encoder changed in {len(changed)} tensors ({', '.join(changed[:3])})"
            )
        found = []
        for number, (placeholder, norms) in enumerate(
            zip(self.placeholders, row_norms, strict=True)
        ):
            if norms:
                check_gradient(placeholder, norms)
            moved = not torch.equal(placeholder.detached().vectors, self._start[number])
            found.append(
                {
                    "placeholder_token_id": self.token_ids[number],
                    "norm_start": self.norms_start[number],
                    "norm_end": placeholder.norm(),
                    "moved": moved,
                    "steps_with_placeholder": len(norms),
                    "largest_gradient_norm": max(norms, default=0.0),
                    "text_encoder_tensors_unchanged": len(after),
                }
            )
        return found


def check_gradient(placeholder: Placeholder, row_norms: Sequence[float]) -> None:
    """Raises `ZeroPriorBroken` if the gradient was zero in all steps with the token."""
    if not max(row_norms) > 0:
        raise ZeroPriorBroken(
            f"the gradient of {placeholder.token} was zero in every step with it "
            f"({len(row_norms)} steps), so its embedding is not trained"
        )


def fingerprint(module: nn.Module) -> dict[str, int]:
    """A 64-bit sum over the bits of every tensor, weighted by position.

    Runs on the weights' device, at memory bandwidth; any single changed bit changes it.
    Of a sharded module, of the part in this process.
    """
    return {name: _bit_sum(local(tensor)) for name, tensor in module.state_dict().items()}


# Values in a part that is summed at once, by kind of device; 2 MB stay in a CPU's cache.
CHUNKS = {"cpu": 1 << 18, "cuda": 1 << 24}


def _bit_sum(tensor: Tensor) -> int:
    chunk = CHUNKS.get(tensor.device.type, 1 << 24)
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().contiguous().view(integers[tensor.element_size()]).flatten()
    total = 0
    for start in range(0, len(bits), chunk):
        part = bits[start : start + chunk].to(torch.int64)
        # Odd factors are invertible modulo 2^64, where the sums wrap: no bit is lost.
        weight = torch.arange(start + 1, start + 1 + len(part), device=part.device) * 2 - 1
        total += int((part * weight).sum().item())
    return total % (1 << 64)  # so that it is the same on each device
