"""zeroprior COMMAND …: imports the command's package and calls it with the arguments.

A new command is a row of `COMMANDS`.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple


class Command(NamedTuple):
    """A row of `zeroprior --help`, and the function to call with the arguments."""

    group: str
    help: str
    function: str  # module:name, imported only when it is called
    first: tuple[str, ...] = ()  # arguments before the user's


COMMANDS = {
    "check": Command(
        "Train", "check images and captions, no GPU", "trainer.__main__:main", ("check",)
    ),
    "frames": Command("Train", "write frames of a video as images", "trainer.frames:main"),
    "caption": Command("Train", "write captions for images", "trainer.captions.__main__:main"),
    "train": Command("Train", "train a LoRA and a token from images", "trainer.__main__:main"),
    "plan": Command("Train", "show memory and time, no GPU", "trainer.__main__:main", ("plan",)),
    "pause": Command("Runs", "pause a run", "trainer.__main__:main", ("pause",)),
    "resume": Command("Runs", "resume a run", "trainer.__main__:main", ("resume",)),
    "stop": Command("Runs", "stop a run with a checkpoint", "trainer.__main__:main", ("stop",)),
    "save": Command("Runs", "save a run's current weights", "trainer.__main__:main", ("save",)),
    "preview": Command(
        "Runs", "generate preview images now", "trainer.__main__:main", ("preview",)
    ),
    "generate": Command("Generate", "generate images", "inference.__main__:main"),
    "serve": Command("Generate", "start an HTTP server (Cog's interface)", "serving.__main__:main"),
    "adapters": Command("Other", "inspect, convert, merge, bake LoRAs", "adapters.__main__:main"),
    "studio": Command("Other", "open a web page for all of this", "studio.__main__:main"),
    "demo": Command("Other", "train and generate with a small model, no GPU", "demo.__main__:main"),
    "download": Command("Other", "download base models", "families.download:main"),
    "completion": Command(
        "Other", "print completion for bash and zsh", "zeroprior.completion:main"
    ),
}

EXAMPLES = """\
Examples:
  zeroprior demo
  zeroprior plan imgs.zip --base z-image-turbo
  zeroprior train imgs.zip --base z-image-turbo --steps 800
  zeroprior generate --weights outputs/latest/weights.zip --prompt "a photo of <zwx>"

zeroprior COMMAND --help shows the options of a command. --debug shows the traceback of an error.
"""


def main() -> None:
    """Reads the name of the command and calls it."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage(), end="")
        return
    if name == "--version":
        from importlib.metadata import version

        print(f"zeroprior {version('zeroprior')}")
        return
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(COMMANDS)}"
        print(f"error: unknown command {name}; {hint}", file=sys.stderr)
        sys.exit(2)
    call(COMMANDS[name], arguments)


def call(command: Command, arguments: Sequence[str]) -> None:
    """Imports the command's function and calls it with the arguments.

    An error is one message, and Ctrl-C none; with `--debug`, the traceback is shown.
    """
    from inference.console import one_message, stopped_quietly

    module, function = command.function.split(":")
    debug = "--debug" in arguments
    with one_message(debug), stopped_quietly(debug):
        getattr(importlib.import_module(module), function)([*command.first, *arguments])


def usage() -> str:
    """The text of `zeroprior --help`."""
    lines = [
        "usage: zeroprior COMMAND [options]",
        "",
        "Train LoRAs for Qwen-Image and Z-Image with a new token for your subject, and generate",
        "images with them.",
    ]
    for group in dict.fromkeys(command.group for command in COMMANDS.values()):
        lines += ["", f"{group}:"]
        lines += [f"  {n:<12}{each.help}" for n, each in COMMANDS.items() if each.group == group]
    return "\n".join([*lines, "", EXAMPLES])


if __name__ == "__main__":
    main()
