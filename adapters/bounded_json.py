"""JSON from untrusted files: refused before it is parsed when it would take too much memory.

A list of two bytes takes 64 in Python, and deep nesting is slow to free. The text is therefore
counted first, without its strings, which are the only part that may be long.
"""

import json
import re
from typing import Any

MAX_DEPTH = 50
# A string, or the rest of the text where it is not closed. Possessive, so it never goes back.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")


def loads(text: bytes, most_values: int, most_depth: int = MAX_DEPTH) -> Any:
    """`json.loads` of UTF-8 text with at most so many values, nested at most so deep.

    Raises `ValueError` with the reason.
    """
    bare = _STRING.sub(b'""', text)
    opened = bare.count(b"[") + bare.count(b"{")
    if opened + bare.count(b",") + 1 > most_values:
        raise ValueError(f"it has more than {most_values:,} values")
    depth = 0
    for bracket in _BRACKET.findall(bare):
        depth += 1 if bracket in b"[{" else -1
        if depth > most_depth:
            raise ValueError(f"it is nested more than {most_depth} levels deep")
    del bare
    return json.loads(text.decode())
