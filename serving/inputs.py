"""What both Cog faces need around their one call."""

import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cog import FieldInfo, current_scope
from coglet import server

from inference.console import log_to_console


def plain(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a face as plain values, `self` left out.

    A face that is called as plain Python sees Cog's `FieldInfo` object in place of every input
    that was left out; its default is what the caller meant.
    """
    return {
        name: value.default if isinstance(value, FieldInfo) else value
        for name, value in inputs.items()
        if name != "self"
    }


def metric(name: str, value: float) -> None:
    """Records a metric of the running prediction or training; outside of one it does nothing."""
    current_scope().record_metric(name, value)  # type: ignore[attr-defined]


def served() -> bool:
    """Whether Cog's server runs this call, for who knows whom, rather than plain Python."""
    return bool(server.active)


@contextmanager
def logged() -> Iterator[None]:
    """Sends the log of the one call, and the traceback of its failure, to standard output.

    The runtime collects what is printed; of a failure it shows only the last line by itself.
    """
    log_to_console()
    try:
        yield
    except Exception:
        traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
        raise
