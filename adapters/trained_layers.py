"""Linear layers with a trained change of their weight, one class for each form.

Parameters are float32 and named as in files; products are computed in the dtype of the input.
PEFT's layers of LoKr, LoHa and DoRA multiply dW out in each pass, and autograd keeps it for LoKr
and LoHa: the memory of a second transformer. Here the factors are multiplied with the input, where
that is less. Tests compare the results with PEFT's.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.formats import Delta, Dora, Hadamard, LowRank, delta_of
from adapters.forms import Form
from families.frozen_linear import FrozenLinear


class TrainedLinear(nn.Module):
    """A frozen linear layer plus a trained change; `base_layer` may be quantized or offloaded."""

    def __init__(self, base: nn.Linear, form: Form) -> None:
        super().__init__()
        self.base_layer = base
        self.in_features, self.out_features = base.in_features, base.out_features
        device = base.device if isinstance(base, FrozenLinear) else base.weight.device
        shapes = form.shapes(base.out_features, base.in_features)
        self.names = tuple(shapes)
        for name, shape in shapes.items():
            # Float32 on any base: bfloat16 loses most updates.
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device)))

    @property
    def weight(self) -> Tensor:
        """The base's weight; models read its dtype."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    @property
    def parts(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""
        return {name: cast(nn.Parameter, getattr(self, name)) for name in self.names}

    def delta(self) -> Delta:
        """A copy of the change, float32 on the CPU."""
        return delta_of({name: each.detach().cpu().clone() for name, each in self.parts.items()})

    def base_weight(self) -> Tensor:
        """The frozen weight in float32; a quantized one is dequantized."""
        base = self.base_layer
        if isinstance(base, FrozenLinear):
            return base.dequantized(torch.float32)
        return base.weight.float()

    def change(self) -> tuple[float, float]:
        """|dW| and |W|, of the frozen weight."""
        norm = self.delta().norm()
        assert norm is not None
        return norm, self.base_weight().norm().item()

    @torch.no_grad()
    def start(self, generator: torch.Generator, original: Tensor | None) -> None:
        """Sets values for which dW = 0; `original` as in `Lora`."""
        raise NotImplementedError

    @torch.no_grad()
    def undo(self) -> None:
        """Sets values for which dW = 0, without random numbers."""
        for each in self.parts.values():
            each.zero_()


class LoraLinear(TrainedLinear):
    """y = x (W + B A)^T. A starts uniformly in +-1/sqrt(in), PyTorch's initialization; B = 0."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    @property
    def down(self) -> nn.Parameter:
        """A, [rank, in]."""
        return self.lora_A

    @property
    def up(self) -> nn.Parameter:
        """B, [out, rank]."""
        return self.lora_B

    @torch.no_grad()
    def start(self, generator: torch.Generator, original: Tensor | None) -> None:
        self.down.copy_(_uniform(self.down, generator))
        self.up.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return _plus(self.base_layer(x), x, self.lora_A, self.lora_B)


class DoraLinear(LoraLinear):
    """y = x (s (W + B A))^T, where s scales each row to the trained norm `magnitude`.

    `magnitude` [out, 1], which files contain, starts as the norms of the rows of the weight that
    inference uses. If W is another one (quantized, or with a training adapter), a row's norm is
    `magnitude` times the quotient of both norms, so that at the start nothing changes on either.
    The norm of W + B A has no gradient, as in the paper (section 4.3).
    """

    magnitude: nn.Parameter
    squares: Tensor  # of the rows' norms of W, [out]
    norms: Tensor  # of the rows of the weight that inference uses, [out]
    ratio: Tensor  # of the first norms to the second, [out]

    @torch.no_grad()
    def start(self, generator: torch.Generator, original: Tensor | None) -> None:
        super().start(generator, original)
        trained = self.base_weight().norm(dim=1)
        norms = trained if original is None else original.to(trained).norm(dim=1)
        self.register_buffer("squares", trained.square(), persistent=False)
        self.register_buffer("norms", norms, persistent=False)
        self.register_buffer("ratio", _quotient(trained, norms), persistent=False)
        self.undo_magnitude()

    def undo(self) -> None:
        super().undo()
        self.undo_magnitude()

    def change(self) -> tuple[float, float]:
        weight = self.base_weight()
        magnitude = self.magnitude.detach() * self.ratio[:, None]
        dora = Dora(LowRank(self.down.detach(), self.up.detach()), magnitude)
        total = torch.zeros_like(weight)
        dora.add_to(total, weight, 1.0)
        return total.norm().item(), weight.norm().item()

    @torch.no_grad()
    def undo_magnitude(self) -> None:
        """Sets the norms to those of the original weight."""
        self.magnitude.copy_(self.norms[:, None])

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        # s - 1 in the input's dtype, since s itself is near 1, where bfloat16 is coarse.
        scale = self.magnitude[:, 0] * _quotient(self.ratio, self._norms(x.dtype))
        changed = _plus(result, x, self.lora_A, self.lora_B * scale[:, None])
        bias = self.base_layer.bias
        plain = result if bias is None else result - bias
        return torch.addcmul(changed, plain, (scale - 1).to(x.dtype))

    @torch.no_grad()
    def _norms(self, dtype: torch.dtype) -> Tensor:
        """The norms of the rows of W + B A: |w|^2 + 2 b (A w) + b (A A^T) b^T for each."""
        product = self.base_layer(self.lora_A.to(dtype))  # [rank, out], of any stored weight
        if self.base_layer.bias is not None:
            product = product - self.base_layer.bias
        down, up = self.lora_A, self.lora_B
        both = 2 * product.T.float() + up @ (down @ down.T)
        squares = self.squares + (up * both).sum(dim=1)
        return squares.clamp_min(0).sqrt()


class LokrLinear(TrainedLinear):
    """y = x (W + kron(w1, w2))^T. w1 starts uniformly, w2 (or its first factor) as 0.

    As in LyCORIS, so that the first gradients reach all values of w2, not the few of w1.
    """

    @torch.no_grad()
    def start(self, generator: torch.Generator, original: Tensor | None) -> None:
        for name, each in self.parts.items():
            each.copy_(_uniform(each, generator))
            if name in ("lokr_w2", "lokr_w2_a"):
                each.zero_()

    def forward(self, x: Tensor) -> Tensor:
        w1, *factors = self.parts.values()
        w2 = factors[0] if len(factors) == 1 else factors[0] @ factors[1]
        product = _Kronecker.apply(x, w1.to(x.dtype), w2.to(x.dtype))
        return self.base_layer(x) + cast(Tensor, product)


class _Kronecker(torch.autograd.Function):
    """x kron(w1, w2)^T. Saves only its arguments; the product with w2 is as large as the output.

    Legend: M, N of the input (in = M N), L, K of the output (out = L K), R rows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *factors: Tensor) -> Tensor:
        w1_LM, w2_KN = factors
        ctx.save_for_backward(x, w1_LM, w2_KN)
        inner_RMK = _halves(x, w1_LM, w2_KN) @ w2_KN.T
        return torch.einsum("lm,rmk->rlk", w1_LM, inner_RMK).reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x, w1_LM, w2_KN = ctx.saved_tensors
        x_RMN = _halves(x, w1_LM, w2_KN)
        grad_RLK = grads[0].reshape(-1, len(w1_LM), len(w2_KN))
        grad_w1 = torch.einsum("rlk,rmk->lm", grad_RLK, x_RMN @ w2_KN.T)
        inner_RMK = torch.einsum("lm,rlk->rmk", w1_LM, grad_RLK)
        grad_w2 = inner_RMK.flatten(0, 1).T @ x_RMN.flatten(0, 1)
        return (inner_RMK @ w2_KN).view_as(x), grad_w1, grad_w2


def _halves(x: Tensor, w1_LM: Tensor, w2_KN: Tensor) -> Tensor:
    """The input [..., in] as [rows, M, N]."""
    return x.reshape(-1, w1_LM.shape[1], w2_KN.shape[1])


class LohaLinear(TrainedLinear):
    """y = x (W + (B1 A1) * (B2 A2))^T. B2 starts as 0, A2 as that of a LoRA.

    The entries of B1 A1 have a standard deviation of 1 at the start, so that dW grows as a LoRA's
    at the same learning rate.
    """

    @torch.no_grad()
    def start(self, generator: torch.Generator, original: Tensor | None) -> None:
        up1, down1, up2, down2 = self.parts.values()
        down1.copy_(torch.empty(down1.shape).normal_(generator=generator))
        up1.copy_(torch.empty(up1.shape).normal_(generator=generator) * up1.shape[1] ** -0.5)
        down2.copy_(_uniform(down2, generator))
        up2.zero_()

    def forward(self, x: Tensor) -> Tensor:
        up1, down1, up2, down2 = self.parts.values()
        result = self.base_layer(x)
        rank = len(down1) * len(down2)
        if rank < min(self.in_features, self.out_features):
            return _plus(result, x, *Hadamard((up1, down1), (up2, down2)).low_rank())
        return result + F.linear(x, ((up1 @ down1) * (up2 @ down2)).to(x.dtype))


LAYERS = {"lora": LoraLinear, "dora": DoraLinear, "lokr": LokrLinear, "loha": LohaLinear}


def _plus(result: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """result + x (up down)^T."""
    down, up = down.to(x.dtype), up.to(x.dtype)
    flat = torch.addmm(result.flatten(0, -2), x.flatten(0, -2) @ down.T, up.T)
    return flat.view_as(result)


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Values in +-1/sqrt(columns), on the CPU: they depend only on the generator."""
    bound = like.shape[1] ** -0.5
    return torch.empty(like.shape).uniform_(-bound, bound, generator=generator)


def _quotient(value: Tensor, by: Tensor) -> Tensor:
    """value / by; 1 where `by` is zero, since a row of zeros has no direction."""
    return torch.where(by > 0, value / by, 1.0)
