"""Command-line options from a record of inputs."""

import argparse
import difflib
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

from inference.input_fields import Input, Inputs, Interface, number_of

_ALSO = {"base_model": ("--base",)}  # shorter spellings, hidden in --help
_METAVARS: dict[type, str] = {int: "N", float: "X", Path: "FILE"}


_MODULES = {
    "train": "python -m trainer",
    "plan": "python -m trainer plan",
    "check": "python -m trainer check",
    "generate": "python -m inference",
    "caption": "python -m trainer.captions",
}


def typed() -> dict[str, str]:
    """How the commands are typed: as this program was started, by the command or by a module."""
    program = Path(sys.argv[0])
    if "zeroprior" in (program.stem, program.parent.name):
        return {name: f"zeroprior {name}" for name in _MODULES} | {"program": "zeroprior"}
    return _MODULES | {"program": "python -m trainer"}


class Parser(argparse.ArgumentParser):
    """A parser without abbreviations that suggests the nearest option for an unknown one."""

    def __init__(self, **options: Any) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(**options, formatter_class=formatter, allow_abbrev=False)
        self.add_argument(
            "--debug",
            action="store_true",
            help="show the traceback of an error",
            default=argparse.SUPPRESS,
        )

    def read(self, words: Sequence[str] | None = None) -> dict[str, Any]:
        """Parses a command line to options by name."""
        found, unknown = self.parse_known_intermixed_args(words)
        for word in unknown:
            self._refuse(word)
        return vars(found)

    def _refuse(self, word: str) -> NoReturn:
        option = word.partition("=")[0]
        known = [each for action in self._actions for each in action.option_strings]
        if not option.startswith("--"):
            self.error(f"unexpected argument {word}")
        near = [each for each in known if each.startswith(option)]
        near = near or difflib.get_close_matches(option, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        self.error(f"unknown option {option}{hint}")


def add_inputs(
    parser: argparse.ArgumentParser,
    model: type[Inputs],
    groups: Sequence[str],
    without: Collection[str] = (),
) -> "dict[str, argparse._ArgumentGroup]":
    """Adds an option for every input of the command line; returns the groups of `--help`.

    Each has two spellings, --base-model and --base_model. Options that are not given are not in the
    result. Values are checked by the record, for the same messages as on other interfaces.
    """
    sections = {group: parser.add_argument_group(group) for group in groups}
    for name, each in model.inputs().items():
        if Interface.COMMAND_LINE in each.on and name not in without:
            options = _options(model.types(name), each)
            add(sections[each.group], name, _help(each, model.default(name)), **options)
    return sections


def add(section: "argparse._ActionsContainer", name: str, help: str, **options: Any) -> None:
    """Adds an option with both spellings; --help shows the one with hyphens."""
    options = {"dest": name, "default": argparse.SUPPRESS} | options
    spellings = dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}", *_ALSO.get(name, ())))
    for number, spelling in enumerate(spellings):
        section.add_argument(spelling, help=argparse.SUPPRESS if number else help, **options)


def _options(types: Sequence[type], each: Input) -> dict[str, Any]:
    if types == (bool,):
        return {"action": argparse.BooleanOptionalAction}
    if types == (Sequence,):
        return {"nargs": "+", "metavar": "FILE"}
    read = str if str in types else lambda text: _value(text, types)
    return {"type": read, "metavar": _metavar(types, each)}


def _value(text: str, types: Sequence[type]) -> Any:
    number = number_of(text, types)
    return text if number is None else number


def _metavar(types: Sequence[type], each: Input) -> str:
    if each.choices and not each.separator:
        return f"{{{','.join(each.choices)}}}"
    return "TEXT" if str in types and Path not in types else _METAVARS.get(types[0], "TEXT")


def _help(each: Input, default: object) -> str:
    """The help text: description, range and default, escaped for argparse."""
    text, mark, words = each.description.partition(" Default: ")
    if each.ge is not None and each.le is not None and each.le < 2**62:
        text += f" From {each.ge:g} to {each.le:g} {each.unit}".rstrip() + "."
    if not mark and not isinstance(default, bool) and default not in (None, "", []):
        mark, words = " Default: ", f"{default:g}." if isinstance(default, float) else f"{default}."
    return f"{text}{mark}{words}".replace("%", "%%")
