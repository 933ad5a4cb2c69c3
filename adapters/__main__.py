"""python -m adapters TOOL …: the tools for LoRA files.

Reads the command line without PyTorch; `adapters.commands` runs the tools.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from families.registry import FAMILIES

EPILOG = """\
Examples:
  %(prog)s inspect lora.safetensors
  %(prog)s convert weights.zip --to comfyui
  %(prog)s merge cat.zip:0.8 watercolor.safetensors:0.6 -o both.zip
  %(prog)s resize weights.zip --energy 0.95
  %(prog)s bake weights.zip:0.9 --base z-image-turbo -o my-model
  %(prog)s extract tuned/transformer --base z-image --rank 32
  %(prog)s remove-turbo lora.safetensors --base z-image-turbo

A LoRA is a weights.zip or a .safetensors file of any program (docs/formats.md). Results keep the
placeholder tokens. docs/adapters.md explains every tool.
"""


def main(words: Sequence[str] | None = None) -> None:
    """Runs one tool. An error is one message on stderr."""
    arguments = arguments_parser().parse_args(words)
    from adapters.commands import ERRORS, RUN

    # As an exception, so that partial files are removed.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        RUN[arguments.tool](arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except ERRORS as error:
        if arguments.debug:
            raise
        sys.exit(f"error: {error}")
    finally:
        signal.signal(signal.SIGTERM, before)


def arguments_parser() -> argparse.ArgumentParser:
    """The options of all tools."""
    top = argparse.ArgumentParser(
        prog="zeroprior adapters",
        description="Tools for LoRA files.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    programs = dict.fromkeys(n for family in FAMILIES.values() for n in family.lora_readers)
    tools = top.add_subparsers(dest="tool", required=True, metavar="TOOL")

    tool = _add(tools, "inspect", "show base, ranks, norms, tokens, and which programs read it")
    tool.add_argument("file", type=Path)
    tool.add_argument("--json", action="store_true", help="print JSON, with the norm of each layer")
    _add_chart(tool, "the norm of each block")

    tool = _add(tools, "convert", "write the layout that another program reads")
    tool.add_argument("file", type=Path)
    tool.add_argument("--to", required=True, choices=programs, help="the program")
    _add_output(tool, "NAME-PROGRAM.safetensors")

    tool = _add(tools, "merge", "add LoRAs up, each with its scale")
    tool.add_argument(
        "files", nargs="+", metavar="FILE[:SCALE]", help="a LoRA, scale 1 or as given"
    )
    tool.add_argument("--rank", type=_positive, help="approximate at this rank; default: exact")
    _add_output(tool, "NAME-merged.zip")

    tool = _add(tools, "resize", "change the rank, with the least error")
    tool.add_argument("file", type=Path)
    goals = tool.add_mutually_exclusive_group(required=True)
    goals.add_argument("--rank", type=_positive, help="of every layer")
    goals.add_argument("--energy", type=float, help="share of the squared norm to keep: 0.95")
    goals.add_argument("--size", type=float, metavar="MB", help="of the result")
    _add_output(tool, "NAME-resized.zip")
    _add_chart(tool, "energy, rank and error of the layers")

    tool = _add(tools, "bake", "write the base model's transformer with a LoRA in it")
    tool.add_argument("file", metavar="FILE[:SCALE]", help="a LoRA, scale 1 or as given")
    tool.add_argument("--dtype", choices=("bf16", "fp8"), default="bf16", help="of the weights")
    tool.add_argument(
        "--layout",
        choices=("diffusers", "comfyui"),
        default="diffusers",
        help="a folder, or one file for ComfyUI; default: diffusers",
    )
    _add_output(tool, "NAME-baked, or NAME-baked.safetensors for ComfyUI")

    tool = _add(tools, "extract", "make a LoRA of the difference between two models")
    tool.add_argument("tuned", type=Path, help="a transformer's folder or .safetensors file")
    tool.add_argument("--rank", type=_positive, required=True, help="of every layer")
    tool.add_argument("--energy", type=float, help="lower ranks that explain this share: 0.95")
    _add_output(tool, "NAME-extracted.zip")
    _add_chart(tool, "energy, rank and error of the layers")

    for name, sign, what in (
        ("apply-turbo", 1.0, "add the base's training adapter to a LoRA"),
        ("remove-turbo", -1.0, "subtract the base's training adapter from a LoRA"),
    ):
        tool = _add(tools, name, what)
        tool.add_argument("file", type=Path)
        tool.add_argument("--scale", default="1", help="of the adapter; default: 1")
        tool.add_argument("--adapter", default="", help="its version; default: the newest")
        _add_output(tool, f"NAME-{name}.zip")
        tool.set_defaults(sign=sign)
    return top


def _add(tools: argparse._SubParsersAction, name: str, what: str) -> argparse.ArgumentParser:
    tool: argparse.ArgumentParser = tools.add_parser(name, help=what, description=what)
    tool.add_argument("--base", default="", help="the base model; default: found by the file")
    tool.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return tool


def _add_output(tool: argparse.ArgumentParser, default: str) -> None:
    tool.add_argument("-o", "--output", type=Path, help=f"default: {default}")
    tool.add_argument("--overwrite", action="store_true", help="replace existing files")


def _add_chart(tool: argparse.ArgumentParser, what: str) -> None:
    tool.add_argument("--chart", type=Path, metavar="FILE.svg", help=f"write a chart: {what}")


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word} is not positive")
    return number


if __name__ == "__main__":
    main()
