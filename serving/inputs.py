"""Wraps `train` and `predict`: defaults, logging, and error messages for users."""

import difflib
import functools
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any, ParamSpec, TypeVar
from urllib.parse import quote

from cog import FieldInfo, current_scope
from coglet import server

from families.redact import safe_name
from inference.console import clean, clean_for, log_to_console, texts
from inference.fetch import is_data
from serving.processes import end_with_parent
from serving.threads import start_threads_safely

_OURS = ("adapters", "families", "inference", "trainer", "serving")
_SHORT = "zeroprior_user_error"  # attribute of an error that is printed without its traceback
_CACHED = re.compile(r"\b[0-9a-f]{64}\b")  # the name of a download in the cache

P = ParamSpec("P")
T = TypeVar("T")


class RequestError(Exception):
    """A failed request, with a one-line reason for its sender."""


def metric(name: str, value: float) -> None:
    """Records a metric of the running prediction or training; without one, does nothing."""
    current_scope().record_metric(name, value)  # type: ignore[attr-defined]


def served() -> bool:
    """True inside the worker of Cog's server, False in plain Python."""
    return bool(server.active)


if served():
    start_threads_safely()
    end_with_parent()


def entry_point(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator of `train` and `predict`: resolves defaults, suggests input names, and `logged`.

    In plain Python, inputs that are not given would be Cog's `FieldInfo` objects; they are replaced
    by their defaults.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in kwargs.keys() - signature.parameters.keys():
            (near,) = difflib.get_close_matches(name, signature.parameters, n=1, cutoff=0)
            raise TypeError(f"unknown input {name!r}; did you mean {near!r}?")
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            if isinstance(value, FieldInfo):
                bound.arguments[name] = value.default
        with logged({name: v for name, v in bound.arguments.items() if name != "self"}):
            return function(*bound.args, **bound.kwargs)

    return call


@contextmanager
def logged(inputs: Mapping[str, Any]) -> Iterator[None]:
    """Logs one call to standard output, which the runtime collects for the sender.

    In plain Python, an uncaught user error is printed as one line, without a traceback. In a
    server, an error becomes a `RequestError`: one line without paths. Its traceback goes only to
    the server's log, which is the process's original standard error.
    """
    if not served():
        log_to_console()
        try:
            yield
        except Exception as error:
            if _is_the_users(error):
                _show_in_one_line(error)
            raise
        return
    known = texts(inputs)
    log_to_console(known)
    try:
        yield
        return
    except Exception as error:
        print(_without_keys(clean(traceback.format_exc()), inputs), file=sys.__stderr__, flush=True)
        line = reason(error, inputs)
    raise RequestError(line)


def _without_keys(text: str, inputs: Mapping[str, Any]) -> str:
    """The text with the request's keys redacted, which a library's error may contain."""
    for value in inputs.values():
        if hasattr(value, "get_secret_value") and (key := value.get_secret_value().strip()):
            for form in {key, quote(key), quote(key, safe=""), repr(key)[1:-1]}:
                text = text.replace(form, "**********")
    return text


def _is_the_users(error: Exception) -> bool:
    """Whether this is a user error, whose message says what to do without a traceback."""
    ours = type(error).__module__.partition(".")[0] in _OURS
    if ours or isinstance(error, OSError) or type(error) is not ValueError:
        return ours or isinstance(error, OSError)
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)  # a ValueError: raised by us?
    return frame.f_globals.get("__name__", "").partition(".")[0] in _OURS


def _show_in_one_line(error: Exception) -> None:
    """Prints this error, if uncaught, as one line with the place in the user's script.

    A custom `sys.excepthook` of the program is kept.
    """
    setattr(error, _SHORT, True)
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _hook


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not getattr(error, _SHORT, False):
        sys.__excepthook__(kind, error, trace)
        return
    place = traceback.extract_tb(trace, limit=1)[0]
    line = f"error: {error} ({Path(place.filename).name}, line {place.lineno})"
    print(clean(line), file=sys.stderr)


def reason(error: Exception, inputs: Mapping[str, Any]) -> str:
    """The reason of a failed request on one line, with names of inputs instead of files."""
    expected = isinstance(error, (ValueError, OSError))
    if expected or type(error).__module__.partition(".")[0] in _OURS:
        text = str(error) or type(error).__name__
    else:
        text = f"{type(error).__name__}: {error}"
    text = _without_keys(text, inputs)
    files = {n: Path(v) for n, v in inputs.items() if isinstance(v, PurePath | str) and _file(v)}
    for name, path in files.items():
        text = text.replace(f"'{path}'", name).replace(str(path), name)
        if "/" in str(path):
            text = text.replace(path.name, name)
        text = text.replace(f"{name} {name}", name)
    named = {name: _shown(v) for name, v in inputs.items() if isinstance(v, str) and _address(v)}
    if len(named) == 1:
        text = _CACHED.sub(next(iter(named)), text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    text = clean_for("; ".join(lines).replace(":; ", ": "), texts(inputs))
    noted = getattr(error, "zeroprior_input", "")  # `inference.fetch.sources.of_input`
    if noted and not text.startswith(noted):
        text = f"{noted}: {text}"
    elif not text.startswith(tuple(inputs)):
        about = [name for name, shown in named.items() if shown in text]
        given = ((name, v) for name, v in inputs.items() if isinstance(v, str) and len(v) < 4096)
        about += [n for n, v in given if v and text.startswith((f"'{_shown(v)}'", f"{_shown(v)}:"))]
        text = f"{about[0]}: {text}" if about else text
    return text


def _file(value: PurePath | str) -> bool:
    """Whether an input is an absolute path: an uploaded or downloaded file."""
    text = str(value)
    return len(text) < 4096 and "\0" not in text and os.path.isabs(text)


def _address(value: str) -> bool:
    return is_data(value) or (len(value) < 4096 and "/" in value and " " not in value)


def _shown(value: str) -> str:
    """The URL without secrets, for messages."""
    if is_data(value):
        return value[:40]
    return safe_name(value)
