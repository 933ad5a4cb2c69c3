"""Quantizes frozen models to 8 or 4 bits per weight, with the libraries' quantization configs.

Only the linear layers of the repeated blocks are quantized: they are nearly all of a model, and
the other layers (embedders, norms, the last layer) are small and sensitive.
"""

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from families.family import WeightStorage
from families.frozen_linear import FrozenLinear
from families.packed_weights import FP8, INT8, NF4, PLAIN, Packing, has_float8_products
from families.sharding import shard

# Gets the name and value of a parameter and returns the value to use.
Change = Callable[[str, Tensor], Tensor]


class QuantizationUnavailable(RuntimeError):
    """A quantization that cannot run on this machine; the message says what to do."""


@dataclass(frozen=True)
class Quantization:
    """One method of quantization."""

    bytes_per_weight: float  # scales included, for thousands of columns
    weight_error: float  # |W - dequantized W| / |W| of normally distributed weights, measured
    package: str
    requirement: str  # for pip
    packing: Packing
    transformer_config: Callable[[torch.dtype, list[str]], Any]
    text_encoder_config: Callable[[torch.dtype, list[str]], Any]
    needs_gpu: bool = False


def _torchao(library: str, name: str) -> Callable[[torch.dtype, list[str]], Any]:
    def config(dtype: torch.dtype, skip: list[str]) -> Any:
        from torchao import quantization

        settings = {"version": 2} if name.startswith("Int8") else {}
        kind = getattr(quantization, name)(**settings)
        made: Any = importlib.import_module(library).TorchAoConfig
        return made(kind, modules_to_not_convert=skip)

    return config


def _nf4(library: str) -> Callable[[torch.dtype, list[str]], Any]:
    def config(dtype: torch.dtype, skip: list[str]) -> Any:
        made: Any = importlib.import_module(library).BitsAndBytesConfig
        return made(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skip,
        )

    return config


_TORCHAO = ("torchao", "torchao==0.17.0")
_BITSANDBYTES = ("bitsandbytes", "bitsandbytes==0.50.2")

# `tests/families/test_quantization.py` measures the weight errors.
QUANTIZATIONS: dict[str, Quantization] = {
    "fp8": Quantization(
        1.001,
        0.026,
        *_TORCHAO,
        FP8,
        _torchao("diffusers", "Float8WeightOnlyConfig"),
        _torchao("transformers", "Float8WeightOnlyConfig"),
    ),
    "int8": Quantization(
        1.001,
        0.005,
        *_TORCHAO,
        INT8,
        _torchao("diffusers", "Int8WeightOnlyConfig"),
        _torchao("transformers", "Int8WeightOnlyConfig"),
    ),
    # Half a byte, and per 64 weights one byte of scale that has a scale itself.
    "nf4": Quantization(
        0.516,
        0.092,
        *_BITSANDBYTES,
        NF4,
        _nf4("diffusers"),
        _nf4("transformers"),
        needs_gpu=True,
    ),
}


def usable(device: torch.device, names: Iterable[str] = ()) -> list[str]:
    """Those quantizations, by default all, that can run on this device."""
    found = []
    for name in names or QUANTIZATIONS:
        try:
            check_available(name, device)
        except QuantizationUnavailable:
            continue
        found.append(name)
    return found


def check_available(name: str, device: torch.device) -> None:
    """Raises `QuantizationUnavailable` if the package or the GPU that it needs is missing."""
    if name == "none":
        return
    if name not in QUANTIZATIONS:
        known = ", ".join(("none", *QUANTIZATIONS))
        raise QuantizationUnavailable(f"quantize {name!r} is not one of {known}")
    quantization = QUANTIZATIONS[name]
    if quantization.needs_gpu and device.type == "cpu":
        can = ", ".join(k for k, each in QUANTIZATIONS.items() if not each.needs_gpu)
        raise QuantizationUnavailable(
            f"quantize {name} needs a GPU, and this machine has none; choose {can} or none"
        )
    if device.type == "mps":
        raise QuantizationUnavailable(
            f"quantize {name} was not made for Apple's GPUs; set it to none, and "
            "gradient_checkpointing to true for less memory"
        )
    if importlib.util.find_spec(quantization.package) is None:
        raise QuantizationUnavailable(
            f"quantize {name} needs the package {quantization.package}: "
            f"pip install --no-deps {quantization.requirement}"
        )


def block_linears(model: nn.Module) -> Iterator[str]:
    """Names of the linear layers inside a model's repeated blocks."""
    blocks = [f"{name}." for name, each in model.named_modules() if isinstance(each, nn.ModuleList)]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(tuple(blocks)):
            yield name


def block_values(model: nn.Module) -> int:
    """The number of weights in these layers, which are quantized or offloaded."""
    return sum(model.get_parameter(f"{name}.weight").numel() for name in block_linears(model))


class _Emptied(Mapping[str, Tensor]):
    """The state of a model that loses each parameter when it is read; changed by `change`."""

    def __init__(self, model: nn.Module, change: Change | None) -> None:
        self._model, self._change = model, change
        self._names = list(model.state_dict())

    def __getitem__(self, name: str) -> Tensor:
        parent, _, child = name.rpartition(".")
        module = self._model.get_submodule(parent)
        value: Tensor = getattr(module, child).detach()
        if child in module._parameters:
            module._parameters[child] = nn.Parameter(value.to("meta"), requires_grad=False)
        return value if self._change is None else self._change(name, value)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def quantize_transformer(
    model: Any,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    change: Change | None = None,
) -> nn.Module:
    """Quantizes a diffusers model by the method `name`, weight by weight, onto `device`.

    `model` loses its weights one by one. Each is passed through `change` before, in its own memory:
    writing into weights that are memory-mapped would make all of them private memory, which is
    freed only with the last one.

    As `from_pretrained` with a quantization config, but for weights that are in memory already,
    since a training adapter may have been merged into them. (`from_single_file` accepts such
    weights too, but assumes that they are quantized already.)
    """
    from accelerate import init_empty_weights
    from diffusers.models.model_loading_utils import load_model_dict_into_meta
    from diffusers.quantizers import DiffusersAutoQuantizer

    inside = set(block_linears(model))
    linears = (n for n, each in model.named_modules() if isinstance(each, nn.Linear))
    outside = [linear for linear in linears if linear not in inside]
    config = QUANTIZATIONS[name].transformer_config(dtype, outside)
    quantizer: Any = DiffusersAutoQuantizer.from_config(config, pre_quantized=False)
    quantizer.validate_environment()
    with init_empty_weights():
        quantized = type(model).from_config(model.config)
    quantizer.preprocess_model(quantized, device_map=None, keep_in_fp32_modules=[])
    weights: Any = _Emptied(model, change)  # an OrderedDict in the annotation; only read in order
    load_model_dict_into_meta(
        quantized,
        weights,
        dtype=dtype,
        device_map={"": device},
        hf_quantizer=quantizer,
        keep_in_fp32_modules=[],
        unexpected_keys=[],
    )
    quantizer.postprocess_model(quantized)
    return quantized


def apply_storage(model: nn.Module, storage: WeightStorage, device: torch.device) -> nn.Module:
    """Moves the model to `device`; its blocks are stored as in `storage`."""
    if storage.quantize != "none" or storage.offload:
        quantization = QUANTIZATIONS.get(storage.quantize)
        packing = PLAIN if quantization is None else quantization.packing
        replace_linears(model, packing, device)
    if storage.shard:
        return shard(model, device)
    for module in model.modules():
        if storage.offload and isinstance(module, FrozenLinear):
            module.offload()
            for each in (module.bias, *module.buffers()):  # small
                if each is not None:
                    each.data = each.data.to(device)
        else:
            module._apply(lambda tensor: tensor.to(device), recurse=False)
    return model


def replace_linears(model: nn.Module, packing: Packing, device: torch.device) -> None:
    """Replaces every linear layer of the repeated blocks by a `FrozenLinear`."""
    float8 = packing.float8 and has_float8_products(device)
    for name in list(block_linears(model)):
        parent, _, child = name.rpartition(".")
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        setattr(model.get_submodule(parent), child, FrozenLinear(layer, packing, device, float8))
