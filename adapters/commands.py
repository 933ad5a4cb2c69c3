"""What the command `adapters` does: runs a tool and prints its result."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from adapters.archive import BrokenArchive, write_archive
from adapters.files.atomic import atomic_file
from adapters.formats import LoraMismatch
from adapters.tools import (
    Changed,
    Goal,
    ToolError,
    bake,
    by_block,
    check_files,
    check_output,
    convert,
    extract,
    inspect,
    merge,
    norms_figure,
    open_lora,
    resize,
    result_figure,
    shown,
    with_training_adapter,
    write,
)
from families.registry import UnknownBase, find_base_or_folder
from families.repository import MissingModel

ERRORS = (BrokenArchive, LoraMismatch, ToolError, UnknownBase, MissingModel, OSError)

_MAX_SCALE = 1000


def _inspect(arguments: argparse.Namespace) -> None:
    _check_chart(arguments)
    opened = open_lora(arguments.file, arguments.base)
    facts = inspect(opened)
    print(json.dumps(facts, indent=2) if arguments.json else shown(facts))
    _write_chart(arguments, lambda: norms_figure(by_block(facts["norms"])))


def _convert(arguments: argparse.Namespace) -> None:
    output = _output(arguments, f"{arguments.file.stem}-{arguments.to}.safetensors")
    opened = open_lora(arguments.file, arguments.base)
    converted = convert(opened, arguments.to)
    files = write(converted, output, arguments.overwrite)
    exact = "bit for bit" if not converted.rounded else f"{converted.rounded} rounded once"
    print(f"{', '.join(map(str, files))}: {converted.layers} layers, {exact}")
    _print(converted.notes)


def _merge(arguments: argparse.Namespace) -> None:
    scaled = [_scaled(word) for word in arguments.files]
    output = _output(arguments, f"{scaled[0][0].stem}-merged.zip")
    loras = [(open_lora(path, arguments.base), scale) for path, scale in scaled]
    _save(merge(loras, arguments.rank), output)


def _resize(arguments: argparse.Namespace) -> None:
    goal = Goal(arguments.rank, arguments.energy, arguments.size)
    output = _output(arguments, f"{arguments.file.stem}-resized.zip")
    _check_chart(arguments)
    result = resize(open_lora(arguments.file, arguments.base), goal)
    _save(result, output)
    _write_chart(arguments, lambda: result_figure(result))


def _turbo(arguments: argparse.Namespace) -> None:
    output = _output(arguments, f"{arguments.file.stem}-{arguments.tool}.zip")
    opened = open_lora(arguments.file, arguments.base)
    scale = arguments.sign * _scale(arguments.scale, "--scale ")
    _save(with_training_adapter(opened, scale, arguments.adapter), output)


def _bake(arguments: argparse.Namespace) -> None:
    path, scale = _scaled(arguments.file)
    suffix = ".safetensors" if arguments.layout == "comfyui" else ""
    output = arguments.output or Path(f"{path.stem}-baked{suffix}")
    options = arguments.dtype, arguments.layout, arguments.overwrite
    check_output(output, *options)
    baked = bake(open_lora(path, arguments.base), output, scale, *options)
    print(
        f"{', '.join(map(str, baked.files))}: {baked.nbytes / 1e9:,.2f} GB, {baked.layers} layers "
        f"changed\nThe LoRA changes these weights by {baked.change:.2%} of their norm. Rounding to "
        f"{arguments.dtype} by {baked.error:.2%}, which is {baked.error_of_change:.0%} of the "
        "LoRA's change."
    )
    _print(baked.notes)


def _extract(arguments: argparse.Namespace) -> None:
    output = _output(arguments, f"{arguments.tuned.stem}-extracted.zip")
    _check_chart(arguments)
    if not arguments.base:
        raise ToolError("name the model that it was tuned from, such as --base z-image")
    base = find_base_or_folder(arguments.base)
    found = extract(arguments.tuned, base, arguments.rank, arguments.energy)
    _save(found.changed, output)
    print(
        f"{found.explained:.2%} of the squared difference is explained; {found.equal} layers do "
        "not differ."
    )
    _write_chart(arguments, lambda: result_figure(found.changed))


RUN: dict[str, Callable[[argparse.Namespace], None]] = {
    "inspect": _inspect,
    "convert": _convert,
    "merge": _merge,
    "resize": _resize,
    "bake": _bake,
    "extract": _extract,
    "apply-turbo": _turbo,
    "remove-turbo": _turbo,
}


def _output(arguments: argparse.Namespace, default: str) -> Path:
    """The file to write, checked before anything is read."""
    output: Path = arguments.output or Path(default)
    wanted = Path(default).suffix
    if output.suffix != wanted:
        raise ToolError(f"{output}: this tool writes a {wanted} file; name it so")
    check_files([output], arguments.overwrite)
    return output


def _check_chart(arguments: argparse.Namespace) -> None:
    if arguments.chart is not None:
        if arguments.chart.suffix.lower() != ".svg":
            raise ToolError(f"{arguments.chart}: a chart is a .svg file; name it so")
        check_files([arguments.chart], getattr(arguments, "overwrite", False))


def _write_chart(arguments: argparse.Namespace, figure: Callable[[], str]) -> None:
    if arguments.chart is not None:
        with atomic_file(arguments.chart) as file:
            file.write(figure().encode())
        if not getattr(arguments, "json", False):
            print(f"{arguments.chart}: the chart")


def _save(result: Changed, output: Path) -> None:
    write_archive(result.archive, output)
    ranks = sorted({each.rank for each in result.layers})
    shown_ranks = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    print(
        f"{output}: {len(result.layers)} layers, rank {shown_ranks}, "
        f"{output.stat().st_size / 1e6:,.1f} MB"
    )
    worst = sorted(result.layers, key=lambda each: -each.error)[:5]
    print("Error of the change, ‖dW − result‖ / ‖dW‖, in the five worst layers:")
    for each in worst:
        print(f"  {each.error:8.2%}  rank {each.rank:<4} {each.layer}")
    _print(result.notes)


def _print(notes: tuple[str, ...]) -> None:
    for note in notes:
        print(f"  {note}")


def _scaled(word: str) -> tuple[Path, float]:
    """FILE or FILE:SCALE; a colon in a name needs a scale after it."""
    path, colon, scale = word.rpartition(":")
    if not colon or Path(word).exists():
        return Path(word), 1.0
    return Path(path), _scale(scale, f"{word}: write FILE:SCALE; ")


def _scale(word: str, before: str) -> float:
    """A LoRA's scale. Raises `ToolError` for text, NaN, and scales whose sums could overflow."""
    try:
        if abs(number := float(word)) <= _MAX_SCALE:  # not NaN
            return number
    except ValueError:
        pass
    raise ToolError(f"{before}{word!r} is not a number between -{_MAX_SCALE} and {_MAX_SCALE}")
