"""Find and replace in texts: a program of its own, since a regular expression may never end.

    python -I -S substitution.py     JSON on stdin and stdout

Python's `re` cannot be interrupted, and would stop the whole server.
"""

import json
import re
import subprocess
import sys

SECONDS = 10


class Unclear(ValueError):
    """The expression is invalid or takes too long. The message says which."""


def substituted(
    texts: list[str], find: str, replacement: str, is_regex: bool, word: bool
) -> list[str]:
    """The texts after the replacement. `word`: only whole words. Raises `Unclear`."""
    if not is_regex:
        pattern = re.compile(rf"(?<!\w){re.escape(find)}(?!\w)" if word else re.escape(find))
        return [pattern.sub(lambda _: replacement, text) for text in texts]
    question = json.dumps([texts, find, replacement, word])
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", __file__],
            input=question.encode(errors="backslashreplace"),
            capture_output=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise Unclear(f"the expression takes longer than {SECONDS} seconds") from None
    if done.returncode:
        raise Unclear("the expression could not be evaluated")
    answer = json.loads(done.stdout)
    if isinstance(answer, str):
        raise Unclear(answer)
    return list(answer)


def _main() -> None:
    texts, find, replacement, word = json.loads(sys.stdin.buffer.read())
    answer: list[str] | str
    try:
        pattern = re.compile(rf"(?<!\w)(?:{find})(?!\w)" if word else find)
        answer = [pattern.sub(replacement, text) for text in texts]
    except (re.error, IndexError, OverflowError, RecursionError) as error:
        answer = f"the expression is invalid: {error}"
    print(json.dumps(answer))


if __name__ == "__main__":
    _main()
