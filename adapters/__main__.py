"""python -m adapters TOOL …: inspects, converts, merges and resizes LoRA files."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from adapters.archive import BrokenArchive, write_archive
from adapters.formats import PROGRAMS, LoraMismatch
from adapters.tools import (
    DTYPES,
    LAYOUTS,
    Changed,
    Goal,
    ToolError,
    bake,
    check_output,
    convert,
    extract,
    inspect,
    merge,
    open_lora,
    refuse_existing,
    resize,
    shown,
    with_training_adapter,
    write,
)
from families.registry import UnknownBase, find_base_or_folder
from families.repository import MissingModel

EPILOG = """\
Examples:
  %(prog)s inspect lora.safetensors
  %(prog)s convert weights.zip --to comfyui
  %(prog)s merge cat.zip:0.8 watercolor.safetensors:0.6 -o both.zip
  %(prog)s resize weights.zip --energy 0.95
  %(prog)s remove-turbo lora.safetensors --base z-image-turbo

A LoRA is a weights.zip or a .safetensors file of any program (docs/formats.md). Results keep the
placeholder tokens. docs/adapters.md explains every tool.
"""


def main(words: Sequence[str] | None = None) -> None:
    """Runs one tool. An error is one message on stderr."""
    arguments = parser().parse_args(words)
    try:
        arguments.run(arguments)
    except (BrokenArchive, LoraMismatch, ToolError, UnknownBase, MissingModel, OSError) as error:
        if arguments.debug:
            raise
        sys.exit(f"error: {error}")


def parser() -> argparse.ArgumentParser:
    """The options of all tools."""
    top = argparse.ArgumentParser(
        prog="zeroprior adapters",
        description="Tools for LoRA files.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tools = top.add_subparsers(required=True, metavar="TOOL")

    tool = _add(tools, "inspect", "show base, ranks, norms, tokens, and which programs read it")
    tool.add_argument("file", type=Path)
    tool.add_argument("--json", action="store_true", help="print JSON, with the norm of each layer")
    tool.set_defaults(run=_inspect)

    tool = _add(tools, "convert", "write the layout that another program reads")
    tool.add_argument("file", type=Path)
    tool.add_argument("--to", required=True, choices=list(PROGRAMS), help="the program")
    _add_output(tool, "NAME-PROGRAM.safetensors")
    tool.set_defaults(run=_convert)

    tool = _add(tools, "merge", "add LoRAs up, each with its scale")
    tool.add_argument(
        "files", nargs="+", metavar="FILE[:SCALE]", help="a LoRA, scale 1 or as given"
    )
    tool.add_argument("--rank", type=_positive, help="approximate at this rank; default: exact")
    _add_output(tool, "NAME-merged.zip")
    tool.set_defaults(run=_merge)

    tool = _add(tools, "resize", "change the rank, with the least error")
    tool.add_argument("file", type=Path)
    goals = tool.add_mutually_exclusive_group(required=True)
    goals.add_argument("--rank", type=_positive, help="of every layer")
    goals.add_argument("--energy", type=float, help="share of the squared norm to keep: 0.95")
    goals.add_argument("--size", type=float, metavar="MB", help="of the result")
    _add_output(tool, "NAME-resized.zip")
    tool.set_defaults(run=_resize)

    tool = _add(tools, "bake", "write the base model's transformer with a LoRA in it")
    tool.add_argument("file", metavar="FILE[:SCALE]", help="a LoRA, scale 1 or as given")
    tool.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the weights")
    tool.add_argument(
        "--layout",
        choices=LAYOUTS,
        default="diffusers",
        help="a folder, or one file for ComfyUI; default: diffusers",
    )
    _add_output(tool, "NAME-baked, or NAME-baked.safetensors for ComfyUI")
    tool.set_defaults(run=_bake)

    tool = _add(tools, "extract", "make a LoRA of the difference between two models")
    tool.add_argument("tuned", type=Path, help="a transformer's folder or .safetensors file")
    tool.add_argument("--rank", type=_positive, required=True, help="of every layer")
    tool.add_argument("--energy", type=float, help="lower ranks that explain this share: 0.95")
    _add_output(tool, "NAME-extracted.zip")
    tool.set_defaults(run=_extract)

    for name, sign, what in (
        ("apply-turbo", 1.0, "add the base's training adapter to a LoRA"),
        ("remove-turbo", -1.0, "subtract the base's training adapter from a LoRA"),
    ):
        tool = _add(tools, name, what)
        tool.add_argument("file", type=Path)
        tool.add_argument("--scale", type=_finite, default=1.0, help="of the adapter; default: 1")
        tool.add_argument("--adapter", default="", help="its version; default: the newest")
        _add_output(tool, f"NAME-{name}.zip")
        tool.set_defaults(run=_turbo, sign=sign, tool=name)
    return top


def _add(tools: argparse._SubParsersAction, name: str, what: str) -> argparse.ArgumentParser:
    tool: argparse.ArgumentParser = tools.add_parser(name, help=what, description=what)
    tool.add_argument("--base", default="", help="the base model; default: found by the file")
    tool.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return tool


def _add_output(tool: argparse.ArgumentParser, default: str) -> None:
    tool.add_argument("-o", "--output", type=Path, help=f"default: {default}")
    tool.add_argument("--overwrite", action="store_true", help="replace existing files")


def _inspect(arguments: argparse.Namespace) -> None:
    opened = open_lora(arguments.file, arguments.base)
    facts = inspect(opened)
    print(json.dumps(facts, indent=2) if arguments.json else shown(facts))


def _convert(arguments: argparse.Namespace) -> None:
    output = _output(arguments, f"{arguments.file.stem}-{arguments.to}.safetensors")
    opened = open_lora(arguments.file, arguments.base)
    converted = convert(opened, arguments.to)
    files = write(converted, output, arguments.overwrite)
    exact = "bit for bit" if not converted.rounded else f"{converted.rounded} rounded once"
    print(f"{', '.join(map(str, files))}: {converted.layers} layers, {exact}")
    for note in converted.notes:
        print(f"  {note}")


def _merge(arguments: argparse.Namespace) -> None:
    scaled = [_scaled(word) for word in arguments.files]
    output = _output(arguments, f"{scaled[0][0].stem}-merged.zip")
    loras = [(open_lora(path, arguments.base), scale) for path, scale in scaled]
    _save(merge(loras, arguments.rank), output)


def _resize(arguments: argparse.Namespace) -> None:
    goal = Goal(arguments.rank, arguments.energy, arguments.size)
    output = _output(arguments, f"{arguments.file.stem}-resized.zip")
    _save(resize(open_lora(arguments.file, arguments.base), goal), output)


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
        f"{arguments.dtype}: {baked.error:.2%} of the weights, {baked.error_of_change:.1%} of the "
        "LoRA's change."
    )
    for note in baked.notes:
        print(f"  {note}")


def _extract(arguments: argparse.Namespace) -> None:
    output = _output(arguments, f"{arguments.tuned.stem}-extracted.zip")
    if not arguments.base:
        raise ToolError("name the model that it was tuned from, such as --base z-image")
    base = find_base_or_folder(arguments.base)
    found = extract(arguments.tuned, base, arguments.rank, arguments.energy)
    _save(found.changed, output)
    print(
        f"{found.explained:.2%} of the squared difference is explained; {found.equal} layers do "
        "not differ."
    )


def _turbo(arguments: argparse.Namespace) -> None:
    output = _output(arguments, f"{arguments.file.stem}-{arguments.tool}.zip")
    opened = open_lora(arguments.file, arguments.base)
    scale = arguments.sign * arguments.scale
    _save(with_training_adapter(opened, scale, arguments.adapter), output)


def _output(arguments: argparse.Namespace, default: str) -> Path:
    """The file to write, checked before anything is read."""
    output: Path = arguments.output or Path(default)
    wanted = Path(default).suffix
    if output.suffix != wanted:
        raise ToolError(f"{output}: this tool writes a {wanted} file; name it so")
    refuse_existing([output], arguments.overwrite)
    return output


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
    for note in result.notes:
        print(f"  {note}")


def _scaled(word: str) -> tuple[Path, float]:
    """FILE or FILE:SCALE; a colon in a name needs a scale after it."""
    path, colon, scale = word.rpartition(":")
    if not colon or Path(word).exists():
        return Path(word), 1.0
    try:
        return Path(path), _finite(scale)
    except ValueError:
        raise ToolError(f"{word}: {scale!r} is not a number; write FILE:SCALE") from None


def _finite(word: str) -> float:
    """A number. Raises ValueError for text, NaN and infinity."""
    number = float(word)
    if not math.isfinite(number):
        raise ValueError
    return number


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word} is not positive")
    return number


if __name__ == "__main__":
    main()
