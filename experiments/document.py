"""The measured parts of a document: Markdown between two marks, written by a script."""

from collections.abc import Iterable, Sequence
from pathlib import Path


def rewrite(document: Path, part: str, text: str) -> None:
    """Puts text in the place of what stood between the marks of a part.

    Raises ValueError where the document lacks them.
    """
    begin, end = marks(part)
    before, found, rest = document.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{document} lacks the lines {begin} and {end}")
    document.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def marks(part: str) -> tuple[str, str]:
    """Where a part begins and ends."""
    return f"<!-- {part}: begin -->", f"<!-- {part}: end -->"


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table under a title in bold."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join([f"**{title}**", "", *(f"| {' | '.join(line)} |" for line in lines)])
