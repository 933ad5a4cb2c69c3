"""The console log, and the removal of secrets and control characters from all output.

Messages are cleaned on output, not where each of them is written.
"""

import logging
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# C0 and C1 except line feed and tab, line separators, direction overrides, surrogates.
_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_QUOTED_PATH = re.compile(r"(['\"])(/[^'\"\n]+)(?=\1)")
_PATH = re.compile(r"()((?<![\w.~</-])/(?!/)[^\s'\",;()<>|\[\]{}]+)")
_FILE_URL = re.compile(r"file:/\S+")
_TEMPORARY = re.compile(r"\btmp[a-z0-9_]{8}[\w.-]*")
LONGEST_KNOWN = 10_000  # characters; longer inputs are files, which no message repeats


def clean(text: str) -> str:
    """The text without control characters, and without queries and passwords of URLs.

    Line feeds and tabs are kept; other control characters are shown as escapes (`\\x1b`).
    """
    if "://" in text or "?" in text or "@" in text:
        text = "".join(map(_without_query, re.split(r"(\s+)", text)))
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _without_query(word: str) -> str:
    """The word; a URL in it without user, password, query and fragment.

    Not a regular expression: it would take minutes on a malicious long text.
    """
    before, found, rest = word.partition("://")
    if not found:
        return _without_scheme(word)
    bare = rest.rstrip("'\")],;:.!…")
    end = min((place for mark in "?#" if (place := bare.find(mark)) >= 0), default=len(bare))
    rest = bare[:end] + rest[len(bare) :]
    parts = [re.sub(r"^[^/'\"]*@", "", part) for part in rest.split("://")]
    return before + found + "://".join(parts)


def _without_scheme(word: str) -> str:
    """The same for a URL without a scheme: `host.example/path?key=…`."""
    at = word.find("@")
    colon = word.find(":", 0, at) if at > 0 else -1
    if colon > 0 and "." in word[at:]:
        start = len(word) - len(word.lstrip("'\"([{<"))
        word = word[:start] + word[at + 1 :]
    path, found, query = word.partition("?")
    if found and "=" in query and "." in path:
        bare = query.rstrip("'\")],;:.!…")
        return path + query[len(bare) :]
    return word


def clean_for(text: str, known: Iterable[str]) -> str:
    """The text for the user of a server, whose request consists of the `known` texts.

    Absolute paths that the request did not contain, and names of temporary files, are replaced.
    Line feeds in texts of the request are shown as escapes.
    """
    known = [each for each in known if len(each) <= LONGEST_KNOWN]
    for each in known:
        if "\n" in each or "\r" in each:
            text = text.replace(each, each.replace("\r", "\\r").replace("\n", "\\n"))

    def path(match: re.Match[str]) -> str:
        whole = match[2]
        bare = whole.rstrip(".:!?")
        if any(bare in each for each in known):
            return match[0]
        return f"{match[1]}<path>{whole[len(bare) :]}"

    text = clean(text)
    if (here := os.getcwd()) != "/":
        text = text.replace(f"{here}/", "")
    text = _FILE_URL.sub("<path>", text)
    text = _PATH.sub(path, _QUOTED_PATH.sub(path, text))
    return _TEMPORARY.sub("<file>", text)


def texts(value: Any) -> list[str]:
    """All texts in a JSON value or in the inputs of a request, at any depth."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for each in value.values() for text in texts(each)]
    if isinstance(value, (list, tuple)):
        return [text for each in value for text in texts(each)]
    return []


class _Plain(logging.Formatter):
    """Messages, with the level if above INFO. Cleans the text."""

    known: list[str] | None = None  # texts of the request; None if not on a server

    def format(self, record: logging.LogRecord) -> str:
        if self.known is not None:
            record.exc_text = record.stack_info = None
        text = super().format(record)
        text = clean(text) if self.known is None else clean_for(text, self.known)
        return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"

    def formatException(self, ei: Any) -> str:  # noqa: N802, the name is logging's
        if self.known is None:
            return super().formatException(ei)
        return f"{ei[0].__name__}: {ei[1]}"  # no traceback for users of a server


class _WithTime(_Plain):
    """Lines of a log file."""

    def __init__(self, hide: Callable[[str], str]) -> None:
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")
        self._hide = hide

    def format(self, record: logging.LogRecord) -> str:
        return self._hide(super().format(record))


_FORMAT = _Plain("%(message)s")

# Our packages, by the first part of a logger's name. Installed, they are in site-packages like any
# library.
_OURS = {"families", "adapters", "inference", "trainer", "serving"}
_PACKAGES = re.compile(r"[\\/](site|dist)-packages[\\/]")  # a folder of installed packages
_ROOT = Path(__file__).resolve().parents[1]
_KEPT_RECORDS = 500  # records before the log file is opened


def of_a_library(record: logging.LogRecord) -> bool:
    """Whether the record is from a library and below an error, so of no use to the user."""
    if record.name == "py.warnings":  # "file:line: Category: text"
        message = record.getMessage()
        return _PACKAGES.search(message) is not None or message.startswith(str(_ROOT))
    if record.levelno >= logging.ERROR or record.name.partition(".")[0] in _OURS:
        return False
    return _PACKAGES.search(record.pathname) is not None


class _Earlier(logging.Handler):
    """Keeps the newest records until the log file is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.records: deque[logging.LogRecord] = deque(maxlen=_KEPT_RECORDS)

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


_EARLIER = _Earlier()


def begin(line: str) -> None:
    """Prints the first line before the libraries are imported, which takes seconds."""
    print(clean(line), "loading libraries …", sep="\n", flush=True)


def log_to_console(known: list[str] | None = None, debug: bool = False) -> None:
    """Sends the log to standard output, unless logging is already configured.

    Records of libraries below an error, and their Python warnings, are shown only with `debug`;
    they are always in a run's log file (`log_to_file`). `known`: on a server, the texts of the
    request, whose user reads the log.
    """
    _FORMAT.known = known
    if known is not None:
        _EARLIER.records.clear()  # of another request
    if logging.root.handlers:
        return
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_FORMAT)
    if not debug:
        handler.addFilter(lambda record: not of_a_library(record))
    logging.basicConfig(level=logging.INFO, handlers=[handler, _EARLIER])
    logging.captureWarnings(True)


@contextmanager
def log_to_file(path: Path, hide: Callable[[str], str] = str) -> Iterator[None]:
    """Also appends the log to a file, with earlier records and those of libraries.

    `hide` removes secrets from each line.
    """
    try:
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError:  # a full disk, which the run reports itself
        yield
        return
    handler.setFormatter(_WithTime(hide))
    handler.handleError = lambda record: None  # type: ignore[method-assign]
    _route_libraries()
    for record in _EARLIER.records:
        handler.handle(record)
    _EARLIER.records.clear()
    logging.root.addHandler(handler)
    try:
        yield
    finally:
        logging.root.removeHandler(handler)
        handler.close()


def _route_libraries() -> None:
    """Routes library loggers with their own console handlers to the root logger."""
    for logger in [*logging.root.manager.loggerDict.values()]:
        if not isinstance(logger, logging.Logger) or logger.propagate:
            continue
        for handler in [*logger.handlers]:
            if type(handler) is logging.StreamHandler:
                logger.removeHandler(handler)
                logger.propagate = True


@contextmanager
def one_message(debug: bool, shown: bool = True, *expected: type[Exception]) -> Iterator[None]:
    """Ends the program with one line on an error; with `debug`, shows its traceback.

    `expected`: errors whose message is enough for the user. Without any, all errors are caught and
    their type is shown. `shown`: False in all processes of a launch but the first.
    """
    try:
        yield
    except Exception as error:
        if expected and not isinstance(error, expected):
            raise
        if debug:
            raise
        kind = "" if expected else f"{type(error).__name__}: "
        hint = "" if expected else " (--debug shows where)"
        sys.exit(f"error: {clean(f'{kind}{error}{hint}')}" if shown else 1)


@contextmanager
def stopped_quietly(debug: bool) -> Iterator[None]:
    """Ends the program without a traceback on Ctrl-C, with exit code 128 + SIGINT as in shells."""
    try:
        yield
    except KeyboardInterrupt:
        if debug:
            raise
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
