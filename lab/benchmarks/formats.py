"""python -m lab.benchmarks.formats > docs/formats.md: which LoRA files are read, and how exactly.

Every case is a real file, applied to a small model of the published class. Ours goes through
`read_archive`, `Layout.fit` and `LoraMerger`; diffusers' through `load_lora_weights` and
`fuse_lora`. What counts is the weights afterwards, against a float64 reference.
"""

import json
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from adapters.archive import BrokenArchive, read_archive
from adapters.formats.factors import LoraMismatch
from adapters.formats.layout import Layout
from adapters.merging import LoraMerger
from families.registry import FAMILIES
from lab.benchmarks.format_cases import BROKEN, CASES, Case, LoraFile
from lab.benchmarks.models import MODELS

ORIGINAL_NAMES = {family.title: family.original_names for family in FAMILIES.values()}

HEAD = """# LoRA files

Made by `python -m lab.benchmarks.formats > docs/formats.md`;
`tests/adapters/formats/test_formats.py` computes our columns again and compares them.

A layer name is accepted if it means exactly one of the model's layers. All layers of a file are
applied (`n of n`), or the file is refused with the names of those that are unknown, incomplete or
of another size, and no weight is changed. Only safetensors files are read.

**OK n of n**: every weight then equals W0 + dW to float32 rounding, where dW is alpha/rank B A or
what the format defines, computed separately in float64; no other weight has changed, and removing
the LoRA restores every weight exactly. For diffusers {diffusers} the same file went through
`load_lora_weights` and `fuse_lora` on the same model; **raises** is an exception, **no-op** changes
no weight and raises nothing, **×k** is the wrong strength, **garbage** is computing with
uninitialized memory.

"""
NOTES = """
- **alpha** is a layer's own `.alpha`. Else it comes from `lora_adapter_metadata` in the header or
  from PEFT's `adapter_config.json` in the same archive, folder or Hub repository (with
  `rank_pattern`, `alpha_pattern`, `use_rslora`). Else, for kohya's names, it is `ss_network_alpha`
  in the header. Else it is the rank. It is applied once. An `adapter_config.json` that contradicts
  the file or the header is an error; the log names settings that are not read. In a folder with
  several LoRAs it applies to `adapter_model.safetensors` only.
- `ss_network_alpha` is not applied to `lora_A`/`lora_B`: the converters that write these names have
  multiplied it into the weights and left the header unchanged.
- If a trainer used another alpha and did not write it (×0.5 above), no reader can know it: set the
  scale by hand.
- **Names**: `transformer.`, `diffusion_model.`, `model.`, `base_model.model.`, `unet.`, `dit.` and
  the like in front; `_orig_mod.` and `module.` anywhere; any adapter name in `lora_A.NAME.weight`;
  one or several underscores after `lora_unet`, `lora_transformer` and `lycoris`. Other parts in
  front of a block's layer are accepted if they do not name another component (a text encoder, a
  VAE, a ControlNet). A name that may mean two layers is refused with both.
- Layers of a text encoder are not applied, so a LoRA with such layers is refused.
- A plain `.weight` next to a LoRA is refused: the file does not say whether it is a change.
- A LoRA whose layers are mostly zero, or too small for the base model's dtype, is applied
  with a warning.
- A file with a layer twice, fused and separate, is read if both are equal, else refused.
- DoRA is W = m (W0 + dV) / ‖W0 + dV‖ by row, or by column where `dora_scale` is [1, in]. A
  `lora_scale` goes in a straight line from W0 through W, as in ComfyUI.
- LoKr, LoHa, DoRA and whole changes need an unquantized base model.
- A `lora_A` of rank above 1024, or a file above 8 GiB, is refused.
"""


def ours(name: str, case: Case) -> str:
    """What our reader makes of a case on a model: a cell of the table."""
    transformer = MODELS[name]()
    before = _weights(transformer)
    bits = _bits(transformer)
    file = case.write(before)
    layout = Layout.of(transformer, name, ORIGINAL_NAMES[name])
    merger = LoraMerger(transformer)
    with tempfile.TemporaryDirectory() as folder:
        path = _write(file, Path(folder))
        try:
            deltas = layout.fit(read_archive(path).deltas, "file")
        except (BrokenArchive, LoraMismatch) as error:
            if _bits(transformer) != bits:
                return "refused, base CHANGED"
            known = case.refused is not None and case.refused in str(error)
            return "refused" if known else f"refused: {error}"
    merger.apply([(deltas, 1.0)])
    cell = _judge(before, _weights(transformer), file.after)
    merger.restore()
    return cell if _bits(transformer) == bits else f"{cell}, base CHANGED"


def theirs(name: str, case: Case) -> str:
    """What diffusers makes of it."""
    import diffusers

    family = next(each for each in FAMILIES.values() if each.title == name)
    pipeline_class = getattr(diffusers, family.classes.pipeline)
    transformer = MODELS[name]()
    pipeline: Any = pipeline_class.__new__(pipeline_class)  # some read their tokenizer at once
    diffusers.DiffusionPipeline.__init__(pipeline)
    parts = dict.fromkeys(("scheduler", "vae", "text_encoder", family.tokenizer_folder))
    pipeline.register_modules(transformer=transformer, **parts)
    before = _weights(transformer)
    file = case.write(before)
    with tempfile.TemporaryDirectory() as folder:
        path = _write(file, Path(folder))
        try:
            pipeline.load_lora_weights(folder, weight_name=path.name)
        except Exception:
            return "raises"
    if any(parameter.is_meta for parameter in transformer.parameters()):
        return "loads, garbage"
    # As float32 drawing would use it, without a trace of how it is kept.
    if any(hasattr(module, "merge") for module in transformer.modules()):
        pipeline.fuse_lora()
    found = {
        name.replace(".base_layer", ""): weight for name, weight in _weights(transformer).items()
    }
    if case.refused is not None:
        if all(torch.equal(weight, found[name]) for name, weight in before.items()):
            return "no-op"
        nan = any(not weight.isfinite().all() for weight in found.values())
        return "loads NaN" if nan else "loads the rest"
    return _judge(before, found, file.after)


def _judge(before: dict[str, Tensor], found: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
    """One cell: how far the weights are from what they should be."""
    right, still, ratios = 0, 0, []
    for name, weight in before.items():
        moved = found[name].double() - weight.double()
        delta = wanted.get(name, weight.double()) - weight.double()
        if name not in wanted:
            if moved.any():
                return f"changes {name}, which it should not"
        elif (moved - delta).norm() <= 2**-22 * (weight.double().norm() + delta.norm()):
            right += 1
        elif not moved.any():
            still += 1
        else:
            ratio = ((moved * delta).sum() / delta.norm() ** 2).item()
            aside = (moved - ratio * delta).norm() / delta.norm()
            ratios.append(round(ratio, 2) if aside < 0.01 else None)
    count = f"{right} of {len(wanted)}"
    if right == len(wanted):
        return f"OK {count}"
    if still == len(wanted):
        return "no-op"
    if ratios and len(ratios) == len(wanted) and len(set(ratios)) == 1 and ratios[0] is not None:
        return f"WRONG ×{ratios[0]:g}"
    return f"WRONG {count}"


def _write(file: LoraFile, folder: Path) -> Path:
    path = folder / "lora.safetensors"
    tensors = {key: value.contiguous().clone() for key, value in file.tensors.items()}
    whole = save(tensors, metadata=file.metadata or None)
    path.write_bytes(file.spoil(whole) if file.spoil else whole)
    if file.config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(file.config))
    return path


def _weights(transformer: nn.Module) -> dict[str, Tensor]:
    """Copies of weights, by layer, and of biases as `<layer>.bias`."""
    return {
        name.removesuffix(".weight"): parameter.detach().clone()
        for name, parameter in transformer.named_parameters()
        if ".lora_" not in name and ".lokr_" not in name
    }


def _bits(transformer: nn.Module) -> bytes:
    return b"".join(p.detach().numpy().tobytes() for p in transformer.parameters())


def table(cases: tuple[Case, ...], cell: Callable[[str, Case], str]) -> list[list[str]]:
    """The cells of a column for each model, by row."""
    return [
        ["–" if case.only not in (None, name) else cell(name, case) for name in MODELS]
        for case in cases
    ]


def document(theirs_too: bool = True) -> str:
    """docs/formats.md; without diffusers' columns, which take the time, for a comparison."""
    import diffusers

    lines = [HEAD.format(diffusers=diffusers.__version__)]
    for title, cases in (("Read", CASES), ("Refused", BROKEN)):
        columns = [("", ours), *([("diffusers: ", theirs)] if theirs_too else [])]
        heads = [f"{whose}{name}" for whose, _ in columns for name in MODELS]
        by = ["written by"] if any(case.who for case in cases) else []
        head = ["file", *by, *heads]
        lines += [f"## {title}\n", _row(head), _row(["---"] * len(head))]
        cells = [table(cases, cell) for _, cell in columns]
        for case, *row in zip(cases, *cells, strict=True):
            lines.append(_row([case.layout, *([case.who] if by else []), *sum(row, [])]))
        lines.append("")
    return "\n".join(lines) + NOTES


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    print(document(), end="")


if __name__ == "__main__":
    main()
