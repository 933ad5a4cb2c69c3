"""A training step does no more work than it must, and learns what the plain way would."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loops import loop_on_meta, make_loop
from PIL import Image
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from adapters.lora import Lora
from families.loading import load_family
from families.recomputation import recompute
from inference.acceleration import (
    compile_blocks,
    compile_text_encoder,
    wanted_in_training,
)
from trainer.data.buckets import Bucket
from trainer.data.dataset import Example, read_dataset
from trainer.learning import features
from trainer.learning.features import Captions, encode_images, fit
from trainer.settings.fields import Settings

BASES = ["z-image", "qwen-image"]


# The LoRA's arithmetic.


@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
def test_a_layer_and_its_gradients_are_those_of_the_sum_of_the_weights(
    dtype: torch.dtype, close: float
) -> None:
    """y = x (W + BA)^T, computed in float64 from the same masters, to the type's rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32)).to(dtype).requires_grad_(False)
    lora = Lora(model, ["0"], 4, seed=1)
    layer = lora.layers["0"]
    layer.up.data.normal_()
    weight, bias = layer.base_layer.weight.double(), layer.base_layer.bias.double()
    x, towards = torch.randn(2, 5, 24).to(dtype), torch.randn(2, 5, 32).to(dtype)

    mine = x.clone().requires_grad_()
    model(mine).backward(towards)
    down, up = (each.detach().double().requires_grad_() for each in (layer.down, layer.up))
    plain = x.double().requires_grad_()
    expected = plain @ (weight + up @ down).T + bias
    expected.backward(towards.double())

    assert layer.down.grad is not None and layer.down.grad.dtype == torch.float32
    pairs = [
        (model(x), expected),
        (mine.grad, plain.grad),
        (layer.down.grad, down.grad),
        (layer.up.grad, up.grad),
    ]
    for ours, right in pairs:
        assert ours is not None and right is not None
        assert (ours.double() - right).norm() < close * right.norm()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_no_gradient_goes_through_blocks_before_the_first_lora(
    share: float, small: Callable[..., Settings]
) -> None:
    loop = make_loop(small(caption_dropout=1.0))  # no caption holds the placeholder
    transformer = loop.family.transformer
    recompute(loop.family, share)
    blocks = {
        name: transformer.get_submodule(name)
        for name in ("noise_refiner.0", "context_refiner.0", "layers.0")
    }
    graphs: dict[str, bool] = {}
    for name, block in blocks.items():

        def note(_: nn.Module, __: Any, out: Tensor, name: str = name) -> None:
            graphs[name] = out.requires_grad

        block.register_forward_hook(note)
    loop.step(0)
    assert graphs == {"noise_refiner.0": False, "context_refiner.0": False, "layers.0": True}


# Compiled blocks.


@pytest.mark.parametrize(
    ("name", "share"),
    [("z-image", 0.5), pytest.param("qwen-image", 0.0, marks=pytest.mark.slow)],
)
def test_nothing_is_compiled_again_after_the_first_epoch(
    name: str, share: float, small: Callable[..., Settings]
) -> None:
    """Pictures of several shapes, captions of several lengths, with and without a gradient."""
    torch._dynamo.reset()
    settings = small(base_model=name, resolution="32,64", caption_dropout=0.0, rank=1)
    loop, plain = make_loop(settings), make_loop(settings)
    recompute(loop.family, share)
    counter = CompileCounter()
    compile_blocks(loop.family.transformer, backend=counter)
    epoch = loop.batches.period
    counts = []
    for _ in range(2):
        for _ in range(epoch):
            loop.step(loop.done)
        counts.append(counter.frame_count)
    for step in range(epoch // 2):
        plain.step(step)
    torch._dynamo.reset()

    assert counts[0] == counts[1] > 0
    first = torch.stack(loop.history.losses[: epoch // 2])
    torch.testing.assert_close(first, torch.stack(plain.history.losses), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BASES)
def test_the_text_encoder_is_compiled_once_for_all_its_layers_and_captions(
    name: str, small: Callable[..., Settings]
) -> None:
    torch._dynamo.reset()
    family = load_family(small(base_model=name).base)
    rows = nn.Parameter(torch.randn(1, family.text_width) / 8)
    texts = [f"a photo of <zwx>{' in the snow' * times}" for times in range(4)]
    captions = Captions(family, texts, {"<zwx>": rows})
    assert captions._prefix is not None and len(family.text_encoder.layers) == 2

    def results() -> list[Tensor]:
        made = [captions.features([text])[0] for text in texts]
        rows.grad = None
        sum(each.square().sum() for each in made).backward()
        assert rows.grad is not None
        return [*(each.detach() for each in made), rows.grad]

    plain, counter = results(), CompileCounter()
    compile_text_encoder(family, backend=counter)
    compiled = results()
    # Of two small sizes that happen to be equal, the compiler makes one of its own.
    assert 1 <= counter.frame_count <= 2
    count = counter.frame_count
    results()
    assert counter.frame_count == count
    torch._dynamo.reset()
    for one, other in zip(plain, compiled, strict=True):
        assert (one - other).norm() < 1e-5 * one.norm()


@pytest.mark.parametrize(
    ("several", "base", "graphs"),
    [
        pytest.param(False, "qwen-image", 7, marks=pytest.mark.slow),
        (True, "qwen-image", 3),
    ],
)
def test_blocks_for_several_sizes_are_compiled_for_all_at_once(
    several: bool, base: str, graphs: int, small: Callable[..., Settings]
) -> None:
    torch._dynamo.reset()
    loop = make_loop(small(base_model=base, resolution="32,64", caption_dropout=0.2, rank=1))
    counter = CompileCounter()
    compile_blocks(loop.family.transformer, backend=counter, several_sizes=several)
    for step in range(loop.batches.period):
        loop.step(step)
    torch._dynamo.reset()
    assert counter.frame_count == graphs


@pytest.mark.parametrize(
    ("device", "compile", "wanted"),
    [("cpu", None, False), ("cpu", "1", True), ("cuda", None, True), ("cuda", "0", False)],
)
def test_a_training_is_compiled_on_a_gpu_and_on_a_cpu_that_is_asked_to(
    device: str, compile: str | None, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COMPILE", raising=False)
    if compile is not None:
        monkeypatch.setenv("COMPILE", compile)
    assert wanted_in_training(torch.device(device)) == wanted


@pytest.mark.parametrize("name", BASES)
def test_no_step_waits_for_the_device(name: str, small: Callable[..., Settings]) -> None:
    """On a device without any values, where asking for one is an error."""
    settings = small(base_model=name, steps=3, batch_size=2, caption_dropout=0.3)
    loop = loop_on_meta(settings)
    loop.optimizers.clear()  # fused ones ask their device for nothing, but run on real ones alone
    for step in range(settings.steps):
        loop.step(step)
    assert loop.rows[0].grad is not None
    with pytest.raises(RuntimeError, match="meta"):
        loop.history.losses[0].item()


# Before the loop.


@pytest.mark.parametrize("name", BASES)
def test_pictures_and_captions_are_encoded_in_batches_as_each_alone(
    name: str, small: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small(base_model=name, resolution="32,64")
    family = load_family(settings.base)
    examples = read_dataset(settings.dataset, settings.default_caption)
    texts = [example.caption for example in examples]

    together = encode_images(family, examples, settings)
    kept = Captions(family, texts).features(texts)
    monkeypatch.setattr(features, "BATCH_PIXELS", 1)
    monkeypatch.setattr(features, "BATCH_TOKENS", 1)
    alone = encode_images(family, examples, settings)
    kept_alone = Captions(family, texts).features(texts)

    assert [each.name for each in together] == [
        example.name for example in examples for _ in settings.resolutions
    ]
    for one, other in zip(together, alone, strict=True):
        assert (one.name, one.caption) == (other.name, other.caption)
        torch.testing.assert_close(one.mean_CHW, other.mean_CHW, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.std_CHW, other.std_CHW, rtol=1e-4, atol=1e-5)
    for one, other in zip(kept, kept_alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BASES)
def test_captions_with_a_common_beginning_have_the_features_and_gradients_of_whole_ones(
    name: str, small: Callable[..., Settings]
) -> None:
    family = load_family(small(base_model=name).base)
    rows = torch.nn.Parameter(torch.randn(1, family.text_width) / 8)
    texts = ["a photo of <zwx> in the snow", "a photo of one <zwx>, smiling at another <zwx>"]
    captions = Captions(family, texts, {"<zwx>": rows})
    assert captions._prefix is not None
    assert len(captions._prefix.ids) == family.tokenize("").template_length + 3  # a photo of

    results = []
    for made in (captions.features(texts), family.encode_prompts(texts, {"<zwx>": rows})):
        weights = [torch.linspace(-1, 1, each.numel()).view_as(each) for each in made]
        sum((w * each).sum() for w, each in zip(weights, made, strict=True)).backward()
        assert rows.grad is not None
        results.append((*made, rows.grad))
        rows.grad = None
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()


@pytest.mark.parametrize("orientation", [1, 6], ids=["upright", "on its side"])
def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(orientation: int) -> None:
    draw = torch.Generator().manual_seed(0)
    coarse = (torch.rand(24, 32, 3, generator=draw) * 255).byte().numpy()
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(coarse).resize((1200, 900), 3).save(file, "JPEG", quality=95, exif=exif)
    size = (1200, 900) if orientation == 1 else (900, 1200)
    example = Example("a.jpg", "", *size, file.getvalue())

    whole, small = example.image(), example.image((size[0] // 5, size[1] // 5))
    assert (whole.size, small.size) == (size, (size[0] // 4, size[1] // 4))
    bucket = Bucket(size[0] // 10, size[1] // 10)
    apart = (fit(whole, bucket) - fit(small, bucket)).abs()
    assert apart.mean() < 0.01 and apart.max() < 0.1  # of a range of 2
