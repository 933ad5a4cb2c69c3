"""Shell completion: a script with all commands and options; runs no Python on Tab."""

import argparse
from collections.abc import Iterable

SCRIPT = """\
# bash: eval "$(zeroprior completion)"
# zsh:  autoload -U +X bashcompinit && bashcompinit && eval "$(zeroprior completion)"
_zeroprior() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" options=""
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{commands}" -- "$word"))
  elif [ "${{word#-}}" != "$word" ]; then
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
    COMPREPLY=($(compgen -W "$options --debug --help" -- "$word"))
  fi
}}
complete -o default -F _zeroprior zeroprior
"""


def main(arguments: list[str]) -> None:
    """Prints the script."""
    from inference.__main__ import arguments_parser as generate
    from studio.__main__ import arguments_parser as studio
    from trainer.__main__ import arguments_parser as train
    from trainer.captions import __main__ as caption
    from zeroprior.__main__ import COMMANDS

    argparse.ArgumentParser(
        prog="zeroprior completion",
        description="Print the completion script for bash and zsh; in the shell's start file: "
        'eval "$(zeroprior completion)"',
    ).parse_args(arguments)
    cases = {"train|plan": _options(train()), "generate": _options(generate())}
    cases["caption"] = _options(caption.arguments_parser())
    cases["studio"] = _options(studio())
    lines = [f'      {names}) options="{" ".join(each)}" ;;' for names, each in cases.items()]
    print(SCRIPT.format(commands=" ".join(COMMANDS), cases="\n".join(lines)), end="")


def _options(parser: argparse.ArgumentParser) -> Iterable[str]:
    """The options in the help, spelled with hyphens."""
    for action in parser._actions:
        if action.help != argparse.SUPPRESS:
            yield from (each for each in action.option_strings if "_" not in each and each != "-h")
