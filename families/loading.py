"""Loads the family of a base model onto a device."""

import functools
import logging
import os

import torch

from families.base import Base
from families.family import Family, WeightStorage
from families.registry import family_of

log = logging.getLogger(__name__)

_DEVICES = ("cuda", "mps", "cpu")
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def default_device() -> torch.device:
    """An NVIDIA or AMD GPU, else Apple's, else the CPU; or the kind that `$DEVICE` names.

    Sets the GPU's float32 precision (TF32). Of several GPUs the first, or that of this process
    (`$LOCAL_RANK`, set by launchers).
    """
    kind = os.environ.get("DEVICE") or _kind_here()
    if kind not in _DEVICES:
        raise ValueError(f"$DEVICE is {kind!r}; set it to {', '.join(_DEVICES)}, or unset it")
    if kind != "cuda":
        return torch.device(kind)
    if rank := os.environ.get("LOCAL_RANK"):
        torch.cuda.set_device(int(rank))
    # LoRAs are merged by float32 products, which TF32 would round to 10 bits of mantissa. The
    # VAE's output has 8 bits per channel, so its convolutions use TF32, several times faster.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = True
    return torch.device("cuda")


def _kind_here() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU and float32 on a CPU, or the one that `$DTYPE` names.

    float32 on a GPU without bfloat16 (before NVIDIA's Ampere, with a warning; before macOS 14). Not
    float16: in it these models overflow, and images are black (github.com/Tongyi-MAI/Z-Image,
    issues 14 and 15).

    Few CPUs multiply in bfloat16. One that does (AVX-512 BF16) is faster with it for all models
    but the miniature: 1.65 times for 94 M parameters.
    """
    named = os.environ.get("DTYPE") or ("bfloat16" if _has_bfloat16(device) else "float32")
    if named not in _DTYPES:
        raise ValueError(f"$DTYPE is {named!r}; set it to {' or '.join(_DTYPES)}, or unset it")
    return _DTYPES[named]


@functools.cache
def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)  # earlier systems have no bfloat16
    if device.type != "cuda":
        return False
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        log.warning(
            "this GPU has no bfloat16; computing in float32, which is slower and needs twice the "
            "memory for unquantized weights and activations"
        )
        return False
    return True


def load_family(
    base: Base,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    storage: WeightStorage | None = None,
) -> Family:
    """The base's family. Reads configs now and weights when they are first used.

    Raises `MissingModel` if a part of the base is neither on this machine nor on the Hub, and
    `QuantizationUnavailable` if the quantization of `storage` cannot run on this machine.
    """
    device = device or default_device()
    return family_of(base)(base, device, dtype or default_dtype(device), storage)
