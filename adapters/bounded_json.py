"""JSON from untrusted files: refused before it is parsed if it would take too much memory.

An empty list has two bytes in the text and 56 in Python. So the values are counted first. Strings
are skipped: they take no more memory than their text.
"""

import json
import re
from typing import Any

MAX_DEPTH = 50
# A string, or the rest of the text if it is not closed; or a mark. Possessive: no backtracking.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[\]{},]', re.DOTALL)
_STRING, _COMMA = ord('"'), ord(",")
_OPENING = b"[{"


class TooLarge(ValueError):
    """Text with more values, or nested deeper, than is read."""


def loads(text: bytes | bytearray, most_values: int, most_depth: int = MAX_DEPTH) -> Any:
    """`json.loads` of UTF-8 text with at most so many values, nested at most so deep.

    Raises `TooLarge`, and `ValueError` for what is not JSON.
    """
    values, strings, depth = 0, 0, 0
    for token in _TOKEN.finditer(text):
        mark = text[token.start()]
        if mark == _STRING:
            strings += 1
        elif mark == _COMMA or mark in _OPENING:
            values += 1
            depth += mark != _COMMA
        else:
            depth -= 1
        if values > most_values or strings > 2 * most_values:  # a value has one key at most
            raise TooLarge(f"it has more than {most_values:,} values")
        if depth > most_depth:
            raise TooLarge(f"it is nested more than {most_depth} levels deep")
    return json.loads(text.decode())
