"""Parses settings and job files: YAML, JSON, TOML, and command lines as text."""

import json
import logging
import tomllib
from pathlib import Path
from typing import Any

import yaml

from adapters.files.containers import Unusable
from trainer.encodings import decode
from trainer.settings.inputs import SettingsError

log = logging.getLogger(__name__)

_COMMANDS = (".txt", ".sh", ".bat", ".ps1")
JOB_SUFFIXES = (".toml", *_COMMANDS)  # of job files of other programs only
MAX_VALUES = 10_000


def parse(path: Path, quiet: bool = False) -> Any:
    """The content of a file; a command line is its text. Raises `SettingsError` naming the file.

    Warns of an encoding that was guessed, unless `quiet`.
    """
    suffix = path.suffix.lower()
    kind = {".toml": "TOML", ".json": "JSON"}.get(suffix, "YAML")
    try:
        text, guess = decode(path.read_bytes())
        content: Any
        if suffix in _COMMANDS:
            content = text
        elif kind == "TOML":
            content = tomllib.loads(text)
        elif kind == "JSON":
            content = json.loads(text)
        else:
            content = yaml.safe_load(text)
    except OSError as error:
        raise SettingsError(
            f"{path}: {error.strerror}; pass a YAML file such as configs/z_image_turbo.yaml"
        ) from error
    except Unusable as error:
        raise SettingsError(f"{path}: {error}") from error
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"{path} is not a {kind} file: {reason}") from error
    if guess is not None and not quiet:
        beyond = [line.strip() for line in text.splitlines() if not line.isascii()]
        log.warning(
            "%s is not UTF-8 and is read as %s; if these lines are wrong, save it as UTF-8: %s",
            *(path, guess, " | ".join(line[:80] for line in beyond[:5])),
        )
    if _has_more_than(MAX_VALUES, content):
        raise SettingsError(
            f"{path} contains more than {MAX_VALUES:,} values; it is not a settings file"
        )
    return content


def companion(job: Path, key: str, name: Any) -> Path:
    """A file that a job names: relative to the working directory, else next to the job.

    Raises `SettingsError` if there is none.
    """
    try:
        for path in (Path(str(name)).expanduser(), job.parent / str(name)):
            if path.is_file():
                return path
    except (OSError, RuntimeError) as error:  # too long for a file system; "~" of an unknown user
        raise SettingsError(f"{key}: {str(name)[:80]} is not a path ({error})"[:300]) from error
    raise SettingsError(f"{key}: there is no file {name}, neither here nor in {job.parent}")


def _has_more_than(most: int, content: Any) -> bool:
    """Whether the content has more values, with those of YAML aliases counted at every use.

    A few lines of nested aliases can expand to billions of values.
    """
    waiting, seen = [content], 0
    while waiting and seen <= most:
        each = waiting.pop()
        seen += 1
        if isinstance(each, dict):
            waiting += [*each, *each.values()]
        elif isinstance(each, list | tuple | set):
            waiting += each
    return seen > most
