"""`python -m trainer plan CONFIG.yaml`: memory and time of a run as a table, without a GPU."""

from collections.abc import Sequence
from textwrap import fill
from typing import Any

import torch

from families.captioners import captioner_of
from families.loading import default_device
from families.memory import RESERVE, free_memory
from families.quantization import usable
from families.vision_language import batch_on, bytes_needed
from inference.acceleration import wanted_in_training
from trainer.memory.fitting import (
    TEXT_TOKENS,
    figures_of,
    is_merged,
    wishes_of,
)
from trainer.memory.host import host_parts, host_previews
from trainer.memory.plan import KINDS, Choice, Figures, Mode, Wishes, choose, ladder_of
from trainer.memory.speed import GPUS, UTILIZATION, Gpu, step_seconds
from trainer.settings import BEGINS, Settings, extent_of, missing_here

_NOTES = """\
Bits are those of the frozen block weights; fp8 takes as much memory as int8. With checkpointing,
activations are recomputed in the backward pass, here in all blocks; a share of them is chosen
if it fits. Offloaded weights are in CPU memory."""
_FULL_NOTES = """\
Weights are trained in 16 bits, and each gradient is applied and freed in the backward pass. Blocks
are compiled; activations are counted for plain blocks."""
_SHARDED = """
With shard, each GPU has its part of the blocks and three gathered ones; blocks are not compiled."""
_COMPILED = (
    "\nBlocks are compiled, unless their weights are offloaded: then they keep more activations."
)


def describe_plan(settings: Settings, gpus: int = 1) -> str:
    """The whole text: the run's numbers, and the mode that this machine would choose.

    gpus: of each machine, with a process for each.
    """
    counted = count(settings)
    lacking = "".join(f"\nThis run cannot start here: {line}" for line in missing_here(settings))
    here = this_machine(settings, counted, gpus)
    return f"{table(settings, counted, gpus)}\n\n{here}{lacking}"


def plan_data(settings: Settings, gpus: int = 1) -> dict[str, Any]:
    """The plan in JSON types: bytes and seconds; the time of a mode that does not fit is null."""
    counted, wishes = count(settings), wishes_of(settings, gpus)
    chosen = {name: choose(counted, round(gpu.memory * 1e9), wishes) for name, gpu in GPUS.items()}
    device = default_device()
    here = None
    if device.type != "cpu":
        here = choose(counted, free_memory(device), wishes, usable(device))
    return {
        "base_model": settings.base.name,
        "license": settings.base.license or None,
        "license_notice": settings.base.terms.notice if settings.base.terms else None,
        "token": settings.subject,
        "rank": settings.rank,
        "adapter": settings.adapter,
        "optimizer": settings.optimizer,
        "batch_size": settings.batch_size,
        "resolution": max(settings.resolutions),
        "caption_tokens": TEXT_TOKENS,
        "control_images": settings.pairs,
        "parameters": {
            "transformer": counted.block_weights + counted.other_weights,
            "text_encoder": counted.text_block_weights + counted.text_other_weights,
            "vae": counted.vae_weights,
            "lora": counted.lora_values,
        },
        "lora_file_bytes": counted.lora_file,
        "blocks": counted.blocks,
        "encoding_images_bytes": counted.images(),
        "encoding_captions_bytes": counted.captions("none"),
        "writing_captions_bytes": _writing_captions(settings),
        "preview_bytes": {Mode(each).label: counted.previews(Mode(each)) for each in KINDS},
        "preview_host_bytes": {
            Mode(each).label: host_previews(counted, Mode(each), is_merged(settings))
            for each in KINDS
        },
        "processes": gpus,
        "modes": [_mode_data(counted, mode) for mode in ladder_of(counted, gpus)],
        "gpus": {
            name: {"memory_bytes": round(GPUS[name].memory * 1e9), **_choice_data(counted, choice)}
            for name, choice in chosen.items()
        },
        "this_machine": {"device": device.type, **(_choice_data(counted, here) if here else {})},
        "missing_here": missing_here(settings),
    }


def _mode_data(counted: Figures, mode: Mode) -> dict[str, Any]:
    parts = counted.parts(mode)
    return {
        "mode": mode.label,
        "quantize": mode.quantize,
        "gradient_checkpointing": bool(mode.checkpointing),
        "low_memory": mode.offload,
        "shard": mode.shards > 1,
        "bytes": parts,
        "peak_bytes": sum(parts.values()),
        "host_bytes": sum(host_parts(counted, mode).values()),
        "flops_per_step": counted.flops(mode),
        "seconds_per_step": {
            name: step_seconds(gpu, counted.flops(mode), counted.fetched(mode))
            if _fits(counted, mode, gpu)
            else None
            for name, gpu in GPUS.items()
        },
    }


def _choice_data(counted: Figures, choice: Choice) -> dict[str, Any]:
    return {
        "mode": choice.mode.label,
        "recomputed_blocks": counted.recomputed(choice.mode),
        "fits": choice.fits,
        "peak_bytes": choice.peak,
    }


def _fits(counted: Figures, mode: Mode, gpu: Gpu) -> bool:
    return counted.peak(mode, KINDS[-1]) <= gpu.memory * 1e9 * (1 - RESERVE)


def count(settings: Settings) -> Figures:
    """The run's figures on a GPU, with captions of a typical length."""
    compiled = wanted_in_training(torch.device("cuda"))
    return figures_of(settings, TEXT_TOKENS, torch.bfloat16, compiled)


def table(settings: Settings, counted: Figures, gpus: int = 1) -> str:
    """The part that does not depend on this machine."""
    return "\n\n".join(
        [
            _heading(settings, gpus),
            _parts(counted),
            f"{_memory(counted, gpus)}\n{_host(counted, is_merged(settings), gpus)}",
            _seconds(counted, gpus),
            _chosen(counted, wishes_of(settings, gpus)),
            *_preservation(settings, counted),
            *_captions(settings),
        ]
    )


def this_machine(settings: Settings, counted: Figures, gpus: int = 1) -> str:
    """The mode that this machine would choose, and the reason."""
    device = default_device()
    if device.type == "cpu":
        return (
            "This machine has no GPU: it would train in float32, with gradient_checkpointing,\n"
            "quantize or low_memory only if they are set."
        )
    wishes = wishes_of(settings, gpus)
    choice = choose(counted, free_memory(device), wishes, usable(device))
    return f"This machine would train with {choice.reason} free."


def _heading(settings: Settings, gpus: int) -> str:
    edge = max(settings.resolutions)
    subject = f"with {', '.join(settings.tokens)}" if settings.tokens else "without a placeholder"
    what = "full training" if settings.full else str(settings.form)
    heading = (
        f"{settings.base.name} ({settings.base.hub_id}), {subject}: {what},\n"
        f"{settings.optimizer}, batches of {settings.batch_size} at {edge} x {edge}, captions of "
        f"{TEXT_TOKENS} tokens{f', on each of {gpus} GPUs' * (gpus > 1)}"
    )
    if controls := settings.pairs:
        edge, several = settings.base.reference_resolution, "s" * (controls > 1)
        number = controls if several else "one"
        heading += f",\neach image with {number} control image{several} of {edge} x {edge}"
    terms = settings.base.terms
    if terms is None:
        return heading
    notice = fill(f"{settings.base.license}: {terms.notice}", 100)
    return f"{heading}\n\n{notice}\n{terms.url}"


def _parts(counted: Figures) -> str:
    transformer = counted.block_weights + counted.other_weights
    text = counted.text_block_weights + counted.text_other_weights
    rows = [
        ["", "parameters", "as loaded"],
        ["transformer", _billions(transformer), f"{_gb(counted.weights('none'))} GB"],
        ["text encoder", _billions(text), f"{_gb(counted.text_weights('none'))} GB"],
        ["VAE (float32)", _billions(counted.vae_weights), f"{_gb(4 * counted.vae_weights)} GB"],
        [
            f"trained ({counted.lora_modules} tensors)"
            if counted.full
            else f"LoRA ({counted.lora_modules} modules)",
            _billions(counted.lora_values),
            f"{_gb(counted.lora_file)} GB on disk"
            if counted.full
            else f"{counted.lora_file / 1e6:.0f} MB on disk",
        ],
    ]
    return _aligned(rows)


def _memory(counted: Figures, gpus: int) -> str:
    parts = list(counted.parts(Mode()))
    rows = [["peak GB of a step", *parts, "total"]]
    for mode in ladder_of(counted, gpus):
        held = counted.parts(mode)
        rows.append([mode.label, *(_gb(held[part]) for part in parts), _gb(sum(held.values()))])
    before = (
        f"Before that, encoding images takes {_gb(counted.images())} GB, and captions "
        f"{_gb(counted.captions('none'))} GB"
    )
    if not counted.placeholder:
        before += (
            f" ({_gb(counted.captions('int8'))} in int8, {_gb(counted.captions('nf4'))} in nf4)"
        )
    if counted.preview.bytes:
        modes = [Mode(each) for each in (KINDS[:1] if counted.full else KINDS)]
        modes += [Mode(shards=gpus)] * (gpus > 1 and not counted.full)
        needs = (f"{_gb(counted.previews(mode))} in {mode.label}" for mode in modes)
        before += f".\nA preview image during training needs {', '.join(needs)}"
    notes = _FULL_NOTES if counted.full else f"{_NOTES}{_COMPILED * counted.compiled}"
    notes += _SHARDED * (gpus > 1 and not counted.full)
    return f"{_aligned(rows)}\n\n{before}.\n{notes}"


def _host(counted: Figures, merged: bool, gpus: int) -> str:
    """The CPU memory of modes with and without offloading, and of previews."""
    if counted.full:
        return f"CPU memory of a run on a GPU: {_gb(sum(host_parts(counted, Mode()).values()))} GB."
    plain, *others = (
        (_gb(sum(host_parts(counted, mode).values())), mode.label)
        for mode in (
            *(Mode(), Mode("int8"), *([Mode("int8", shards=gpus)] if gpus > 1 else [])),
            *(Mode("int8", offload=True), Mode(offload=True)),
        )
    )
    whose = "each process" if gpus > 1 else "a run on a GPU"
    text = f"CPU memory of {whose}: {plain[0]} GB, "
    text += ", ".join(f"{size} in {label}" for size, label in others)
    needs = [_gb(host_previews(counted, Mode(each), merged)) for each in ("none", "int8")]
    if counted.preview.bytes:
        text += f".\nPreview images during training take {needs[0]} more, {needs[1]} if quantized"
    return f"{text}."


def _seconds(counted: Figures, gpus: int) -> str:
    rows = [["seconds per step", *GPUS], ["", *(f"{gpu.memory:g} GB" for gpu in GPUS.values())]]
    for mode in ladder_of(counted, gpus):
        cells = []
        for gpu in GPUS.values():
            seconds = step_seconds(gpu, counted.flops(mode), counted.fetched(mode))
            cells.append(f"{seconds:.2f}" if _fits(counted, mode, gpu) else "-")
        rows.append([mode.label, *cells])
    return (
        f"{_aligned(rows)}\n\n"
        f"Times are estimates: {counted.flops(Mode()) / 1e12:.0f} TFLOP per step, "
        f"{counted.flops(Mode(checkpointing=1.0)) / 1e12:.0f} with gradient checkpointing, at an "
        f"assumed\n{UTILIZATION:.0%} of a GPU's bfloat16 peak. A dash: it does not fit."
        + "\nWith shard, weights are gathered over PCIe, and nothing overlaps."
        * (gpus > 1)
    )


def _chosen(counted: Figures, wishes: Wishes) -> str:
    """The mode of each GPU, and how many of the blocks it recomputes."""
    where = "chosen on an empty GPU" if wishes.gpus == 1 else f"chosen on {wishes.gpus} GPUs"
    rows = [[where, "mode", "blocks recomputed", "peak GB", "seconds per step"]]
    for name, gpu in GPUS.items():
        choice = choose(counted, round(gpu.memory * 1e9), wishes)
        mode = choice.mode
        seconds = step_seconds(gpu, counted.flops(mode), counted.fetched(mode))
        row = [f"{name}, {gpu.memory:g} GB", mode.label]
        row += [f"{counted.recomputed(mode)} of {counted.blocks}", _gb(choice.peak)]
        rows.append([*row, f"{seconds:.2f}" if choice.fits else "does not fit"])
    return _aligned(rows)


def _preservation(settings: Settings, counted: Figures) -> list[str]:
    """What preservation adds to the run; nothing if it is off."""
    if not settings.preserve:
        return []
    extent, mode = extent_of(settings), Mode()
    with_rows = counted.flops(mode)
    plain = with_rows - counted.preservation.flops(0.0)
    rows = f"{extent.rows} row{'s' * (extent.rows > 1)} of that size in every "
    rows += "batch" if extent.every == 1 else "second batch"
    steps = counted.preservation.images / plain
    edits = f", {extent.edits} of them edits of control images," if extent.edits else ""
    begins = f"after {BEGINS:.0%} of the steps"
    later, then = "\n", begins
    if extent.subject_images:
        later, then = f", and\n{extent.subject_images} of the subject {begins}, ", "from then on"
    return [
        f"Preservation: {extent.images} images of {extent.side} x {extent.side} pixels{edits} in "
        f"{extent.steps} steps before the first step{later}"
        f"take as long as {steps:.0f} steps; {then}\n"
        f"{rows}. Included above: a step takes {with_rows / plain - 1:.0%} longer on average."
    ]


def _writing_captions(settings: Settings) -> dict[str, int]:
    """Memory on a GPU to write captions before the run, by quantization; empty if it is off."""
    if not settings.autocaption:
        return {}
    captioner, gpu = captioner_of(settings.base, gpu=True), torch.device("cuda")
    return {
        Mode(each).label: bytes_needed(captioner, each, torch.bfloat16, batch_on(gpu))
        for each in KINDS
    }


def _captions(settings: Settings) -> list[str]:
    """The memory to write captions; nothing if it is off."""
    needs = [f"{_gb(size)} GB in {label}" for label, size in _writing_captions(settings).items()]
    name = captioner_of(settings.base, gpu=True).name
    return [f"Before that, {name} writes captions in {', '.join(needs)}."] if needs else []


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}"


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as text: the first column aligned left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1 if rows[1][0] else 2, "-" * max(map(len, lines)))
    return "\n".join(lines)
