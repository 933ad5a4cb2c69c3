"""The forms of a trained change dW of a linear layer's weight [out, in].

lora   dW = B A (Hu et al. 2021, arXiv 2106.09685)
dora   LoRA with a trained norm of each row of W + dW (Liu et al. 2024, arXiv 2402.09353)
lokr   dW = kron(w1, w2), whole matrices; with a rank, w2 is a product (Yeh et al. 2023,
       arXiv 2309.14859)
loha   dW = (B1 A1) * (B2 A2), elementwise (Hyeon-Woo et al. 2021, arXiv 2108.06098)

The computing layers are in `adapters.trained_layers`. Imports no PyTorch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

TITLES = {"lora": "LoRA", "dora": "DoRA", "lokr": "LoKr", "loha": "LoHa"}
FACTOR = 8  # of LoKr: for a layer of 3840 x 3840 as many values as a LoRA of rank 30
MOST_RANK = 64  # of LoHa, whose dW may have the square of it as rank


@dataclass(frozen=True)
class Form:
    """The form of a trained change, and what its size depends on."""

    kind: str = "lora"
    rank: int = 0  # 0 only for LoKr: w2 is whole
    factor: int = FACTOR  # of LoKr: the largest size of w1

    def __str__(self) -> str:
        title = TITLES[self.kind]
        rank = f"rank {self.rank}" if self.rank else ""
        factor = f"factor {self.factor}" if self.kind == "lokr" else ""
        return f"{title} of {' and '.join(filter(None, (factor, rank)))}"

    @property
    def title(self) -> str:
        return TITLES[self.kind]

    @property
    def facts(self) -> dict[str, str | int]:
        """What meta.json and checkpoints say of it; of a plain LoRA only the rank."""
        found: dict[str, str | int] = {"rank": self.rank} if self.rank else {}
        if self.kind != "lora":
            found["adapter"] = self.kind
        return found | ({"lokr_factor": self.factor} if self.kind == "lokr" else {})

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "Form":
        """From such facts; those of a full training give a LoRA of rank 0."""
        return cls(
            facts.get("adapter", "lora"), facts.get("rank", 0), facts.get("lokr_factor", FACTOR)
        )

    @property
    def needs_base(self) -> bool:
        """Whether dW depends on the weight."""
        return self.kind == "dora"

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[int, int]]:
        """The shapes of the trained parts of a layer [rows, columns], by names as in files."""
        rank = self.rank
        if self.kind == "loha":
            names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
            return dict(zip(names, ((rows, rank), (rank, columns)) * 2, strict=True))
        if self.kind == "lokr":
            up, down = divisor(rows, self.factor), divisor(columns, self.factor)
            w2 = rows // up, columns // down
            if not 0 < rank < max(w2) / 2:  # as in PEFT and LyCORIS
                return {"lokr_w1": (up, down), "lokr_w2": w2}
            factors = {"lokr_w2_a": (w2[0], rank), "lokr_w2_b": (rank, w2[1])}
            return {"lokr_w1": (up, down), **factors}
        pair = {"lora_A": (rank, columns), "lora_B": (rows, rank)}
        return pair | ({"magnitude": (rows, 1)} if self.kind == "dora" else {})

    def values(self, weights: Iterable[Sequence[int]]) -> int:
        """The number of trained values in layers with weights of these shapes."""
        shapes = (each for rows, columns in weights for each in self.shapes(rows, columns).values())
        return sum(rows * columns for rows, columns in shapes)


def as_form(form: Form | int) -> Form:
    """A number is the rank of a plain LoRA."""
    return Form(rank=form) if isinstance(form, int) else form


def divisor(size: int, most: int) -> int:
    """The largest divisor of `size` up to `most` and its square root."""
    return next(each for each in range(min(most, isqrt(size)), 0, -1) if size % each == 0)
