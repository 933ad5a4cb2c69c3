"""Parses JSON from untrusted files, with limits on values and nesting depth.

An empty list takes two bytes in the text and 56 in Python. So the values are counted before
parsing. Strings are not counted: they take about as much memory as their text.
"""

import json
import re
from typing import Any

MAX_DEPTH = 50
# A string, or the rest of the text if it is not closed; or a character before a value.
# Possessive: no backtracking.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[{,]', re.DOTALL)
_STRING = ord('"')


class TooLarge(ValueError):
    """JSON with more values or deeper nesting than the limit."""


def loads(text: bytes | bytearray, most_values: int, most_depth: int = MAX_DEPTH) -> Any:
    """`json.loads` of UTF-8 text with at most `most_values` values and `most_depth` levels.

    Raises `TooLarge` beyond the limits, and `ValueError` for invalid JSON.
    """
    if len(text) > 2 * most_values:  # a shorter text cannot contain more
        _count(text, most_values)
    too_deep = TooLarge(f"it is nested more than {most_depth} levels deep")
    try:
        value = json.loads(text.decode())
    except RecursionError:
        raise too_deep from None
    level = [[value]]
    for _ in range(most_depth + 1):
        level = [each for parent in level for each in _containers(parent)]
        if not level:
            return value
    raise too_deep


def _count(text: bytes | bytearray, most_values: int) -> None:
    values, strings = 0, 0
    for token in _TOKEN.finditer(text):
        if text[token.start()] == _STRING:
            strings += 1
        else:
            values += 1
        if values > most_values or strings > 2 * most_values:  # at most one key a value
            raise TooLarge(f"it has more than {most_values:,} values")


def _containers(value: Any) -> list[Any]:
    children = value.values() if isinstance(value, dict) else value
    return [each for each in children if isinstance(each, dict | list)]
