"""Frozen layers as plain tensors: the libraries' bits, one graph per block, float8 products."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from adapters.lora import Lora
from adapters.slots import SlotLinear, put_slots
from families import quantization
from families.family import Family, WeightStorage
from families.frozen_linear import FrozenLinear
from families.loading import load_family
from families.packed_weights import FLOAT8, float8_product, has_float8_products
from families.quantization import QUANTIZATIONS
from families.registry import find_base
from inference.acceleration import compile_blocks
from trainer.learning.loss import flow_loss

CPU = torch.device("cpu")
KINDS = ("int8", "fp8", "fp8 products", "nf4")
PARTITIONED = "aot_eager_decomp_partition"  # splits forward and backward as Inductor does


@pytest.fixture(autouse=True)
def clean_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def quantized(kind: str, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    """A layer that a library has quantized."""
    layer = nn.Linear(*shape[::-1], dtype=dtype).requires_grad_(False)
    if kind == "nf4":
        from bitsandbytes.nn import Params4bit

        options: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True}
        layer.weight = Params4bit(layer.weight.data, requires_grad=False, **options).to("cpu")
        return layer
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    quantize_(
        layer, Int8WeightOnlyConfig(version=2) if kind == "int8" else Float8WeightOnlyConfig()
    )
    return layer


def frozen(kind: str, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> FrozenLinear:
    packing = QUANTIZATIONS[kind.partition(" ")[0]].packing
    return FrozenLinear(quantized(kind, shape, dtype), packing, CPU, kind == "fp8 products")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_dequantized_weight_is_the_library_s_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    from bitsandbytes.functional import dequantize_4bit

    torch.manual_seed(0)
    layer = quantized(kind, (48, 320), dtype)
    if kind == "nf4":
        theirs = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    else:
        theirs = layer.weight.dequantize()
    ours = FrozenLinear(layer, QUANTIZATIONS[kind].packing, CPU)
    assert theirs.dtype == dtype and torch.equal(ours.dequantized(dtype), theirs)
    x = torch.randn(2, 3, 320, dtype=dtype, requires_grad=True)
    y = ours(x)
    assert torch.equal(y, F.linear(x, theirs, layer.bias))
    grad = torch.randn_like(y)
    assert torch.equal(torch.autograd.grad(y, x, grad)[0], grad @ theirs)


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.up, self.down = frozen(kind, (128, 64)), frozen(kind, (64, 128))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(x)))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_frozen_layers_share_one_graph_that_keeps_packed_weights_only(kind: str) -> None:
    torch.manual_seed(0)
    blocks = nn.Sequential(*[Block(kind) for _ in range(3)])
    x = torch.randn(5, 64, dtype=torch.bfloat16, requires_grad=True)
    kept: set[tuple[torch.dtype, tuple[int, ...]]] = set()

    def keep(tensor: Tensor) -> Tensor:
        kept.add((tensor.dtype, tuple(tensor.shape)))
        return tensor

    def step() -> tuple[Tensor, Tensor]:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            y = blocks(x)
        return y.detach(), torch.autograd.grad(y.float().square().sum(), x)[0]

    plain = step()
    counter = CompileCounterWithBackend(PARTITIONED)
    for block in blocks:
        block.compile(backend=counter, fullgraph=True)
    kept.clear()
    compiled = step()
    assert counter.frame_count == 1 and not counters["graph_break"]
    packed = {each.weight.dtype for each in blocks.modules() if isinstance(each, FrozenLinear)}
    assert packed <= {dtype for dtype, _ in kept}
    assert not [s for dtype, s in kept if dtype not in packed and s[-2:] in ((64, 128), (128, 64))]
    for one, other in zip(compiled, plain, strict=True):
        assert torch.equal(one, other)


def test_a_float8_product_and_its_gradient_err_by_the_rounding_of_every_token() -> None:
    torch.manual_seed(0)
    layer = frozen("fp8 products", (512, 1024))
    x = torch.randn(2, 33, 1024, dtype=torch.bfloat16) * torch.logspace(-3, 3, 33)[:, None]
    x = x.bfloat16().requires_grad_()
    y, weight = layer(x), layer.dequantized(torch.float32)
    exact = F.linear(x.float(), weight, layer.bias.float())
    error = (y - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert 0.01 < error.median() < 0.035  # every token has its own scale
    # The same arithmetic in float32.
    scale = x.float().abs().amax(-1, keepdim=True) / 448
    rounded = (x.float() / scale).to(FLOAT8).float() * scale
    same = F.linear(rounded, weight, layer.bias.float())
    assert (y - same).norm() < 0.003 * same.norm()
    grad = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, grad)
    exact = grad.float() @ weight
    error = (found - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert 0.01 < error.median() < 0.035


def test_a_token_of_zeros_and_one_that_is_infinite_stay_what_they_are() -> None:
    layer = frozen("fp8 products", (32, 32))
    x = torch.zeros(2, 32, dtype=torch.bfloat16)
    x[1, 0] = torch.inf
    y = float8_product(x, *layer.parts)
    assert torch.equal(y[0], torch.zeros(32)) and not y[1].isfinite().any()


def test_layers_whose_sizes_the_product_does_not_allow_are_dequantized() -> None:
    assert frozen("fp8 products", (32, 48)).float8
    assert not frozen("fp8 products", (32, 40)).float8
    assert not frozen("fp8 products", (32, 48), torch.float32).float8


@pytest.mark.parametrize(
    ("capability", "why"),
    [(None, "the device is cpu"), ((8, 6), "compute capability 8.6, needs 8.9")],
)
def test_a_device_without_float8_products_is_named_with_what_is_lost(
    capability: tuple[int, int] | None,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    has_float8_products.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    device = torch.device("cpu" if capability is None else "cuda")
    assert not has_float8_products(device) and not has_float8_products(device)
    has_float8_products.cache_clear()
    assert [f"no products in float8 ({why})" in each for each in caplog.messages] == [True]
    assert "not faster than 16 bits" in caplog.text


def test_a_product_that_a_gpu_refuses_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A GPU that should have them; here no tensor can be made on it, which is an error as well."""
    has_float8_products.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    assert not has_float8_products(torch.device("cuda"))
    has_float8_products.cache_clear()
    assert "weights are stored in float8 and dequantized" in caplog.text


def family_of(base: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> Family:
    """A base with nf4, which diffusers refuses without a GPU, and float8 products."""
    from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer

    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda *a, **k: None)
    monkeypatch.setitem(QUANTIZATIONS, "nf4", replace(QUANTIZATIONS["nf4"], needs_gpu=False))
    monkeypatch.setattr(quantization, "has_float8_products", lambda _: "products" in kind)
    storage = WeightStorage(kind.partition(" ")[0])
    return load_family(find_base(base), CPU, torch.bfloat16, storage)


def test_a_lora_is_applied_beside_float8_products(
    use_vault: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = family_of("z-image", "fp8 products", monkeypatch)
    layer = family.transformer.layers[0].attention.to_q
    assert isinstance(layer, FrozenLinear) and layer.float8
    put_slots(family.transformer)
    slot = family.transformer.layers[0].attention.to_q
    assert isinstance(slot, SlotLinear)
    x = torch.randn(7, 64, dtype=torch.bfloat16)
    assert torch.equal(slot(x), layer(x))
    down, up = torch.randn(4, 64) / 8, torch.randn(64, 4) / 8
    slot.fill([((down, up), 0.5)])
    wanted = layer(x).float() + 0.5 * x.float() @ down.T @ up.T
    torch.testing.assert_close(slot(x).float(), wanted, rtol=0.02, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "kind"), [*(("z-image", kind) for kind in KINDS), ("qwen-image", "int8")]
)
def test_inductor_compiles_a_step_on_every_quantized_base(
    base: str, kind: str, use_vault: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many graphs as unquantized, none broken, and no 16-bit weight kept by them."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    graphs = {}
    for each in ("none", kind):
        family = family_of(base, each, monkeypatch)
        lora = Lora(family.transformer, family.lora_targets(), 4, seed=0)
        for parameter in lora.parameters():
            parameter.data.uniform_(-0.05, 0.05)
        plain = step_of(family, lora)
        counter = CompileCounterWithBackend("inductor" if each == kind else PARTITIONED)
        compile_blocks(family.transformer, backend=counter)
        compiled = step_of(family, lora)
        graphs[each] = counter.frame_count
        assert not counters["graph_break"]
        torch._dynamo.reset()
        torch.testing.assert_close(compiled[0], plain[0], rtol=0.01, atol=0.01)
        # Inductor rounds less often, which turns some values to their neighbor in float8.
        assert (compiled[1] - plain[1]).norm() <= 0.1 * plain[1].norm()
        # An unquantized weight is kept, as it is: so this would see one.
        shapes = {(layer.out_features, layer.in_features) for layer in lora.layers.values()}
        outside = (64, 64)  # also of layers outside the blocks
        kept = compiled[2] & (shapes | {shape[::-1] for shape in shapes}) - {outside}
        assert bool(kept) == (each == "none"), kept
    assert graphs[kind] == graphs["none"] > 0


def step_of(family: Family, lora: Lora) -> tuple[Tensor, Tensor, set[tuple[int, ...]]]:
    """Loss, LoRA gradients, and shapes of the 16-bit tensors kept for the gradients."""
    random = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, 1, family.latent_channels, 24, 8, generator=random)
    text = [torch.randn(12, 64, generator=random).to(family.dtype)]
    kept = set()

    def keep(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.bfloat16:
            kept.add(tuple(tensor.shape))
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = flow_loss(family, latents, noise, torch.tensor([0.5]), text)
    loss.backward()
    gradients = torch.cat([each.grad.flatten() for each in lora.parameters()])
    for each in lora.parameters():
        each.grad = None
    return loss.detach(), gradients, kept


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "fp8 products"])
def test_a_training_on_a_quantized_base_is_compiled_and_learns(
    kind: str,
    small: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A whole run with recomputed activations, on the CPU with Inductor."""
    from trainer.run import train

    monkeypatch.setenv("COMPILE", "1")
    monkeypatch.setenv("DTYPE", "bfloat16")
    monkeypatch.setattr(quantization, "has_float8_products", lambda _: True)
    settings = small(
        base_model="z-image-turbo",
        quantize=kind.partition(" ")[0],
        gradient_checkpointing=True,
        train_placeholder_token=False,
        trigger_word="r3dfox",
        learning_rate=1e-2,
        steps=20,
    )
    losses: list[float] = []

    def note(metric: str, value: float) -> None:
        if metric == "loss":
            losses.append(value)

    with caplog.at_level(logging.INFO):
        train(settings, note)
    assert "compiling; the first steps take longer" in caplog.text
    assert "continuing without" not in caplog.text
    assert sum(losses[-8:]) < 0.95 * sum(losses[:8])
