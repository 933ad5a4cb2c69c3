"""How frozen weights are stored as plain tensors, dequantized and multiplied with.

The libraries quantize; from then on a layer has their plain tensors, which are copied to a GPU
without waiting, and which a compiled graph takes as its inputs. Dequantized values equal the
libraries' bit for bit.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0
FLOAT8_CAPABILITY = (8, 9)  # NVIDIA's Ada and later
FLOAT8_MULTIPLE = 16  # rows and columns of a weight, in `torch._scaled_mm`
_SMALLEST = 1e-30  # largest value of a token that is all zeros

Shape = tuple[int, int]


@dataclass(frozen=True)
class Packing:
    """One way to store a weight [out, in]: its packed values, and small tensors beside them.

    `dequantize` gets the shape and the dtype of the weight before it was quantized, and these. All
    of them may have one more dimension of size 1 in front, which the result has too.
    """

    unpack: Callable[[Any], tuple[Tensor, ...]]  # the values are the first
    dequantize: Callable[[Shape, torch.dtype, Sequence[Tensor]], Tensor]
    float8: bool = False  # whether it can be multiplied with in float8


def _unpack_plain(weight: Any) -> tuple[Tensor, ...]:
    return (weight,)


def _plain(shape: Shape, dtype: torch.dtype, parts: Sequence[Tensor]) -> Tensor:
    return parts[0]


def _unpack_torchao(weight: Any) -> tuple[Tensor, ...]:
    """Values and one scale per row; torchao's zero points are zero in symmetric quantization."""
    zeros = getattr(weight, "zero_point", None)
    if weight.scale.shape != (len(weight.qdata), 1) or (zeros is not None and bool(zeros.any())):
        raise ValueError(f"{type(weight).__name__} is not quantized symmetrically row by row")
    return weight.qdata, weight.scale


def _int8(shape: Shape, dtype: torch.dtype, parts: Sequence[Tensor]) -> Tensor:
    values, scales = parts
    return (values.to(dtype) * scales).to(dtype)


def _float8(shape: Shape, dtype: torch.dtype, parts: Sequence[Tensor]) -> Tensor:
    values, scales = parts
    return (values.to(torch.float32) * scales).to(dtype)


# Of bitsandbytes, as `families.quantization` configures it.
_BLOCK, _SCALE_BLOCK = 64, 256


def _unpack_nf4(weight: Any) -> tuple[Tensor, ...]:
    """Two values per byte, one byte of scale per 64 values, and the scale of 256 of these."""
    state = weight.quant_state
    inner = state.state2
    if not state.nested or (state.blocksize, inner.blocksize) != (_BLOCK, _SCALE_BLOCK):
        raise ValueError("the weight is not in nf4 with double quantization")
    return weight.data, state.absmax, inner.absmax, inner.code, state.offset


def _nf4(shape: Shape, dtype: torch.dtype, parts: Sequence[Tensor]) -> Tensor:
    values, scales, outer, code, offset = parts
    library = torch.ops.bitsandbytes
    absmax = library.dequantize_blockwise.default(scales, outer, code, _SCALE_BLOCK, torch.float32)
    absmax = (absmax + offset).reshape(-1)
    weight = library.dequantize_4bit.default(values, absmax, _BLOCK, "nf4", shape, dtype)
    return weight.view(*values.shape[:-2], *shape)


PLAIN = Packing(_unpack_plain, _plain)
INT8 = Packing(_unpack_torchao, _int8)
FP8 = Packing(_unpack_torchao, _float8, float8=True)
NF4 = Packing(_unpack_nf4, _nf4)


def float8_product(x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """x W^T in float8, with W = values * scales [out, in] and x [..., in]."""
    return _scaled_product(x, values, scales, x.dtype)


def float8_gradient(grad: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """grad W in float8. W's scales lie along the sum, so they are multiplied into `grad`.

    The product needs W in the other order; the copy has half the bytes of W in 16 bits.
    """
    ones = torch.ones(values.shape[1], 1, device=grad.device)
    return _scaled_product(grad * scales.T, values.T.contiguous(), ones, grad.dtype)


def _scaled_product(x: Tensor, values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """x (values * scales)^T; each token of x gets a scale of its own.

    Sums are in float32 (of tensor cores: with fast accumulation).
    """
    rows = x.reshape(-1, x.shape[-1])
    scale = rows.abs().amax(-1, keepdim=True).float().clamp(min=_SMALLEST) / FLOAT8_MAX
    product = torch._scaled_mm(
        (rows / scale).to(FLOAT8),
        values.T,
        scale_a=scale,
        scale_b=scales.T,
        out_dtype=dtype,
        use_fast_accum=True,
    )
    return product.view(*x.shape[:-1], len(values))


@functools.cache
def has_float8_products(device: torch.device) -> bool:
    """Whether a GPU multiplies in float8; if not, logs what is lost."""
    missing = _why_no_float8(device)
    if missing:
        log.warning(
            "fp8: no products in float8 (%s); weights are stored in float8 and dequantized for "
            "each product, which is not faster than 16 bits",
            missing,
        )
    return not missing


def _why_no_float8(device: torch.device) -> str:
    if device.type != "cuda":
        return f"the device is {device.type}"
    if torch.version.hip is not None:
        return "not supported on AMD GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < FLOAT8_CAPABILITY:
        needed = ".".join(map(str, FLOAT8_CAPABILITY))
        return f"compute capability {'.'.join(map(str, capability))}, needs {needed}"
    side = FLOAT8_MULTIPLE
    try:
        x = torch.zeros(side, side, dtype=torch.bfloat16, device=device)
        float8_gradient(x, x.to(FLOAT8), torch.ones(side, 1, device=device))
        torch.cuda.synchronize(device)
    except Exception as error:
        return str(error).partition("\n")[0]
    return ""
