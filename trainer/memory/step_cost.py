"""Counts memory and FLOPs of one training step on the real model without weights.

A step runs on the meta device: the real classes at full size with the real LoRA layers, forward,
loss and backward, and every tensor is counted from its allocation to its release. Counting real
tensors on a CPU gives the same number of bytes (`tests/trainer/memory/test_plan.py`).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from adapters.lora import Lora
from families.family import Family
from families.recomputation import recompute
from trainer.learning import flow_loss, velocity
from trainer.memory.full_step import trained_in_full
from trainer.memory.meter import Meter, fused_attention
from trainer.memory.shapes import (
    Shape,
    embeddings,
    empty_latents,
    reference_images,
    sides,
    text_features,
    tokens_read,
)
from trainer.settings import BEGINS, Extent


@dataclass(frozen=True)
class Load:
    """Memory, in addition to the weights, and FLOPs of an operation."""

    bytes: int  # at the peak, including gradients
    flops: int
    compiled: int | None = None  # bytes with compiled blocks; None if they do not differ

    def held(self, compiled: bool) -> int:
        """Bytes with or without compiled blocks."""
        return self.bytes if self.compiled is None or not compiled else self.compiled


NOTHING = Load(0, 0)


def at_share(loads: Sequence[Load], recomputed: float) -> Load:
    """Of loads by the number of recomputed blocks, that of a share of them."""
    return loads[round(recomputed * (len(loads) - 1))]


@dataclass(frozen=True)
class PreservationLoad:
    """The loads of preservation's rows and images."""

    rows: Sequence[Load]  # of a batch, by the number of recomputed blocks
    share: float  # of the batches, that have rows
    images: int  # FLOPs of all of them

    def flops(self, recomputed: float) -> int:
        """The mean of a batch; `recomputed` is a share of the blocks."""
        return round(self.share * at_share(self.rows, recomputed).flops)


NO_PRESERVATION = PreservationLoad((NOTHING,), 0.0, 0)


def step_loads(
    family: Family, targets: Sequence[str], shape: Shape, full: bool = False
) -> tuple[Load, ...]:
    """The loads of a step by the number of blocks that are recomputed (`recompute`), from none.

    `targets` are layers of a LoRA, or with `full` parameters of a full training. They may be in
    any of the model's blocks, or in none. If all blocks of the trunk have the same targets,
    only two and three blocks are counted and the result is extrapolated: in the backward pass
    each block frees its activations and adds its gradients, so the peak is at the beginning or
    at the end of that pass, and both grow linearly with the number of blocks. Otherwise all
    blocks are counted. Compiled blocks keep `Family.compiled_share` of the bytes; if all are
    recomputed, only one block's activations are kept, so these are not counted.

    Steps without and with recomputation of all blocks are counted; those between follow. When the
    forward pass is through the first n blocks, the two differ by what recomputing these saves. The
    rest of the step is as without recomputation, until the backward pass comes back to the n-th
    block. From there on it is as with all recomputed, so no step needs less than that. The
    additional FLOPs are in proportion to what is not kept: blocks before the first LoRA keep
    nothing, and nothing is recomputed there.
    """
    transformer = family.transformer
    depth = len(transformer.get_submodule(family.trunk))
    _make_tables(family, shape)
    alike = _alike(targets, family.trunk, depth)

    def count(recomputed: bool) -> tuple[Load, list[tuple[int, int]]]:
        last: list[Meter] = []

        def lora_step() -> Meter:
            inside = {each for each, _ in transformer.named_modules()}
            lora = Lora(transformer, [each for each in targets if each in inside], shape.form, 0)
            meter = _step(family, lora.parameters(), shape)
            lora.remove()
            return meter

        def counted() -> tuple[int, ...]:
            if full:
                with trained_in_full(family, targets) as parameters:
                    meter = _step(family, parameters, shape)
            else:
                meter = lora_step()
            last[:] = [meter]
            return meter.early or 0, meter.peak, meter.flops, meter.in_blocks

        recompute(family, float(recomputed))
        numbers = _by_depth(transformer, family.trunk, counted, True) if alike else counted()
        recompute(family, 0.0)
        early, late, flops, in_blocks = numbers
        compiled = max(early - round((1 - family.compiled_share) * in_blocks), late)
        load = Load(max(early, late), flops, None if recomputed else compiled)
        return load, _deep(last[0].passed, depth)

    none, in_none = count(False)
    all_blocks, in_all = count(True)
    plain = [a[0] - b[0] for a, b in zip(in_none, in_all, strict=True)]
    in_blocks = [each for _, each in in_none]

    def some(recomputed: int) -> Load:
        saved = plain[recomputed]
        compiled = saved - round((1 - family.compiled_share) * in_blocks[recomputed])
        part = saved / plain[-1] if plain[-1] else 0
        return Load(
            max(none.bytes - saved, all_blocks.bytes),
            none.flops + round(part * (all_blocks.flops - none.flops)),
            max(none.held(True) - compiled, all_blocks.bytes),
        )

    return none, *(some(each) for each in range(1, depth)), all_blocks


def _deep(passed: Sequence[tuple[int, int]], depth: int) -> list[tuple[int, int]]:
    """`Meter.passed` of a trunk of so many equal blocks, from one of three."""
    if len(passed) > depth:
        return list(passed)
    first, second = passed[1], passed[2]
    each = [b - a for a, b in zip(first, second, strict=True)]
    further = [(first[0] + k * each[0], first[1] + k * each[1]) for k in range(depth)]
    return [passed[0], *further]


def _alike(targets: Sequence[str], trunk: str, depth: int) -> bool:
    """Whether all blocks of the trunk have the same targets; the last one may lack some."""
    found: list[set[str]] = [set() for _ in range(depth)]
    for name in targets:
        if name.startswith(f"{trunk}."):
            block, _, layer = name.removeprefix(f"{trunk}.").partition(".")
            found[int(block)].add(layer)
    return all(each == found[0] for each in found[:-1]) and found[-1] <= found[0]


@torch.no_grad()
def _make_tables(family: Family, shape: Shape) -> None:
    """Runs a shallow model once, so that tables that it caches exist."""
    blocks = family.transformer.get_submodule(family.trunk)
    setattr(family.transformer, family.trunk, blocks[:1])
    velocity_load(family, shape)
    setattr(family.transformer, family.trunk, blocks)


def step_load(family: Family, lora: Lora, shape: Shape) -> Load:
    """The load of one step of the transformer and its LoRA, with or without weights."""
    meter = _step(family, lora.parameters(), shape)
    return Load(max(meter.early or 0, meter.peak), meter.flops)


def _step(family: Family, trained: Iterable[nn.Parameter], shape: Shape) -> Meter:
    """The meter of one step, marked when the backward pass has reached the middle of the trunk.

    It is not marked if no gradient gets there.
    """
    latents = empty_latents(family, shape)
    noise, sigma = torch.zeros_like(latents), latents.new_full((shape.batch_size,), 0.5)
    text, references = text_features(family, shape), reference_images(family, shape)
    known = [*_tensors(family.transformer), latents, noise, sigma, *text]
    known += [each for beside in references[:1] for each in beside.latents]
    meter = Meter(known)

    def mark_way_back(block: nn.Module, args: Any, kwargs: Any) -> None:
        given = tree_iter((args, kwargs))
        inputs = [x for x in given if isinstance(x, Tensor) and x.requires_grad]
        if inputs:
            inputs[0].register_hook(lambda _: meter.mark())

    blocks = list(family.transformer.get_submodule(family.trunk).children())
    hook = blocks[len(blocks) // 2].register_forward_pre_hook(mark_way_back, with_kwargs=True)
    hooks = [hook, *_watch_blocks(family.transformer, blocks, meter)]
    with fused_attention(), meter:
        flow_loss(family, latents, noise, sigma, text, None, references).backward()
    for each in hooks:
        each.remove()
    for parameter in trained:
        parameter.grad = None
    return meter


def _watch_blocks(transformer: Any, trunk: Sequence[nn.Module], meter: Meter) -> list[Any]:
    """Hooks that add up what each block that is compiled leaves, if it keeps activations.

    And hooks that fill `Meter.passed` in the forward pass, not when blocks are recomputed.
    """

    def note(*_: Any) -> None:
        if len(meter.passed) <= len(trunk):
            meter.passed.append((meter.live, meter.in_blocks))

    def before(block: nn.Module, args: Any) -> None:
        meter.in_blocks -= meter.live

    def after(block: nn.Module, args: Any, result: Any) -> None:
        meter.in_blocks += meter.live

    hooks = [each.register_forward_pre_hook(note) for each in trunk]
    for module in transformer.modules():
        if type(module).__name__ in transformer._repeated_blocks:
            hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    return [*hooks, trunk[-1].register_forward_hook(note)]


def placeholder_load(family: Family, shape: Shape) -> Load:
    """The activations of the text encoder that captions with a placeholder token need."""
    text = embeddings(family, shape.batch_size, tokens_read(family, shape)).requires_grad_()

    def count() -> tuple[int, ...]:
        with fused_attention(), Meter([*_tensors(family.text_encoder), text]) as meter:
            features = _encode(family, text)
            kept = meter.live
            features.sum().backward()
        text.grad = None
        return kept, meter.flops

    return Load(*_by_depth(family.text_encoder, family.text_trunk, count))


@torch.no_grad()
def caption_load(family: Family, shape: Shape) -> Load:
    """The load of encoding a batch of captions."""
    text = embeddings(family, shape.batch_size, tokens_read(family, shape))

    def count() -> tuple[int, ...]:
        with fused_attention(), Meter([*_tensors(family.text_encoder), text]) as meter:
            _encode(family, text)
        return meter.peak, meter.flops

    return Load(*_by_depth(family.text_encoder, family.text_trunk, count))


@torch.no_grad()
def image_load(family: Family, shape: Shape) -> Load:
    """The load of encoding a batch of images with the VAE."""
    width, height = sides(family, shape)
    pixels = torch.zeros(shape.batch_size, 3, height, width, device=family.device)
    with fused_attention(), Meter(_tensors(family.vae)) as meter:
        family.encode_images(pixels)
    return Load(meter.peak, meter.flops)


@torch.no_grad()
def velocity_load(family: Family, shape: Shape) -> Load:
    """The load of one inference pass of the transformer."""
    one = replace(shape, batch_size=1)
    latents = empty_latents(family, one)
    text, references = text_features(family, one), reference_images(family, one)
    known = [*_tensors(family.transformer), latents, *text]
    known += [each for beside in references for each in beside.latents]

    def count() -> tuple[int, ...]:
        with fused_attention(), Meter(known) as meter:
            velocity(family, latents, latents.new_full((1,), 0.5), text, references)
        return meter.peak, meter.flops

    return Load(*_by_depth(family.transformer, family.trunk, count))


def preservation_load(
    family: Family, targets: Sequence[str], step: Shape, extent: Extent | None, full: bool = False
) -> PreservationLoad:
    """The load of preservation beside steps of that shape; None is off."""
    if extent is None:
        return NO_PRESERVATION
    row = replace(step, batch_size=extent.rows, width=extent.side, height=extent.side)
    kinds = [(row, extent.edit_share), (replace(row, references=0), 1 - extent.edit_share)]
    kinds = [(each, share) for each, share in kinds if share]
    passes = sum(share * velocity_load(family, each).flops for each, share in kinds)
    loads = [step_loads(family, targets, each, full) for each, _ in kinds]
    rows = [_mean(each, [share for _, share in kinds]) for each in zip(*loads, strict=True)]
    images = round((extent.images + extent.subject_images) * extent.steps * passes)
    return PreservationLoad(rows, (1 - BEGINS) / extent.every, images)


def _mean(loads: Sequence[Load], shares: Sequence[float]) -> Load:
    """The memory of the first, which is the largest, and the mean of the FLOPs."""
    flops = (load.flops * share for load, share in zip(loads, shares, strict=True))
    return replace(loads[0], flops=round(sum(flops)))


@torch.no_grad()
def decode_load(family: Family, shape: Shape) -> Load:
    """The load of decoding one image with the VAE."""
    latents = empty_latents(family, replace(shape, batch_size=1))
    with fused_attention(), Meter([*_tensors(family.vae), latents]) as meter:
        family.decode(latents)
    return Load(meter.peak, meter.flops)


def _by_depth(
    model: nn.Module, trunk: str, count: Callable[[], tuple[int, ...]], has_tables: bool = False
) -> tuple[int, ...]:
    """Extrapolates counts with two and with three blocks of the trunk to the full depth.

    has_tables: tables that the model caches exist; otherwise the first call makes them.
    """
    blocks = model.get_submodule(trunk)
    assert isinstance(blocks, nn.ModuleList)
    if len(blocks) <= 3:
        return count()
    setattr(model, trunk, blocks[:2])
    if not has_tables:
        count()
    two = count()
    setattr(model, trunk, blocks[:3])
    three = count()
    setattr(model, trunk, blocks)
    return tuple(a + (b - a) * (len(blocks) - 2) for a, b in zip(two, three, strict=True))


def _encode(family: Family, text: Tensor) -> Tensor:
    """Features of embeddings; with a mask, since without it the encoder would read values."""
    batch, tokens = text.shape[:2]
    mask = torch.ones(batch, 1, tokens, tokens, dtype=torch.bool, device=text.device)
    called = family.text_encoder(inputs_embeds=text, attention_mask=mask, use_cache=False)
    return called.last_hidden_state


def _tensors(model: nn.Module) -> list[Tensor]:
    """All tensors of a model: parameters, buffers, and plain attributes."""
    tables = [t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor)]
    return [*model.parameters(), *model.buffers(), *tables]
