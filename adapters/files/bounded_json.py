"""JSON from untrusted files: refused before it is parsed if it would take too much memory.

An empty list has two bytes in the text and 56 in Python. So the values are counted first. Strings
are skipped: they take no more memory than their text.
"""

import json
import re
from typing import Any

MAX_DEPTH = 50
# A string, or the rest of the text if it is not closed; or what comes before a value.
# Possessive: no backtracking.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[{,]', re.DOTALL)
_STRING = ord('"')


class TooLarge(ValueError):
    """Text with more values, or nested deeper, than is read."""


def loads(text: bytes | bytearray, most_values: int, most_depth: int = MAX_DEPTH) -> Any:
    """`json.loads` of UTF-8 text with at most so many values, nested at most so deep.

    Raises `TooLarge`, and `ValueError` for what is not JSON.
    """
    if len(text) > 2 * most_values:  # else there is no room for more of them
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
        if values > most_values or strings > 2 * most_values:  # a value has one key at most
            raise TooLarge(f"it has more than {most_values:,} values")


def _containers(value: Any) -> list[Any]:
    children = value.values() if isinstance(value, dict) else value
    return [each for each in children if isinstance(each, dict | list)]
